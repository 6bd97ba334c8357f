"""The figures of a study, in which every seed is a dot and every interval a whisker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from truestep.report.figures import BLUE, INK, LINE, MUTED, label_x, new_figure, rows_figure, styled, to_svg
from truestep.report.tables import visible

Row = Mapping[str, Any]


@styled
def dots(arms: Sequence[Row], benchmark: str) -> Markup:
    """Draw one row per arm, with its seeds as dots and its mean with an interval."""
    rows = [(a, a["scores"][benchmark]) for a in arms if benchmark in a["scores"]]
    if not rows:
        return Markup("")
    names = [visible(a["name"])[:40] for a, _ in rows]
    figure, axes = rows_figure(names, 0.34)
    for y, (arm, found) in enumerate(rows):
        colour = MUTED if arm["control"] else BLUE
        if found["seeds_known"]:
            axes.plot([100 * found["low"], 100 * found["high"]], [y, y], color=colour, linewidth=2.2)
        axes.plot([100 * found["value"]], [y], "D", color=colour, markersize=6, zorder=3)
        seeds = [100 * by[benchmark] for by in arm["by_seed"].values() if benchmark in by]
        axes.plot(seeds, [y + 0.26] * len(seeds), "o", color=colour, markersize=3.2, alpha=0.75)
    spoken = "; ".join(f"{n} {100 * f['value']:.1f} %" for n, (_, f) in zip(names, rows, strict=True))
    label = f"{benchmark}, score by arm with 95 % interval and seeds: {spoken}"
    return to_svg(figure, f"dots {benchmark}", label)


@styled
def bars(arms: Sequence[Row]) -> Markup:
    """Draw one bar per arm, in the order in which the arms were declared, with intervals and seeds."""
    rows = [a for a in arms if a["mean"]]
    if len(rows) < 2:
        return Markup("")
    figure, axes = new_figure(7.6, 2.9, left=0.5, bottom=0.95)
    for x, arm in enumerate(rows):
        found, control = arm["mean"], bool(arm["control"])
        color, alpha = (LINE, 0.9) if control else (BLUE, 0.55)
        axes.bar(x, 100 * found["value"], width=0.62, color=color, alpha=alpha)
        if found["seeds_known"]:
            axes.plot([x, x], [100 * found["low"], 100 * found["high"]], color=INK, linewidth=1.4)
        seeds = [100 * sum(by.values()) / len(by) for by in arm["by_seed"].values() if by]
        axes.plot([x + 0.2] * len(seeds), seeds, "o", color=INK, markersize=2.8, alpha=0.7)
    names = [visible(a["name"])[:22] for a in rows]
    axes.set_xticks(range(len(rows)), names, rotation=32, ha="right", fontsize=8)
    axes.grid(False, axis="x")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    spoken = "; ".join(f"{a['name']} {100 * a['mean']['value']:.1f} %" for a in rows)
    return to_svg(figure, "bars", f"Mean score by arm, in the declared order: {spoken}")


@styled
def by_flops(arms: Sequence[Row], highlighted: str, benchmark: str) -> Markup:
    """Draw the score of every checkpoint against FLOPs; one arm is highlighted among the others."""
    paths = {}
    for a in arms:
        if path := [(p["flops_paper"], 100 * p["score"]) for p in a["path"] if p["data"] == benchmark]:
            paths[a["name"]] = path
    if highlighted not in paths:
        return Markup("")
    figure, axes = new_figure(3.3, 1.95)
    for name, path in paths.items():
        if name != highlighted:
            axes.plot(*zip(*path, strict=True), "-", color=LINE, linewidth=1.2)
    axes.plot(*zip(*paths[highlighted], strict=True), "-o", color=BLUE, markersize=4)
    label_x(axes, "FLOPs (paper)", max(x for path in paths.values() for x, _ in path))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    spoken = "; ".join(f"{y:.1f} % at {x:.3g}" for x, y in paths[highlighted])
    return to_svg(figure, f"flops {highlighted} {benchmark}", f"{highlighted}, score against FLOPs: {spoken}")


@styled
def seeds_over_steps(name: str, curves: Mapping[str, Sequence[Sequence[float]]]) -> Markup:
    """Draw one line per seed."""
    curves = {seed: points for seed, points in curves.items() if points}
    if not curves:
        return Markup("")
    figure, axes = new_figure(3.3, 1.8)
    for points in curves.values():
        axes.plot([p[0] for p in points], [p[1] for p in points], color=BLUE, linewidth=1.1, alpha=0.7)
    label_x(axes, "step", 0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    first, last = [sum(p[i][1] for p in curves.values()) / len(curves) for i in (0, -1)]
    return to_svg(figure, name, f"{name}, {len(curves)} seeds: from about {first:.3g} to {last:.3g}")
