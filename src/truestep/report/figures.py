"""Figures as inline SVG in the page's colors. The same data give the same bytes."""

from __future__ import annotations

import functools
import html
import importlib.util
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

from markupsafe import Markup

from truestep.report.tables import ScoreRow, superscript, visible, with_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholder colors that occur nowhere else in an SVG; they are replaced by the page's own (such as --ink).
_COLOURS = {
    "#010203": "ink", "#010204": "muted", "#010205": "line", "#010206": "blue", "#010207": "orange",
    "#010208": "green", "#010209": "card",
}  # fmt: skip
INK, MUTED, LINE, BLUE, ORANGE, GREEN, CARD = _COLOURS
SERIES = (BLUE, ORANGE, GREEN)
# text.parse_math: a name with two dollar signs is not a formula
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "truestep", "text.parse_math": False,
    "axes.formatter.use_mathtext": False, "font.size": 9, "axes.edgecolor": LINE, "axes.labelcolor": MUTED,
    "text.color": INK, "xtick.color": LINE, "ytick.color": LINE, "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED, "xtick.labelsize": 8, "ytick.labelsize": 8, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": LINE,
    "grid.linewidth": 0.6, "lines.linewidth": 1.5, "legend.facecolor": CARD, "legend.edgecolor": "none",
    "legend.framealpha": 0.8, "legend.fontsize": 8,
}  # fmt: skip
MAX_POINTS = 600

