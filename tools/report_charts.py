"""Charts of tools/report.py: each function returns one SVG as text, to stand inside an HTML page.

Text stays text, and ink and grid take the page's CSS variables, so that a chart follows light and
dark and prints. Runs are told apart by Okabe and Ito's colours, which the colour-blind can tell
apart, and by dashes or hatches too. Names come from files: they are never read as mathematics, and
Matplotlib escapes them as it writes the SVG.
"""

import html
import io
import itertools
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito, those that show on white and on black first; their yellow is left out, their black
# is the page's ink.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
SWATCH_DASHES = ("", "7 2", "2 2", "8 2 2 2")  # the same as an SVG has them, for short lines
HATCHES = ("", "//", "..", "\\\\", "xx", "--", "++")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, GRID = "#0a0b0c", "#c0c1c2"  # stand-ins that the page's variables replace
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # each text of an SVG repeats the list
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "hatch.linewidth": 0.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "axes.grid": True,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.unicode_minus": True,
    "path.simplify_threshold": 0.5,
}
POINTS = 500  # of a line in a chart, at most; it is about 270 pixels wide
Points = Sequence[tuple[float, float]]


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def dash(index: int, dashes: Sequence = DASHES):
    """Another one for each colour, and for each round of the colours."""
    return dashes[(index + index // len(COLOURS)) % len(dashes)]


def swatch_dash(index: int) -> str:
    """The same as a value of stroke-dasharray, for legends."""
    return dash(index, SWATCH_DASHES)


@matplotlib.rc_context(STYLE)
def line_chart(
    title: str,
    series: Mapping[str, Points],
    order: Sequence[str],
    ylabel: str,
    *,
    marks: bool = False,
    log: bool = False,
    reference: tuple[str, float] | None = None,
) -> str:
    """Lines over training steps. order: of all names, which gives each its colour. reference: a
    level with its name.
    """
    figure, axes = _over_steps(title, ylabel)
    for name, points in series.items():
        points = thinned(points)
        index = order.index(name)
        if log:  # its axis has no place for the others
            points = [point for point in points if point[1] > 0]
        marker = "o" if marks or len(points) == 1 else None
        look = {"color": colour(index), "linestyle": dash(index), "marker": marker}
        axes.plot(*zip(*points), linewidth=1.6, markersize=3.5, **look)
    if reference:
        name, level = reference
        axes.axhline(level, color=INK, linestyle=(0, (1, 1.5)), linewidth=1.4)
        above = {"xytext": (0, 2), "textcoords": "offset points", "ha": "right", "va": "bottom"}
        place = {"xy": (1, level), "xycoords": ("axes fraction", "data")}
        axes.annotate(name, fontsize=8.5, **place, **above)
        axes.margins(y=0.12)
    low, high = axes.dataLim.intervaly
    if log:
        axes.set_yscale("log")
    elif 0 <= high - low < 1e-9:  # a level: its rounding is nothing to look at
        axes.set_ylim(low - 0.5, high + 0.5)
    else:
        axes.ticklabel_format(axis="y", scilimits=(-2, 4))
    return _svg(figure, f"{title}: {ylabel} over steps")


def thinned(points: Points, most: int = POINTS) -> Points:
    """Points that draw the same line, about `most` of them: the first and the last, and of each of
    equal stretches the lowest and the highest.
    """
    if len(points) <= most:
        return points
    values = np.array([value for _, value in points])
    ends = np.linspace(0, len(points), most // 2 + 1).astype(int)
    kept = {0, len(points) - 1}
    for start, end in itertools.pairwise(ends):
        kept |= {start + int(values[start:end].argmin()), start + int(values[start:end].argmax())}
    return [points[place] for place in sorted(kept)]


@matplotlib.rc_context(STYLE)
def share_chart(title: str, series: Mapping[str, Points], order: Sequence[str]) -> str:
    """Shares of a whole over training steps, stacked; hatched, so that colour is not all that tells
    them apart.
    """
    steps = sorted({step for points in series.values() for step, _ in points})
    if len(steps) > POINTS:
        steps = [steps[k] for k in np.linspace(0, len(steps) - 1, POINTS).astype(int)]
    figure, axes = _over_steps(title, "share, %")
    base = np.zeros(len(steps))
    for name, points in series.items():
        known = dict(points)
        top = base + 100 * np.array([known.get(step, 0.0) for step in steps])
        index = order.index(name)
        hatch = HATCHES[index % len(HATCHES)]
        look = {"facecolor": colour(index), "hatch": hatch, "edgecolor": INK, "linewidth": 0.4}
        if len(steps) == 1:
            axes.bar(steps, top - base, bottom=base, width=1, **look)
        else:
            axes.fill_between(steps, base, top, **look)
        base = top
    axes.set_ylim(0, 100)
    if len(steps) > 1:
        axes.set_xlim(steps[0], steps[-1])
    return _svg(figure, f"{title}: share of each term over steps")


@matplotlib.rc_context(STYLE)
def box_chart(
    title: str,
    values: Mapping[str, Mapping[str, Sequence[float]]],
    order: Sequence[str],
    label: str,
) -> str:
    """Horizontal box plots: for each class, one box for each run, every case a dot.

    values: class -> run -> values that are defined, of the same runs for all classes. order: as in
    `line_chart`.
    """
    count = max(len(of_runs) for of_runs in values.values())
    height = 0.8 / count
    of_class = max(0.3, 0.2 * count + 0.12)  # inches
    figure, axes = _in_rows(title, list(values), label, 1.0 + of_class * len(values), margin=0.55)
    axes.tick_params(axis="y", length=0)
    for place, of_runs in enumerate(values.values()):
        for slot, (run, found) in enumerate(of_runs.items()):
            if not len(found):
                continue
            index = order.index(run)
            y = place - 0.4 + (slot + 0.5) * height
            axes.boxplot(
                found,
                positions=[y],
                orientation="horizontal",
                widths=0.78 * height,
                patch_artist=True,
                showfliers=False,
                manage_ticks=False,
                boxprops={"facecolor": "none", "edgecolor": colour(index)},
                medianprops={"color": colour(index), "linewidth": 2.4},
                whiskerprops={"color": colour(index)},
                capprops={"color": colour(index)},
            )
            # Dots spread in a fixed pattern: the same data give the same picture.
            spread = (np.arange(len(found)) * 0.618 % 1 - 0.5) * 0.5 * height
            look = {"color": colour(index), "marker": MARKERS[index % len(MARKERS)]}
            axes.scatter(found, y + spread, s=9, alpha=0.55, linewidths=0, **look)
    return _svg(figure, f"{title}: box plots of each class")


@matplotlib.rc_context(STYLE)
def interval_chart(
    title: str, rows: Sequence[tuple[str, float, float | None, float | None]], label: str
) -> str:
    """Differences with their confidence intervals, and the line of no difference. rows: (name,
    mean, low, high).
    """
    names = [row[0] for row in rows]
    figure, axes = _in_rows(title, names, label, 0.95 + 0.34 * len(rows), margin=0.6)
    axes.axvline(0, color=INK, linewidth=1)
    for place, (_, mean, low, high) in enumerate(rows):
        if low is not None:
            look = {"color": COLOURS[0], "linewidth": 2.2, "solid_capstyle": "butt"}
            axes.plot([low, high], [place, place], **look)
        axes.plot([mean], [place], marker="D", color=COLOURS[1], markersize=6)
    return _svg(figure, f"{title}: differences with 95 % confidence intervals")


@matplotlib.rc_context(STYLE)
def dot_chart(
    title: str, names: Sequence[str], series: Mapping[str, Sequence[float | None]], label: str
) -> str:
    """For each name a line with one mark for each series, in the order of `series`."""
    figure, axes = _in_rows(title, names, label, 1.25 + 0.3 * len(names), margin=0.5)
    columns = np.array(list(series.values()), float)  # None becomes NaN
    for place, values in enumerate(columns.T):
        if not np.isnan(values).all():
            ends = [np.nanmin(values), np.nanmax(values)]
            axes.plot(ends, [place, place], color=GRID, linewidth=3, zorder=1)
    for index, (name, values) in enumerate(zip(series, columns)):
        look = {"color": colour(index), "marker": MARKERS[index % len(MARKERS)], "label": name}
        axes.scatter(values, range(len(names)), s=48, zorder=2, **look)
    figure.legend(loc="outside lower center", ncols=len(series), frameon=False, fontsize=9.5)
    return _svg(figure, f"{title}: {', '.join(series)}")


def _over_steps(title: str, ylabel: str) -> tuple[Figure, Axes]:
    """A small figure and its axes under a title, with fixed margins: there are many, and fitting
    them takes time.
    """
    figure = Figure(figsize=(3.7, 2.5))
    axes = figure.add_axes((0.19, 0.2, 0.77, 0.66))
    axes.set_title(title, parse_math=False)
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure, axes


def _in_rows(
    title: str, names: Sequence[str], label: str, height: float, margin: float
) -> tuple[Figure, Axes]:
    """A wide figure and its axes with one row for each name, from the top. height: in inches;
    margin: above the first row and below the last, in rows.
    """
    figure = Figure(figsize=(7.4, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(len(names) - 1 + margin, -margin)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label, parse_math=False)
    return figure, axes


def _svg(figure: Figure, description: str) -> str:
    """The figure as an <svg> element without fixed size, described for those who do not see it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    opening, rest = text.split(">", 1)
    opening = re.sub(r' (?:width|height|version|xmlns(?::xlink)?)="[^"]*"', "", opening)
    opening += f' role="img" aria-label="{html.escape(description)}"'
    opening += f' style="max-width:{figure.get_figwidth() * 96:.0f}px"'
    return re.sub(r"\n\s*", "\n", f"{opening}>{rest}")
