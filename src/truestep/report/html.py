"""Writes report.html, one page that contains everything, loads nothing, and runs nothing.

All text in a run is untrusted, because models write it. The Jinja environment escapes the text and shows its
invisible characters; the templates only shorten it. The page's policy forbids scripts and requests."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2

from truestep import pages
from truestep.errors import UserError
from truestep.evaluate.files import checked_samples
from truestep.report import figures, tables
from truestep.report.tables import ScoreRow, clip, duration, percent, scientific, visible, whole
from truestep.rundir import read_settings_text, redact, write_atomic
from truestep.train.logs import read_log
from truestep.train.metrics import metric
from truestep.train.metrics import panels as panels_of

Row = Mapping[str, Any]

_QUOTA = {"incorrect": 3, "correct": 1, "unscored": 2}  # evaluation samples to show
_SEARCHED = 20_000  # lines of a file that are searched for samples


def write_report(run: Path) -> Path:
    """Write RUN/report.html from the run's files. Raises UserError if the folder is not a run directory."""
    if not any((run / name).exists() for name in ("resolved.toml", "summary.json", "stages", "evaluations")):
        raise UserError(
            f"{run} is not a run directory (no resolved.toml); pass the folder that a run printed"
        )
    page = page_environment().get_template("report.html").render(_context(run))
    write_atomic(run / "report.html", page)
    return run / "report.html"


def page_environment() -> jinja2.Environment:
    """Return the environment that renders every page, with text escaped and invisible characters shown."""
    environment = jinja2.Environment(
        autoescape=True, finalize=_shown, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,  # an interrupted run has fewer values
        loader=pages.loader(Path(__file__).parent / "templates"),
    )  # fmt: skip
    filters: dict[str, Callable[..., str]] = {
        "clip": _clipped, "percent": percent, "whole": whole, "duration": duration, "scientific": scientific,
        "p_value": tables.p_value, "gib": tables.gib,
        "points": lambda value: tables.NONE if value is None else f"{100 * value:+.1f}",
    }  # fmt: skip
    environment.filters |= {name: _or_none(write) for name, write in filters.items()}
    return environment


def _shown(value: Any) -> Any:
    """Return what a template prints. Markup (our own SVG) is also a str, and is printed unchanged."""
    if value is None:
        return tables.NONE
    return visible(value) if type(value) is str else value


def _or_none(write: Callable[..., str]) -> Callable[..., str]:
    """Return a filter that treats a missing value as None."""
    return lambda value, *more: write(None if isinstance(value, jinja2.Undefined) else value, *more)


def _clipped(value: Any, limit: int) -> str:
    if value is None:
        return ""
    return clip(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), limit)


def _context(run: Path) -> dict[str, Any]:
    summary, rows = tables.read_summary(run), tables.score_table(run)
    stages = _stages(run, summary)
    return {
        "name": summary.get("name") or run.resolve().name, "summary": summary,
        "outcome": tables.outcome(summary, rows),
        "score_tables": [tables.cells_of(rows, f(rows)) for f in (tables.score_columns, tables.pass_columns)],
        "score_figure": figures.scores(rows), "can_draw": figures.can_draw(),
        "compute": _compute(stages, rows), "stages": stages, "evaluations": list(_evaluations(run, rows)),
        "overlap": summary.get("overlap") or tables.read_object(run / "data" / "overlap.json"),
        "settings": redact(read_settings_text(run)),
        "provenance": flat(_in_words(tables.read_object(run / "provenance.json"))),
    }  # fmt: skip


def _in_words(stamp: Mapping[str, Any]) -> dict[str, Any]:
    """Return the provenance with the changes of a run as a sentence."""
    if not stamp.get("changes"):
        return dict(stamp)
    from truestep.checkpoint.export import changes_in_words

    return {**stamp, "changes": changes_in_words(stamp["changes"])}


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings or versions as one flat table of names and texts."""
    found: dict[str, str] = {}
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            found |= flat(entry, f"{prefix}{key} · ")
        else:
            text = " ".join(map(str, entry)) if isinstance(entry, list) else str(entry)
            found[prefix + key] = redact(text)
    return found


def _stages(run: Path, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every stage that has a folder or an entry in the summary, in the order of the folders."""
    paths = sorted(path for path in run.glob("stages/[0-9]*-*") if path.is_dir())
    folders = {path.name.partition("-")[2]: path for path in paths}
    entries = {str(entry.get("name")): entry for entry in summary.get("stages") or []}
    found, per_step = [], _samples_per_step(run)
    for name in dict.fromkeys([*folders, *entries]):
        folder, entry = folders.get(name), entries.get(name, {})
        metrics = read_log(folder, "metrics.jsonl") if folder else []
        rollouts = read_log(folder, "rollouts.jsonl") if folder else []
        tokens = {k: v for k, v in (entry.get("tokens") or {}).items() if k.endswith("tokens")}
        found.append({
            "name": name, **{key: entry.get(key) for key in ("kind", "seconds", "flops_paper", "flops_full")},
            "steps": entry.get("steps", metrics[-1]["step"] if metrics else None),
            **{key: entry.get(key) for key in ("exported", "tokens_per_second", "peak_memory_bytes")},
            "path": f"stages/{folder.name}" if folder else "", "num_rollouts": len(rollouts),
            "samples_per_step": per_step.get(name),
            "tokens": {key.removesuffix("_tokens").replace("_", " "): n for key, n in tokens.items()},
            "is_worthless": name in [
                w.get("stage") for w in summary.get("warnings") or [] if "until" not in w
            ],
            "metrics": metrics, "panels": _panels(name, metrics), "samples": pick_rollouts(rollouts),
        })  # fmt: skip
    return found


