"""Writes a study's report.html, and its tables as Markdown, CSV and LaTeX. It computes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from truestep.errors import UserError
from truestep.report import study_figures as figures
from truestep.report import study_tables as tables
from truestep.report.figures import can_draw
from truestep.report.html import flat, page_environment
from truestep.report.tables import read_object
from truestep.rundir import write_atomic

Row = Mapping[str, Any]
PARTS = ("seeds", "problems", "residual")
CURVES = {"reward": "Reward", "completions/mean_length": "Completion length", "entropy": "Entropy",
          "grad_norm": "Gradient norm", "loss": "Loss", "dev/score": "Dev score"}  # fmt: skip


def write_study(folder: Path, cells: Mapping[str, Row] | None = None) -> Path:
    """Write FOLDER/report.html and table.{md,csv,tex} from results and compact cells. Raises UserError."""
    table = read_object(folder / "results.json")
    if "arms" not in table:
        raise UserError(f"{folder} is not a study directory; pass the folder that truestep study printed")
    if cells is None:
        cells = read_cells(folder, table)
    for name, write in (("md", tables.markdown), ("csv", tables.as_csv), ("tex", tables.latex)):
        write_atomic(folder / f"table.{name}", write(table))
    page = page_environment().get_template("study.html").render(_context(folder, table, cells))
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


def read_cells(folder: Path, table: Row) -> dict[str, Row]:
    """Return the compact cells behind the results. The folder may also contain cells of other recipes."""
    listed = {(arm["name"], seed) for arm in table["arms"] for seed in arm["seeds"]}
    cells = {p.stem: read_object(p) for p in sorted(folder.glob("compact/cells/*.json"))}
    return {name: cell for name, cell in cells.items() if (cell.get("arm"), cell.get("seed")) in listed}


def _context(folder: Path, table: Row, cells: Mapping[str, Row]) -> dict[str, Any]:
    arms, names = table["arms"], table["benchmarks"]
    stamp = read_object(folder / "provenance.json")
    by_flops = []
    for name, arm in product(names, [arm for arm in arms if len(arm["path"]) > 1]):
        if figure := figures.by_flops(arms, arm["name"], name):
            by_flops.append((f"{arm['name']}, {name}" if len(names) > 1 else arm["name"], figure))
    return {
        "table": table, "primary": [c for c in table["contrasts"] if c["primary"]], "points": tables.points,
        "method_table": tables.method_table(table), "contrast_table": tables.contrast_table(table),
        "left_out": tables.left_out(table),
        "dots": [(name, figures.dots(arms, name)) for name in names], "bars": figures.bars(arms),
        "by_flops": by_flops, "dynamics": [d for arm in arms if (d := _dynamics(arm["name"], cells))],
        "several": {name: hashes for name, hashes in table["content"].items() if len(hashes) > 1},
        "spread": [
            {"arm": arm["name"], "sample": arm["sd_sample"], **{k: mean[f"sd_{k}"] for k in PARTS}}
            for arm in arms
            if (mean := arm["mean"])
        ],
        "can_draw": can_draw(), "audit": stamp.pop("trainer_audit", ""), "provenance": _stamped(flat(stamp), arms),
        "machines": _machines(cells),
    }  # fmt: skip


def _stamped(stamp: Mapping[str, str], arms: Sequence[Row]) -> dict[str, str]:
    """Return the provenance with the seeds of all arms, and with the commit named as that of truestep."""
    seeds = sorted({int(seed) for arm in arms for seed in arm["seeds"]})
    named = {"seed": "seeds", "commit": "commit of truestep"}
    values = {**stamp, **({"seed": ", ".join(map(str, seeds))} if "seed" in stamp else {})}
    return {named.get(key, key): value for key, value in values.items()}


def _dynamics(arm: str, cells: Mapping[str, Row]) -> dict[str, Any] | None:
    """Return the curves of an arm's last stage, one line per seed."""
    own = {str(cell["seed"]): cell for cell in cells.values() if cell["arm"] == arm}
    stages = [list(cell["dynamics"]) for cell in own.values() if cell["dynamics"]]
    if not stages:
        return None
    stage = stages[0][-1]
    panels = []
    for key, title in CURVES.items():
        curves = {seed: cell["dynamics"].get(stage, {}).get(key, []) for seed, cell in own.items()}
        if figure := figures.seeds_over_steps(f"{arm} {stage} {title}", curves):
            panels.append({"title": title, "figure": figure})
    return {"arm": arm, "stage": stage, "panels": panels}


def _machines(cells: Mapping[str, Row]) -> dict[str, int]:
    """Count the cells for each combination of commit and processor that they were run with."""
    names = []
    for stamp in (cell["provenance"] for cell in cells.values()):
        changes = " with uncommitted changes" if stamp["uncommitted_changes"] else ""
        torch = stamp["versions"].get("torch", "?")
        names.append(
            f"truestep at commit {stamp['commit'][:12]}{changes}, torch {torch}, {stamp['hardware']['cpu']}"
        )
    return Counter(names)
