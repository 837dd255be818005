"""The figures of the report: pure functions from data to SVG text, the same bytes every time.

Each returns one ``<svg>`` element to stand inside an HTML page: no size of its own, an accessible
label, text as text, ids that no other figure has, nothing that is fetched. Accuracies come in as
fractions and are drawn in percent, losses in nats.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from taskvec.summaries import Estimate

# Okabe and Ito's colours, without the yellow that is too light on white; told apart by line style
# and a label at the end of the line as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#6A51A3")
# The same hues, dark enough for text on white (contrast above 4.5).
TEXT_COLOURS = ("#0072B2", "#A84600", "#00734F", "#A0457A", "#1F6F9E", "#8A5C00", "#6A51A3")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.4, 1.2)), (0, (6, 1.4, 1.4, 1.4)))
INK = "#1d2430"
FAINT = "#5c6675"
GRID = "#e3e6eb"
ACCENT = "#0072B2"
SHADE = "#f3e1d6"

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "taskvec",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": "#aab2bd",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "hatch.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Bar:
    """A bar of `bars`: its label, its figure, and whether it is a reference and no edit."""

    label: str
    estimate: Estimate
    reference: bool = False


@dataclass(frozen=True)
class Node:
    """A stage in `graph`: its name, its column and what is written on it."""

    name: str
    label: str
    column: int


@dataclass(frozen=True)
class Quantity:
    """What the objective of a search is measured in.

    Attributes:
        column: the columns of a search's table that hold it for each task.
        factor: from the table to the figure.
        unit: in the figure.
    """

    column: str
    factor: float
    unit: str


PERCENT = Quantity("accuracy", 100.0, "%")
NATS = Quantity("loss", 1.0, "nats")


def curves(
    table: pd.DataFrame,
    coefficient: str,
    objective: str,
    quantity: Quantity,
    tasks: Sequence[str],
    ident: str,
    label: str,
) -> str:
    """Draw accuracy or loss against one coefficient: the tasks, the objective, the chosen point.

    Args:
        table: one search, as the schema ``Search`` has it.
        coefficient: the name of the only coefficient.
        objective: what the objective is called in the figure.
        quantity: what it is measured in.
        tasks: all tasks; the place here decides a task's colour, the same in every figure.
        ident: prefix of the ids in the figure; unique in the page.
        label: what the figure shows, for those who cannot see it.
    """
    table = table.sort_values(f"coefficient.{coefficient}", kind="stable")
    x = table[f"coefficient.{coefficient}"].to_numpy(dtype=float)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _shade(axes, x, ~table["feasible"].to_numpy(dtype=bool))
        lines = _curve_lines(table, objective, quantity, tasks)
        for name, y, style in lines:
            axes.plot(x, y, marker="o" if len(x) == 1 else None, label=name, **style)
        chosen = table[table["chosen"]].iloc[0]
        at = float(chosen[f"coefficient.{coefficient}"])
        axes.axvline(at, color=INK, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        for name, y, style in lines:
            size = 6 if name == lines[-1][0] else 4
            height = y[np.flatnonzero(x == at)[0]]
            axes.plot([at], [height], "o", markersize=size, color=style["color"], mec="white")
        axes.annotate(
            f"{coefficient} = {at:g}", (at, 1), xycoords=("data", "axes fraction"),
            xytext=(0, 3), textcoords="offset points", ha="center", weight="bold", fontsize=8.5,
        )  # fmt: skip
        axes.set_xlabel(f"coefficient {coefficient}")
        axes.set_ylabel(f"validation, {quantity.unit}")
        axes.yaxis.set_major_locator(MaxNLocator(5))
        _end_labels(axes, [(name, float(y[-1]), style["color"]) for name, y, style in lines])

    return to_svg(draw, (5.4, 2.9), ident, label)


def surface(
    table: pd.DataFrame,
    coefficients: tuple[str, str],
    objective: str,
    quantity: Quantity,
    ident: str,
    label: str,
) -> str:
    """Draw the objective over two coefficients as a map, the chosen point ringed.

    Args:
        table: one search, as the schema ``Search`` has it: a full grid.
        coefficients: the names for the horizontal and the vertical axis.
        objective: what the colour stands for.
        quantity: what it is measured in.
        ident: prefix of the ids in the figure; unique in the page.
        label: what the figure shows, for those who cannot see it.
    """
    columns = [f"coefficient.{name}" for name in coefficients]
    grid = table.pivot(index=columns[1], columns=columns[0], values="objective").sort_index(axis=1)
    feasible = table.pivot(index=columns[1], columns=columns[0], values="feasible")
    x, y = grid.columns.to_numpy(dtype=float), grid.index.to_numpy(dtype=float)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(visible=False)
        mesh = axes.pcolormesh(
            _borders(x), _borders(y), quantity.factor * grid.to_numpy(), cmap="cividis",
            edgecolors="white", linewidth=0.3,
        )  # fmt: skip
        broken = np.ma.masked_where(feasible.to_numpy(dtype=bool), np.ones(grid.shape))
        if broken.count():
            axes.pcolor(
                _borders(x), _borders(y), broken, alpha=0.0, hatch="////", edgecolor="white"
            )
        chosen = table[table["chosen"]].iloc[0]
        at = (float(chosen[columns[0]]), float(chosen[columns[1]]))
        axes.plot(*at, "o", markersize=11, mfc="none", mec="black", mew=3.4)
        axes.plot(*at, "o", markersize=11, mfc="none", mec="white", mew=1.8)
        axes.set_xlabel(f"coefficient {coefficients[0]}")
        axes.set_ylabel(f"coefficient {coefficients[1]}")
        place = ", ".join(f"{n} = {v:g}" for n, v in zip(coefficients, at, strict=True))
        axes.set_title(place, fontsize=8.5, loc="center")
        bar = figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.02)
        bar.set_label(f"{objective}, validation, {quantity.unit}")
        bar.outline.set_visible(False)

    return to_svg(draw, (5.4, 2.9), ident, label)


def profiles(
    table: pd.DataFrame,
    coefficients: Sequence[str],
    quantity: Quantity,
    *,
    largest: bool,
    ident: str,
    label: str,
) -> str:
    """Draw the best objective that each value of each coefficient reaches, three or more of them.

    Args:
        table: one search, as the schema ``Search`` has it.
        coefficients: the names, one panel each.
        quantity: what the objective is measured in.
        largest: the best objective is the largest.
        ident: prefix of the ids in the figure; unique in the page.
        label: what the figure shows, for those who cannot see it.
    """
    allowed = table[table["feasible"]] if table["feasible"].any() else table

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(coefficients), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, coefficients, strict=True):
            groups = allowed.groupby(f"coefficient.{name}")["objective"]
            best = groups.max() if largest else groups.min()
            axes.plot(
                best.index, quantity.factor * best.to_numpy(), "o-", color=ACCENT, markersize=2.5
            )
            at = float(table[table["chosen"]].iloc[0][f"coefficient.{name}"])
            axes.axvline(at, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
            axes.set_title(f"{name} = {at:g}", fontsize=8.5)
            axes.set_xlabel(f"coefficient {name}")
        panels[0].set_ylabel(f"best objective, validation, {quantity.unit}")

    return to_svg(draw, (5.4, 2.9), ident, label)


def heat_map(cosines: pd.DataFrame, ident: str, label: str) -> str:
    """Draw a symmetric matrix of cosines with its numbers; the diagonal stays out of the scale.

    Args:
        cosines: names as index and columns.
        ident: prefix of the ids in the figure; unique in the page.
        label: what the figure shows, for those who cannot see it.
    """
    names = [str(name) for name in cosines.index]
    n = len(names)
    values = cosines.to_numpy(dtype=float).copy()
    shown = np.ma.masked_where(np.eye(n, dtype=bool), values)
    limit = 1.35 * max(0.05, float(np.abs(shown).max()) if n > 1 else 0.0)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(visible=False)
        axes.set_aspect("equal")
        edges = np.arange(n + 1) - 0.5
        mesh = axes.pcolormesh(
            edges, edges, shown, cmap="RdBu_r", vmin=-limit, vmax=limit,
            edgecolors="white", linewidth=1.5,
        )  # fmt: skip
        for i in range(n):
            for j in range(n):
                strong = i != j and abs(values[i, j]) > 0.6 * limit
                colour = "#9aa3af" if i == j else "white" if strong else INK
                text = (
                    "1" if i == j else f"{round(values[i, j], 2) + 0.0:.2f}".replace("-", "\u2212")
                )
                axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=8.5)
        axes.invert_yaxis()
        axes.set_xticks(range(n), names, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(n), names)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(mesh, ax=axes, fraction=0.04, pad=0.02, shrink=0.8)
        bar.set_label("cosine")
        bar.outline.set_visible(False)

    side = max(3.0, 0.52 * n)
    return to_svg(draw, (side + 2.0, side + 0.6), ident, label)


def layer_map(cosines: pd.DataFrame, ident: str, label: str) -> str:
    """Draw the cosine of every pair of vectors in every layer.

    Args:
        cosines: layers as index, pairs as columns.
        ident: prefix of the ids in the figure; unique in the page.
        label: what the figure shows, for those who cannot see it.
    """
    values = cosines.to_numpy(dtype=float).T
    limit = max(0.05, float(np.abs(values).max(initial=0.0)))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(visible=False)
        mesh = axes.pcolormesh(
            np.arange(values.shape[1] + 1) - 0.5, np.arange(values.shape[0] + 1) - 0.5, values,
            cmap="RdBu_r", vmin=-limit, vmax=limit, edgecolors="white", linewidth=0.5,
        )  # fmt: skip
        axes.invert_yaxis()
        ticks = [str(name).removeprefix("layer ") for name in cosines.index]
        axes.set_xticks(range(len(ticks)), ticks, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(values.shape[0]), [str(name) for name in cosines.columns])
        axes.set_xlabel("layer")
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(mesh, ax=axes, fraction=0.04, pad=0.02)
        bar.set_label("cosine")
        bar.outline.set_visible(False)

    return to_svg(draw, (2.8 + 0.4 * values.shape[1], 1.2 + 0.24 * values.shape[0]), ident, label)


def bars(rows: Sequence[Bar], ident: str, label: str) -> str:
    """Draw accuracies as horizontal bars with their 95 % intervals, first row on top.

    Args:
        rows: what to draw, in this order.
        ident: prefix of the ids in the figure; unique in the page.
        label: what the figure shows, for those who cannot see it.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(visible=False, axis="y")
        for y, row in enumerate(rows):
            value, low, high = (100 * v for v in bounds(row.estimate))
            colour = "#b4bcc8" if row.reference else ACCENT
            axes.barh(y, value, height=0.62, color=colour)
            axes.errorbar(
                value, y, xerr=[[value - low], [high - value]],
                color=INK, linewidth=1.1, capsize=2.5, capthick=1.1,
            )  # fmt: skip
            axes.annotate(
                f"{value:.1f}", (high, y), xytext=(5, 0), textcoords="offset points",
                va="center", weight="normal" if row.reference else "bold",
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.tick_params(axis="y", labelcolor=INK, labelsize=8.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 100 * max(1.0, *(bounds(row.estimate)[2] for row in rows)) + 7)
        axes.set_xticks(range(0, 101, 20))
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("test accuracy, %")

    return to_svg(draw, (6.8, 0.62 + 0.29 * len(rows)), ident, label)


def losses(tables: Mapping[str, pd.DataFrame], ident: str, label: str) -> str:
    """Draw the fine-tuning loss of every task, one panel each on common axes.

    Args:
        tables: task -> curve, as the schema ``Training`` has it.
        ident: prefix of the ids in the figure; unique in the page.
        label: what the figure shows, for those who cannot see it.
    """
    across = min(4, len(tables))
    down = math.ceil(len(tables) / across)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        for axes in panels.flat[len(tables) :]:
            axes.set_visible(False)
        for position, (axes, (task, table)) in enumerate(
            zip(panels.flat, tables.items(), strict=False)
        ):
            table = table.sort_values("step")
            steps, loss = table["step"].to_numpy(), table["loss"]
            window = max(1, len(loss) // 8)
            smooth = loss.rolling(window, center=True, min_periods=1).mean()
            axes.plot(steps, loss.to_numpy(), color="#b9c4d2", linewidth=0.8)
            axes.plot(steps, smooth.to_numpy(), color=ACCENT, linewidth=1.8)
            axes.set_title(task, fontsize=9, pad=3)
            axes.set_ylim(bottom=0)
            axes.tick_params(labelbottom=position + across >= len(tables))
            if position + across >= len(tables):
                axes.set_xlabel("step")
        figure.supylabel("cross-entropy, nats", fontsize=8.5, color=FAINT)

    return to_svg(draw, (2.1 * across + 0.4, 1.55 * down + 0.35), ident, label)


def graph(
    headings: Sequence[str],
    nodes: Sequence[Node],
    edges: Sequence[tuple[str, str]],
    ident: str,
    label: str,
) -> str:
    """Draw the stage graph: a column a kind of stage, a box an item, light curves between them.

    Args:
        headings: what stands above each column.
        nodes: the stages; nodes of one column are ordered to keep edges short.
        edges: (producer, consumer) by name; edges to unknown names are left out.
        ident: prefix of the ids in the figure; unique in the page.
        label: what the figure shows, for those who cannot see it.
    """
    across, height, row, gap, top = 5.9, 20, 25, 28, 34
    stacks = _untangle([[n for n in nodes if n.column == c] for c in range(len(headings))], edges)
    widths = [
        across * max([len(heading), *(len(node.label) for node in stack)]) + 12
        for heading, stack in zip(headings, stacks, strict=True)
    ]
    tallest = max(len(stack) for stack in stacks)
    total_height = top + tallest * row + 6
    places: dict[str, tuple[float, float, float]] = {}
    boxes, titles, left = [], [], 4.0
    for heading, stack, width in zip(headings, stacks, widths, strict=True):
        titles.append(
            f'<text x="{left + width / 2:.1f}" y="16" text-anchor="middle" font-weight="bold"'
            f' fill="{INK}">{escape(heading)}</text>'
        )
        y = top + (tallest - len(stack)) * row / 2
        for node in stack:
            places[node.name] = (left, left + width, y + height / 2)
            boxes.append(
                f"<g><title>{escape(node.name)}</title>"
                f'<rect x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" rx="4"'
                f' fill="#eef4f9" stroke="#8fb3cf"/><text x="{left + width / 2:.1f}"'
                f' y="{y + 14:.1f}" text-anchor="middle" fill="{INK}">{escape(node.label)}</text>'
                "</g>"
            )
            y += row
        left += width + gap
    lines = []
    for producer, consumer in edges:
        if producer in places and consumer in places:
            (_, x0, y0), (x1, _, y1) = places[producer], places[consumer]
            bend = max(12.0, (x1 - x0) / 2)
            lines.append(
                f'<path d="M{x0:.1f} {y0:.1f}C{x0 + bend:.1f} {y0:.1f} {x1 - bend:.1f} {y1:.1f}'
                f' {x1:.1f} {y1:.1f}"/>'
            )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left - gap + 4:.0f}'
        f' {total_height:.0f}" role="img" aria-label={quoteattr(label)} id="{ident}"'
        f' font-size="11"><g fill="none" stroke="#9aa7b8" stroke-opacity="0.5">'
        f"{''.join(lines)}</g>{''.join(titles)}{''.join(boxes)}</svg>"
    )


