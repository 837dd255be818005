"""The figures of studies: lines with bands, dots with intervals, matrices, scatter plots.

In the style of `taskvec.pictures`, and like these one ``<svg>`` element, the same bytes every time.
Series are told apart by colour, marker and line style.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from xml.sax.saxutils import escape, unescape

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from taskvec.pictures import COLOURS, DASHES, FAINT, INK, bounds, to_svg
from taskvec.summaries import Estimate

MARKERS = ("o", "s", "D", "^", "v", "P", "X")
PIXELS = 4 / 3  # a point
FONTS = "'DejaVu Sans', Verdana, sans-serif"  # Verdana has the same widths


@dataclass(frozen=True)
class Axis:
    """An axis: its title with the unit, what figures are multiplied with, how it is divided.

    ``even`` sets the values side by side at equal distances: 0, 1, 2, 4, 8.
    """

    title: str
    factor: float = 1.0
    scale: Literal["linear", "log", "even"] = "linear"


@dataclass(frozen=True)
class Line:
    """Figures over x, with a band between their bounds; without a line if they are not joined."""

    x: Sequence[float]
    y: Sequence[Estimate]
    joined: bool = True


@dataclass(frozen=True)
class Cloud:
    """Points of a scatter plot; those with a name carry it as a label."""

    x: Sequence[float]
    y: Sequence[float]
    names: Sequence[str] = ()


def lines(
    panels: Mapping[str, Mapping[str, Line]],
    across: Axis,
    up: Axis,
    ident: str,
    label: str,
    *,
    marks: Mapping[str, float] | None = None,
) -> str:
    """Draw series of figures, a panel each group, on common axes.

    Args:
        panels: title -> name -> line; a single panel may have an empty title. A series has the same
            colour in all panels.
        across: the horizontal axis.
        up: the vertical axis.
        ident: prefix of the ids in the figure; unique in the page.
        label: what the figure shows, for those who cannot see it.
        marks: name -> where a horizontal line stands.
    """
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    ticks = sorted({x for panel in panels.values() for line in panel.values() for x in line.x})

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (title, panel) in zip(grid.flat, panels.items(), strict=False):
            axes.set_title(title, fontsize=9, pad=3)
            for name, line in panel.items():
                _line(axes, names.index(name), line, ticks, across, up)
            for name, value in (marks or {}).items():
                axes.axhline(up.factor * value, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
                axes.annotate(
                    name, (1, up.factor * value), xycoords=("axes fraction", "data"),
                    xytext=(4, 0), textcoords="offset points", va="center", fontsize=8,
                    annotation_clip=False,
                )  # fmt: skip
        for place, axes in enumerate(grid.flat[: len(panels)]):
            axes.tick_params(labelbottom=place + columns >= len(panels))
        _divide(grid[0, 0], ticks, across)
        figure.supxlabel(across.title, fontsize=8.5, color=FAINT)
        figure.supylabel(up.title, fontsize=8.5, color=FAINT)
        _legend(figure, names)

    size = (5.8, 3.2) if len(panels) == 1 else (2.25 * columns + 0.5, 1.8 * rows + 0.8)
    return to_svg(draw, size, ident, label)


def dots(
    rows: Sequence[str],
    series: Mapping[str, Sequence[Estimate | None]],
    axis: Axis,
    ident: str,
    label: str,
    *,
    marks: Mapping[str, float] | None = None,
) -> str:
    """Draw a row of figures with their 95 % intervals for each subject, first row on top.

    Args:
        rows: the subjects.
        series: name -> a figure for each row, or None.
        axis: the horizontal axis.
        ident: prefix of the ids in the figure; unique in the page.
        label: what the figure shows, for those who cannot see it.
        marks: name -> where a vertical line stands.
    """
    step = 0.72 / len(series)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(visible=False, axis="y")
        for place in range(1, len(rows)):
            if len(series) > 1:
                axes.axhline(place - 0.5, color="#e3e6eb", linewidth=0.7, zorder=0)
        for number, figures in enumerate(series.values()):
            shift = step * (number - (len(series) - 1) / 2)
            for place, estimate in enumerate(figures):
                if estimate is not None:
                    _dot(axes, number, place + shift, estimate, axis)
        for name, value in (marks or {}).items():
            at = axis.factor * value
            axes.axvline(at, color=INK, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
            axes.annotate(
                name, (at, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
                textcoords="offset points", ha="center", fontsize=8, color=INK,
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), list(rows))
        axes.tick_params(axis="y", labelcolor=INK, labelsize=8.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(axis.title)
        axes.spines["left"].set_visible(False)
        _legend(figure, list(series))

    height = max(0.22, 0.105 * len(series) + 0.06) * len(rows)
    return to_svg(draw, (6.8, 0.9 + height), ident, label)


def matrix(
    table: pd.DataFrame, up: str, axis: Axis, ident: str, label: str, *, middle: float = 0.0
) -> str:
    """Draw a matrix of figures with its numbers; white is in the middle, NaN stays empty.

    Where rows and columns have the same names the diagonal stays out of the scale.

    Args:
        table: fractions or other figures; the index names the rows.
        up: what the rows are.
        axis: its title says what the columns are, its factor what figures are multiplied with.
        ident: prefix of the ids in the figure; unique in the page.
        label: what the figure shows, for those who cannot see it.
        middle: the figure that is white.
    """
    values = axis.factor * table.to_numpy(dtype=float)
    height, width = values.shape
    centre = axis.factor * middle
    scaled = np.abs(values - centre)
    if list(table.index) == list(table.columns):
        np.fill_diagonal(scaled, np.nan)
    limit = 1.35 * max(1e-9, float(np.nanmax(scaled, initial=0.0)))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(visible=False)
        mesh = axes.pcolormesh(
            np.arange(width + 1) - 0.5, np.arange(height + 1) - 0.5,
            np.ma.masked_invalid(values), cmap="RdBu_r",
            vmin=centre - limit, vmax=centre + limit, edgecolors="white", linewidth=1.5,
        )  # fmt: skip
        for i, j in np.ndindex(height, width):
            if np.isnan(values[i, j]):
                continue
            strong = abs(values[i, j] - centre) > 0.6 * limit
            text = f"{round(float(values[i, j]), 1) + 0.0:.1f}".replace("-", "\u2212")
            axes.text(
                j, i, text, ha="center", va="center", fontsize=8, color="white" if strong else INK
            )
        axes.invert_yaxis()
        names = [str(name) for name in table.columns]
        axes.set_xticks(range(width), names, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(height), [str(name) for name in table.index])
        axes.set_ylabel(up)
        axes.set_xlabel(axis.title)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(mesh, ax=axes, fraction=0.04, pad=0.02, shrink=0.8)
        bar.outline.set_visible(False)

    return to_svg(draw, (2.0 + 0.52 * width, 1.2 + 0.44 * height), ident, label)


def scatter(
    series: Mapping[str, Cloud],
    across: Axis,
    up: Axis,
    ident: str,
    label: str,
    *,
    guide: Literal["none", "diagonal"] = "none",
) -> str:
    """Draw points of several series; a diagonal is where both axes agree.

    Args:
        series: name -> points.
        across: the horizontal axis.
        up: the vertical axis.
        ident: prefix of the ids in the figure; unique in the page.
        label: what the figure shows, for those who cannot see it.
        guide: what to draw beside the points.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, cloud in enumerate(series.values()):
            x, y = across.factor * np.asarray(cloud.x), up.factor * np.asarray(cloud.y)
            axes.plot(x, y, linestyle="none", **_marker(number), alpha=0.85)
            for name, at, height in zip(cloud.names, x, y, strict=False):
                axes.annotate(
                    name, (at, height), xytext=(4, 3), textcoords="offset points", fontsize=7.5
                )
        if guide == "diagonal":
            axes.axline((axes.get_xlim()[0],) * 2, slope=1, color=FAINT, linewidth=0.9, zorder=0)
        axes.margins(0.12)
        axes.set_xlabel(across.title)
        axes.set_ylabel(up.title)
        _legend(figure, list(series))

    return to_svg(draw, (5.4, 3.6), ident, label)


