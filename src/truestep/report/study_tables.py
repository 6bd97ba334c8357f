"""A study's tables as Markdown, CSV and LaTeX. All have the same cells, escaped for each format."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from truestep.report.tables import NONE, p_value, visible

Row = Mapping[str, Any]
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "–": "--", "−": "$-$", "×": r"$\times$", "→": r"$\to$", "±": r"$\pm$",
}  # fmt: skip
_ARMS = ("Seeds", "FLOPs (paper)", "FLOPs (fuller)", "Trials: FLOPs", "Checkpoint", "Marks")
_P = ("p", "p (Holm)", "p (sign flips)")
_CONTRASTS = ("Contrast", "Difference [95 %]", "df", *_P, "Detectable", "Seeds", "Verdict")
_CSV = ("arm", "control", "seed", "benchmark", "score", "low", "high", "flops_paper", "flops_full", "marks")


def points(found: Row | None, sign: str = "") -> str:
    """Return text such as 53.2 [50.1, 56.3], in points."""
    if found is None:
        return NONE
    value, low, high = (f"{100 * found[key]:{sign}.1f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]" if found["seeds_known"] else f"{value} (one seed)"


def flops(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g}"


def method_table(table: Row) -> tuple[list[str], list[list[str]]]:
    """Return the headings, and one row per arm with its scores, seeds, budget, trials, and what differs."""
    names = table["benchmarks"]
    mean = ["Mean"] if len(names) > 1 else []
    rows = []
    for arm in table["arms"]:
        label = arm["name"] + (f" (control: {arm['control']})" if arm["control"] else "")
        tuning = arm["tuning"]
        trials = f"{tuning.get('trials', 0)}: {flops((tuning.get('flops') or {}).get('paper'))}"
        rows.append([
            label, *[points(arm["scores"].get(n)) for n in names], *[points(arm["mean"]) for _ in mean],
            str(len(arm["seeds"])), flops(arm["flops"]["paper"]), flops(arm["flops"]["full"]), trials,
            arm["checkpoint"], "; ".join(arm["marks"]) or NONE,
        ])  # fmt: skip
    return ["Arm", *names, *mean, *_ARMS], rows


def contrast_table(table: Row) -> tuple[list[str], list[list[str]]]:
    rows = []
    for c in table["contrasts"]:
        found = c["all"]
        name = f"{c['a']} − {c['b']}" + (" (primary)" if c["primary"] else "")
        if found is None:
            rows.append([name, *[NONE] * 7, c["verdict"]])
            continue
        said = [NONE] * 5
        if found["seeds_known"]:
            p_values = (found["p_value"], c["p_adjusted"], found["p_sign_flip"])
            said = [f"{found['df']:.1f}", *map(p_value, p_values), f"{100 * found['detectable']:.1f}"]
        rows.append([name, points(found, "+"), *said, str(len(c["seeds"])), c["verdict"]])
    return list(_CONTRASTS), rows


def left_out(table: Row) -> list[str]:
    """Return sentences about what is switched off in the study, and why."""
    by_reason: dict[str, list[str]] = {}
    for control, why in table["controls_off"].items():
        by_reason.setdefault(why, []).append(control)
    lines = [
        f"Control {names[0]} was left out: {why}" if len(names) == 1 else
        f"Controls {', '.join(names)} were left out: {why}"
        for why, names in by_reason.items()
    ]  # fmt: skip
    return lines + [
        f"{name} may have problems of training or dev sets: {why}"
        for name, why in table.get("allow_overlap", {}).items()
    ]


def markdown(table: Row) -> str:
    note = "Scores are in % and are means over seeds and problems, with 95 % intervals over both. "
    note += "Differences are in points and are paired by seed and problem."
    note += "" if table["complete"] else " **Incomplete.**"
    parts = [f"# {_md(table['name'])}", _md(table["question"]), note]
    for head, rows in (method_table(table), contrast_table(table)):
        if rows:
            lines = [head, ["---"] * len(head), *rows]
            parts.append("\n".join("| " + " | ".join(_md(cell) for cell in line) + " |" for line in lines))
    if several := [name for name, hashes in table["content"].items() if len(hashes) > 1]:
        parts.append(f"Data sets that are not the same in all cells: {_md(', '.join(several))}")
    parts += [_md(line) for line in left_out(table)]
    parts += [f"Failed: {_md(cell)}: {_md(why)}" for cell, why in table["failures"].items()]
    return "\n\n".join(parts) + "\n"


def _md(text: str) -> str:
    escaped = "".join(f"\\{c}" if c in "\\`*|<>" else c for c in visible(text))
    return " ".join(escaped.split())


def as_csv(table: Row) -> str:
    """Return one line per score; seed "all" is the mean over seeds."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_CSV)
    for arm in table["arms"]:
        whole = {**arm["scores"], **({"mean": arm["mean"]} if arm["mean"] else {})}
        marks = "; ".join([*arm["marks"], *([] if table["complete"] else ["incomplete study"])])
        lines = []
        for name, found in whole.items():
            ends = [found["low"], found["high"]] if found["seeds_known"] else ["", ""]
            lines.append(["all", name, found["value"], *ends, arm["flops"], marks])
        for seed, by in arm["by_seed"].items():
            spent = arm["flops_by_seed"][seed]
            lines += [[seed, name, score, "", "", spent, ""] for name, score in by.items()]
        for *front, spent, note in lines:
            line = (arm["name"], arm["control"], *front, spent["paper"], spent["full"], note)
            writer.writerow([_cell(v) for v in line])
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    """Put an apostrophe in front of text that a spreadsheet would read as a formula."""
    text = visible(value) if isinstance(value, str) else value
    return f"'{text}" if isinstance(text, str) and text[:1] in "=+-@\t\r" and text else text


def latex(table: Row) -> str:
    """Return two booktabs tables, with every cell escaped."""
    parts = ["% needs \\usepackage{booktabs}"]
    for head, rows in (method_table(table), contrast_table(table)):
        columns = "l" + "r" * (len(head) - 2) + "l"
        lines = [" & ".join(_tex(cell) for cell in row) + r" \\" for row in rows]
        parts.append("\n".join([
            rf"\begin{{tabular}}{{{columns}}}", r"\toprule",
            " & ".join(_tex(h) for h in head) + r" \\", r"\midrule", *lines, r"\bottomrule", r"\end{tabular}",
        ]))  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _tex(text: str) -> str:
    return " ".join("".join(_LATEX.get(c, c) for c in visible(text)).split())