def _untangle(stacks: list[list[Node]], edges: Sequence[tuple[str, str]]) -> list[list[Node]]:
    """Order each column by the mean height of its neighbours, a few sweeps to and fro."""
    near: dict[str, list[str]] = {node.name: [] for stack in stacks for node in stack}
    for producer, consumer in edges:
        if producer in near and consumer in near:
            near[producer].append(consumer)
            near[consumer].append(producer)
    stacks = [list(stack) for stack in stacks]
    height = {n.name: (i + 0.5) / len(s) for s in stacks for i, n in enumerate(s)}
    for sweep in range(6):
        for stack in stacks if sweep % 2 == 0 else stacks[::-1]:
            pull = {
                node.name: float(np.mean([height[o] for o in near[node.name]] or [0.5]))
                for node in stack
            }
            stack.sort(key=lambda node, pull=pull: (round(pull[node.name], 6), node.name))  # type: ignore[misc]
            height |= {node.name: (i + 0.5) / len(stack) for i, node in enumerate(stack)}
    return stacks


def _curve_lines(
    table: pd.DataFrame, objective: str, quantity: Quantity, tasks: Sequence[str]
) -> list[tuple[str, Any, dict[str, Any]]]:
    """Return (name, heights, style) of every curve; the objective comes last, on top."""
    shown = [task for task in tasks if f"{quantity.column}.{task}" in table]
    target = quantity.factor * table["objective"].to_numpy(dtype=float)
    lines: list[tuple[str, Any, dict[str, Any]]] = []
    for task in shown:
        position = list(tasks).index(task)
        y = quantity.factor * table[f"{quantity.column}.{task}"].to_numpy(dtype=float)
        if np.allclose(y, target):
            objective = task  # with one task the two are the same curve
            continue
        style = {
            "color": COLOURS[position % len(COLOURS)],
            "linestyle": DASHES[position % len(DASHES)],
        }
        lines.append((task, y, style))
    return [*lines, (objective, target, {"color": INK, "linewidth": 2.6, "zorder": 3})]