def standalone(svg: str) -> str:
    """Return a figure as a file of its own: with a size, a title, a white ground, and fonts."""
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    label = re.search(r'aria-label=(?:"([^"]*)"|\'([^\']*)\')', svg)
    assert box and label, "every figure has a viewBox and a label"
    width, height = (round(PIXELS * float(side)) for side in box.groups())
    title = escape(unescape(label[1] or label[2] or "", {"&quot;": '"'}))
    head, body = svg.split(">", 1)
    ground = '<rect width="100%" height="100%" fill="white"/>'
    sized = f'{head} width="{width}" height="{height}"><title>{title}</title>{ground}'
    return sized + body.replace("'DejaVu Sans'", FONTS) + "\n"


def _marker(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 5,
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
    }


def _legend(figure: Figure, names: Sequence[str]) -> None:
    """Name the series above the figure; one alone needs no name."""
    if len(names) < 2:
        return
    from matplotlib.lines import Line2D

    fitting = max(1, int(72 * figure.get_figwidth() / (5.3 * max(map(len, names)) + 24)))
    keys = [Line2D([], [], linestyle="none", **_marker(number)) for number in range(len(names))]
    figure.legend(
        keys, list(names), loc="outside upper left", ncols=min(len(names), fitting), frameon=False,
        handletextpad=0.2, columnspacing=1.2,
    )  # fmt: skip


def _line(
    axes: Axes, number: int, line: Line, ticks: Sequence[float], across: Axis, up: Axis
) -> None:
    places = [
        float(ticks.index(x)) if across.scale == "even" else across.factor * x for x in line.x
    ]
    middle, low, high = (
        up.factor * np.array(values) for values in zip(*map(bounds, line.y), strict=True)
    )
    dash = DASHES[number % len(DASHES)]
    if line.joined:
        axes.plot(places, middle, linestyle=dash, **_marker(number))
    else:
        size = 8 if len(places) == 1 else 3.5
        axes.plot(places, middle, linestyle="none", **{**_marker(number), "markersize": size})
    if line.joined and np.isfinite([low, high]).all():
        axes.fill_between(
            places, low, high, color=COLOURS[number % len(COLOURS)], alpha=0.16, linewidth=0
        )


def _divide(axes: Axes, ticks: Sequence[float], across: Axis) -> None:
    """Set the ticks of the horizontal axis, which all panels share."""
    if across.scale == "even":
        axes.set_xticks(range(len(ticks)), [f"{tick:g}" for tick in ticks])
    if across.scale == "log":
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator([across.factor * tick for tick in ticks]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")


def _dot(axes: Axes, number: int, height: float, estimate: Estimate, axis: Axis) -> None:
    value, low, high = (axis.factor * bound for bound in bounds(estimate))
    if np.isfinite([low, high]).all():
        axes.plot(
            [low, high], [height, height], color=COLOURS[number % len(COLOURS)], linewidth=1.2
        )
    axes.plot([value], [height], linestyle="none", **_marker(number))