P = ParamSpec("P")
Point = tuple[float, float]


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def styled(draw: Callable[P, Markup]) -> Callable[P, Markup]:
    """Decorate a function that draws, so that it uses truestep's style and is skipped without matplotlib."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **more: P.kwargs) -> Markup:
        if not can_draw():
            return Markup("")
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return draw(*args, **more)

    return drawn


@styled
def curve(
    name: str, series: Mapping[str, Sequence[Point]], x_label: str = "step", y_percent: bool = False
) -> Markup:
    """Draw lines over steps (or FLOPs). Return empty Markup if no series has a point."""
    series = {label: thin(points) for label, points in series.items() if points}
    if not series:
        return Markup("")
    figure, axes = new_figure(3.3, 1.95)
    factor = 100 if y_percent else 1
    for colour, (label, points) in zip(SERIES, series.items(), strict=False):
        xs, ys = [x for x, _ in points], [factor * y for _, y in points]
        marker = "o" if len(xs) <= 12 else None
        axes.plot(xs, ys, color=colour, label=visible(label)[:40], marker=marker, markersize=3.5)
    values = [factor * y for points in series.values() for _, y in points]
    _scale_y(axes, min(values), max(values), math.inf if y_percent else 10 if len(series) > 1 else 300)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}{' %' if y_percent else ''}")
    label_x(axes, x_label, max(x for points in series.values() for x, _ in points))
    if len(series) > 1:
        axes.legend(loc="best", handlelength=1.2, borderaxespad=0.2)
    last = "; ".join(f"{label} from {p[0][1]:.4g} to {p[-1][1]:.4g}" for label, p in series.items())
    return to_svg(figure, name, f"{name} against {x_label}: {last}")


def _scale_y(axes: Axes, low: float, high: float, span: float) -> None:
    """Use a logarithmic scale if all values are positive and span more than the factor ``span``."""
    if low > 0 and high > span * low:
        from matplotlib.ticker import LogLocator, NullLocator

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
    elif low == high:
        axes.set_yticks([low])
    else:
        axes.margins(y=0.08)


def label_x(axes: Axes, label: str, highest: float) -> None:
    """Label the x axis with whole steps, or with FLOPs in units of a power of ten that the label names."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=label == "step"))
    if label != "step" and highest > 0:
        power = 3 * math.floor(math.log10(highest) / 3)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 10.0**power:.4g}")
        label = f"10{superscript(power)} {label}"
    axes.set_xlabel(label, loc="right", fontsize=8)


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """Return at most about ``limit`` points, with the lowest and highest of each section, so that no spike is
    lost."""
    if len(points) <= limit:
        return list(points)
    width = math.ceil(len(points) / (limit // 2))
    kept: list[Point] = [points[0]]
    for start in range(0, len(points), width):
        stretch = points[start : start + width]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return [*kept, points[-1]]


@styled
def scores(rows: Sequence[ScoreRow]) -> Markup:
    """Draw a dot and a whisker for each checkpoint, by data set."""
    rows = [row for row in rows if row.score is not None]
    if not rows:
        return Markup("")
    several = len({row.data for row in rows}) > 1
    ordered = sorted(rows, key=lambda row: [r.data for r in rows].index(row.data))
    names = [visible(f"{row.data} · {row.checkpoint}" if several else row.checkpoint)[:40] for row in ordered]
    figure, axes = rows_figure(names, 0.36, right=0.78)  # room for "100.0 %"
    for y, row in enumerate(ordered):
        score, low, high = _percents(row)
        axes.plot([low, high], [y, y], color=BLUE, linewidth=2.2, solid_capstyle="round")
        axes.plot([score], [y], "o", color=BLUE, markersize=7, clip_on=False, zorder=3)
        style: Any = {"textcoords": "offset points", "va": "center", "fontsize": 9}
        axes.annotate(f"{score:.1f} %", (high, y), (7, 0), **style)
        if several and y and ordered[y - 1].data != row.data:
            axes.axhline(y - 0.5, color=LINE, linewidth=0.8)
    lowest, highest = min(_percents(row)[1] for row in ordered), max(_percents(row)[2] for row in ordered)
    room = 0.06 * (highest - lowest)
    axes.set_xlim(lowest - room, highest + room / 4)
    said = [f"{n} {with_interval(r.score, r.low, r.high)}" for n, r in zip(names, ordered, strict=True)]
    return to_svg(figure, "scores", f"Scores with 95 % intervals: {'; '.join(said)}")


def rows_figure(names: Sequence[str], height: float, right: float = 0.08) -> tuple[Figure, Axes]:
    """Return a figure with one named row per value in percent. A row is ``height`` inches high, and ``right``
    inches are free beside the plot."""
    left = 0.25 + 0.078 * max(map(len, names))
    figure, axes = new_figure(7.6, 0.5 + height * len(names), left=left, bottom=0.28)
    figure.subplots_adjust(right=1 - right / 7.6)
    axes.set_yticks(range(len(names)), names, fontsize=9.5, color=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    return figure, axes


def _percents(row: ScoreRow) -> tuple[float, float, float]:
    score = row.score or 0.0
    low, high = (score if end is None else end for end in (row.low, row.high))
    return 100 * score, 100 * low, 100 * high


@styled
def scores_by_flops(rows: Sequence[tuple[float, ScoreRow]], x_label: str) -> Markup:
    """Draw scores with whiskers against the FLOPs spent up to each checkpoint, one line per data set."""
    rows = [(flops, row) for flops, row in rows if row.score is not None]
    if len(rows) < 2:
        return Markup("")
    figure, axes = new_figure(3.3, 1.95)
    for colour, data in zip(SERIES, dict.fromkeys(row.data for _, row in rows), strict=False):
        points = [(flops, *_percents(row)) for flops, row in rows if row.data == data]
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        axes.plot(xs, ys, "-o", color=colour, markersize=4.5, label=visible(data)[:24])
        for flops, _, low, high in points:
            axes.plot([flops, flops], [low, high], color=colour, linewidth=1.2)
    for flops, (row, high) in {flops: (row, _percents(row)[2]) for flops, row in reversed(rows)}.items():
        style: Any = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "color": MUTED}
        axes.annotate(visible(row.checkpoint)[:20], (flops, high), (0, 4), **style)
    axes.margins(x=0.1, y=0.16)
    label_x(axes, x_label, max(flops for flops, _ in rows))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    if len({row.data for _, row in rows}) > 1:
        axes.legend(loc="best")
    spoken = "; ".join(f"{r.checkpoint} {with_interval(r.score, r.low, r.high)} at {f:.3g}" for f, r in rows)
    return to_svg(figure, "scores by flops", f"Score against {x_label}: {spoken}")


def new_figure(width: float, height: float, left: float = 0.56, bottom: float = 0.42) -> tuple[Figure, Axes]:
    """Return a figure with one plot and fixed margins, all in inches."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasSVG(figure)
    across, along = 1 - 0.08 / width, 1 - 0.08 / height
    figure.subplots_adjust(left=left / width, right=across, bottom=bottom / height, top=along)
    return figure, figure.add_subplot()


def to_svg(figure: Figure, name: str, label: str) -> Markup:
    """Return the figure as <svg> with a description, unique ids, and the page's colors and font."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the browser has the fonts that matplotlib lacks
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<style.*?</style>", "", text, count=1, flags=re.DOTALL)  # it would style the whole page
    prefix = re.sub(r"\W+", "-", name)
    text = re.sub(r'( id="|href="#|url\(#)', lambda found: f"{found[0]}{prefix}-", text)
    for colour, variable in _COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r"font-family: [^;\"]*; ?", "", text)
    opening = f'<svg role="img" aria-label="{html.escape(visible(label))}"'
    return Markup(text.replace("<svg", opening, 1))
