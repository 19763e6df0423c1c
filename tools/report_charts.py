"""Charts of tools/report.py: each function returns one SVG as text, to stand inside an HTML page.

Text stays text, and ink and grid take the page's CSS variables, so that a chart follows light and
dark and prints. Runs are told apart by Okabe and Ito's colours, which the colour-blind can tell
apart, and by dashes or hatches too.
"""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito, those that show on white and on black first; their yellow is left out, their black
# is the page's ink.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
INK, GRID = "#0a0b0c", "#c0c1c2"  # stand-ins that the page's variables replace
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
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
Points = Sequence[tuple[float, float]]


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def dash(index: int):
    """Another one for each colour, and for each round of the colours."""
    return DASHES[(index + index // len(COLOURS)) % len(DASHES)]


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
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(title)
        for name, points in series.items():
            index = order.index(name)
            axes.plot(
                *zip(*points),
                color=colour(index),
                linestyle=dash(index),
                linewidth=1.6,
                marker="o" if marks or len(points) == 1 else None,
                markersize=3.5,
            )
        if reference:
            axes.axhline(reference[1], color=INK, linestyle=(0, (1, 1.5)), linewidth=1.4)
            axes.annotate(
                reference[0],
                (1, reference[1]),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=8.5,
                xytext=(0, 2),
                textcoords="offset points",
            )
            axes.margins(y=0.12)
        if log:
            axes.set_yscale("log")
        else:
            axes.ticklabel_format(axis="y", scilimits=(-2, 4))
        axes.set_xlabel("step")
        axes.set_ylabel(ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        return _svg(figure, f"{title}: {ylabel} over steps")


def share_chart(title: str, series: Mapping[str, Points], order: Sequence[str]) -> str:
    """Shares of a whole over training steps, stacked; hatched, so that colour is not all that tells
    them apart.
    """
    steps = sorted({step for points in series.values() for step, _ in points})
    known = {name: dict(points) for name, points in series.items()}
    with matplotlib.rc_context(STYLE | {"hatch.linewidth": 0.5}):
        figure, axes = _panel(title)
        base = np.zeros(len(steps))
        for name in series:
            index = order.index(name)
            top = base + 100 * np.array([known[name].get(step, 0.0) for step in steps])
            look = {
                "facecolor": colour(index),
                "hatch": HATCHES[index % len(HATCHES)],
                "edgecolor": INK,
            }
            if len(steps) == 1:
                axes.bar(steps, top - base, bottom=base, width=1, linewidth=0.4, **look)
            else:
                axes.fill_between(steps, base, top, linewidth=0.4, **look)
            base = top
        axes.set_ylim(0, 100)
        if len(steps) > 1:
            axes.set_xlim(steps[0], steps[-1])
        axes.set_xlabel("step")
        axes.set_ylabel("share, %")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        return _svg(figure, f"{title}: share of each term over steps")


HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "++++")


def box_chart(
    title: str,
    values: Mapping[str, Mapping[str, Sequence[float]]],
    order: Sequence[str],
    label: str,
) -> str:
    """Horizontal box plots: for each class, one box for each run, every case a dot.

    values: class -> run -> values that are defined.
    """
    names, count = list(values), len(order)
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(7.4, 1.0 + max(0.3, 0.2 * count + 0.12) * len(names), title)
        for place, name in enumerate(names):
            for index, run in enumerate(order):
                found = np.asarray(values[name].get(run, ()), float)
                if not len(found):
                    continue
                height = 0.8 / count
                y = place - 0.4 + (index + 0.5) * height
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
                axes.scatter(
                    found,
                    y + spread,
                    s=9,
                    color=colour(index),
                    alpha=0.55,
                    linewidths=0,
                    marker=MARKERS[index % 6],
                )
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.45, -0.55)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(label)
        return _svg(figure, f"{title}: box plots of each class")


MARKERS = ("o", "s", "^", "D", "v", "P")


def interval_chart(
    title: str, rows: Sequence[tuple[str, float, float | None, float | None]], label: str
) -> str:
    """Differences with their confidence intervals, and the line of no difference. rows: (name,
    mean, low, high).
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(7.4, 0.95 + 0.34 * len(rows), title)
        axes.axvline(0, color=INK, linewidth=1)
        for place, (_, mean, low, high) in enumerate(rows):
            if low is not None:
                axes.plot(
                    [low, high],
                    [place, place],
                    color=COLOURS[0],
                    linewidth=2.2,
                    solid_capstyle="butt",
                )
            axes.plot([mean], [place], marker="D", color=COLOURS[1], markersize=6)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(label)
        return _svg(figure, f"{title}: differences with 95 % confidence intervals")


def dot_chart(
    title: str, names: Sequence[str], series: Mapping[str, Sequence[float | None]], label: str
) -> str:
    """For each name a line with one mark for each series, in the order of `series`."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(7.4, 1.25 + 0.3 * len(names), title)
        columns = [[np.nan if v is None else v for v in values] for values in series.values()]
        for place, values in enumerate(zip(*columns)):
            if not np.isnan(values).all():
                axes.plot(
                    [np.nanmin(values), np.nanmax(values)],
                    [place, place],
                    color=GRID,
                    linewidth=3,
                    zorder=1,
                )
        for index, (name, values) in enumerate(zip(series, columns)):
            axes.scatter(
                values,
                range(len(names)),
                s=48,
                marker=MARKERS[index % 6],
                color=colour(index),
                label=name,
                zorder=2,
            )
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(label)
        figure.legend(loc="outside lower center", ncols=len(series), frameon=False, fontsize=9.5)
        return _svg(figure, f"{title}: {', '.join(series)}")


def swatch(index: int, kind: str = "line") -> str:
    """A legend's mark: how the line, or the area, of this index looks."""
    if kind == "area":
        return f'<span class="swatch" style="background:{colour(index)}"></span>'
    dashes = {0: "", 1: "7 2", 2: "2 2", 3: "8 2 2 2"}[DASHES.index(dash(index))]
    return (
        '<svg class="swatch" width="30" height="10" aria-hidden="true"><line x1="1" y1="5" '
        'x2="29" y2="5" '
        f'stroke="{colour(index)}" stroke-width="3" stroke-dasharray="{dashes}"/></svg>'
    )


def _panel(title: str):
    """A small figure and its axes under a title, with fixed margins: there are many, and fitting
    them takes time.
    """
    figure = Figure(figsize=(3.7, 2.5))
    axes = figure.add_axes((0.19, 0.2, 0.77, 0.66))
    axes.set_title(title, loc="left", fontweight="bold")
    return figure, axes


def _figure(width: float, height: float, title: str):
    """A figure of so many inches and its axes under a title."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontweight="bold")
    return figure, axes


def _svg(figure: Figure, description: str) -> str:
    """The figure as an <svg> element without fixed size, described for those who do not see it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    opening = text[: text.index(">")]
    plain = re.sub(r' (?:width|height|version|xmlns(?::xlink)?)="[^"]*"', "", opening)
    description = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    width = f"{figure.get_figwidth() * 96:.0f}px"
    text = (
        f'{plain} role="img" aria-label="{description}" style="max-width:{width}"'
        + text[len(opening) :]
    )
    return re.sub(r"\n\s*", "\n", text)