def _shade(axes: Axes, x: Any, broken: Any) -> None:
    """Shade where the constraint is broken, half-way to the next point that keeps it."""
    if not broken.any():
        return
    borders = _borders(x)
    for i in np.flatnonzero(broken):
        axes.axvspan(borders[i], borders[i + 1], color=SHADE, linewidth=0, zorder=0)
    axes.set_xlim(borders[0], borders[-1])


def _borders(centres: Any) -> Any:
    """Return the n + 1 borders of cells around n ascending centres."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    inner = (centres[1:] + centres[:-1]) / 2
    return np.array([2 * centres[0] - inner[0], *inner, 2 * centres[-1] - inner[-1]])


def _end_labels(axes: Axes, ends: list[tuple[str, float, str]]) -> None:
    """Write each curve's name behind its end, pushed apart so that none covers another."""
    low, high = axes.get_ylim()
    need = (high - low) * 0.062
    ordered = sorted(range(len(ends)), key=lambda i: (ends[i][1], i))
    heights: list[float] = []
    for i in ordered:
        heights.append(max(ends[i][1], heights[-1] + need) if heights else ends[i][1])
    # Centre the pushed labels on the ends, but keep the topmost inside the axes.
    slip = sum(h - ends[i][1] for h, i in zip(heights, ordered, strict=True)) / len(ends)
    slip = max(slip, heights[-1] - high)
    for h, i in zip(heights, ordered, strict=True):
        name, _, colour = ends[i]
        dark = dict(zip(COLOURS, TEXT_COLOURS, strict=True)).get(colour, colour)
        axes.annotate(
            name, (1, h - slip), xycoords=("axes fraction", "data"), xytext=(5, 0),
            textcoords="offset points", va="center", color=dark, annotation_clip=False,
            weight="bold" if colour == INK else "normal", fontsize=8.5,
        )  # fmt: skip


def bounds(estimate: Estimate) -> tuple[float, float, float]:
    """Return value, lower and upper bound; rounding never puts the value outside."""
    return estimate.value, min(estimate.low, estimate.value), max(estimate.high, estimate.value)


def to_svg(
    draw: Callable[[Figure], None], size: tuple[float, float], ident: str, label: str
) -> str:
    """Return what ``draw`` puts on a figure of a size in inches, as one clean ``<svg>`` element."""
    buffer = io.StringIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # nobody's matplotlibrc changes the bytes
        matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", metadata=nothing)
    return _clean(buffer.getvalue(), ident, label)


def _clean(svg: str, ident: str, label: str) -> str:
    """Return matplotlib's SVG without prologue, size and unused ids, others prefixed."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(
        r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.S
    )
    svg = svg.replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{ident}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{ident}-", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box, "matplotlib writes a viewBox"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {box[0]} role="img" id="{ident}"'
        f' aria-label={quoteattr(label)} stroke-linejoin="round">'
    )
    return re.sub(r"\n\s*", "\n", head + svg[svg.index(">") + 1 :])