def _samples_per_step(run: Path) -> dict[str, int]:
    """Return how many samples each RL stage draws in a step, by its settings."""
    try:
        stages = tomllib.loads(read_settings_text(run)).get("stages", [])
    except tomllib.TOMLDecodeError:
        return {}
    return {
        s["name"]: s["prompts_per_step"] * s["samples_per_prompt"] for s in stages if "prompts_per_step" in s
    }


def points(metrics: Sequence[Row], stage: str, key: str, x: str = "step") -> list[tuple[float, float]]:
    """Return the finite values of one metric of a stage; ``x`` is "step" or another metric."""
    x_name, y_name = x if x == "step" else f"{stage}/{x}", f"{stage}/{key}"
    pairs = [(row.get(x_name), row.get(y_name)) for row in metrics]
    return [(float(a), float(b)) for a, b in pairs if _finite(a) and _finite(b)]  # type: ignore[arg-type]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _panels(stage: str, metrics: Sequence[Row]) -> list[dict[str, Any]]:
    panels = []
    present = {key.removeprefix(f"{stage}/") for row in metrics for key in row}
    for title, keys in panels_of(present).items():
        share = all(metric(key).unit == "share" for key in keys)
        if series := {label: found for key, label in keys.items() if (found := points(metrics, stage, key))}:
            ends = [found[-1][1] for found in series.values()]
            last = " · ".join(f"{100 * end:.1f} %" if share else f"{end:.3g}" for end in ends)
            figure = figures.curve(f"{stage} {title}", series, y_percent=share)
            panels.append({"title": title, "last": last, "figure": figure})
    return panels


def _compute(stages: Sequence[Row], rows: Sequence[ScoreRow]) -> list[dict[str, Any]]:
    """Return figures of score, reward and dev score against the FLOPs spent, by the paper's formula."""
    metrics = {stage["name"]: stage["metrics"] for stage in stages}
    total = {name: points(m, name, "flops_paper") for name, m in metrics.items()}
    spent = {"base": 0.0} | {name: curve[-1][1] for name, curve in total.items() if curve}
    reward, dev = (
        {name: points(m, name, key, "flops_paper") for name, m in metrics.items()}
        for key in ("reward", "dev/score")
    )
    reached = [(spent[row.checkpoint], row) for row in rows if row.checkpoint in spent]
    label = "FLOPs (paper formula)"
    drawn = [
        ("Score", figures.scores_by_flops(reached, label)),
        ("Reward", figures.curve("Reward by flops", reward, label)),
        ("Dev score", figures.curve("Dev score by flops", dev, label, y_percent=True)),
    ]
    return [{"title": title, "figure": figure} for title, figure in drawn if figure]


def pick_rollouts(rows: Sequence[Row]) -> list[Row]:
    """Return one sample of each verdict from the first, the middle and the last step."""
    steps = sorted({row["step"] for row in rows})
    wanted = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    picked: dict[tuple[int, str], Row] = {}
    for row in rows:
        if row["step"] in wanted:
            picked.setdefault((row["step"], _verdict(row)), row)
    return [picked[key] for key in sorted(picked)]


def _verdict(row: Row) -> str:
    verdict = row.get("verdict")
    return verdict if isinstance(verdict, str) and verdict in _QUOTA else "unscored"


def _evaluations(run: Path, rows: Sequence[ScoreRow]) -> Iterator[dict[str, Any]]:
    """Yield a few samples of each evaluation: those in the score table, in its order, then the others."""
    listed = {run / row.samples: (row.checkpoint, row.data) for row in rows}
    others = sorted(set(run.glob("evaluations/*/*.samples.jsonl")) - listed.keys())
    listed |= {path: (path.parent.name, path.name.removesuffix(".samples.jsonl")) for path in others}
    for path, (checkpoint, data) in listed.items():
        if path.exists() and (samples := pick_samples(_lines(path))):
            size = next((r.n for r in rows if (r.checkpoint, r.data) == (checkpoint, data)), None)
            place = str(path.relative_to(run))
            yield {"checkpoint": checkpoint, "data": data, "samples": samples, "n": size, "path": place}


def _lines(path: Path) -> Iterator[Row]:
    """Yield the rows of a file one by one, because a file with many samples per problem may be larger than
    memory."""
    yield from islice(checked_samples(path), _SEARCHED)


def pick_samples(rows: Iterable[Row]) -> list[Row]:
    """Return the first few incorrect, correct and unscored samples, at most one per problem."""
    left, picked, seen = dict(_QUOTA), [], set()
    for row in rows:
        verdict = _verdict(row)
        if left[verdict] and row.get("problem_id") not in seen:
            left[verdict] -= 1
            seen.add(row.get("problem_id"))
            picked.append(row)
        if not any(left.values()):
            break
    return sorted(picked, key=lambda row: list(_QUOTA).index(_verdict(row)))
