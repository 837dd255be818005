"""How the pages of studies put figures into words and tables."""

import math
from collections.abc import Callable, Mapping, Sequence

from tasks.findings import percent, signed
from tasks.results import figure, markdown_table, over_seeds
from taskvec.spread import averaged
from taskvec.study_pictures import Axis
from taskvec.summaries import Estimate

__all__ = ["figure", "markdown_table"]

PHENOMENON = "the paper's phenomenon"
ACCURACY = Axis("test accuracy, %", 100)
NORMALIZED = Axis("normalised test accuracy, %", 100)

Show = Callable[[float], str]


def judge(statement: str, estimate: Estimate, bound: float = 0.0, *, what: str = PHENOMENON) -> str:
    """Return a sentence whether something shows.

    Args:
        statement: a clause with the figure and its interval; it claims nothing by itself.
        estimate: the figure; ``what`` shows where its whole interval lies above the bound.
        bound: what separates ``what`` from its opposite.
        what: the phenomenon.
    """
    if estimate.low > bound:
        return f"{what[0].upper()}{what[1:]} shows here: {statement}."
    if estimate.high < bound:
        return f"The opposite of {what} shows here: {statement}."
    return f"Nothing is shown here, for the interval does not settle it: {statement}."


def negated(estimate: Estimate) -> Estimate:
    """Return minus the figure, for a claim that something falls."""
    return Estimate(-estimate.value, -estimate.high, -estimate.low)


def told(estimate: Estimate, show: Show = percent, unit: str = "%") -> str:
    """Return ``87.1 % (95 % interval 84.0 to 90.2)``; bounds in the unit of the figure."""
    return f"{show(estimate.value)} {unit} (95 % interval {_bounds(estimate, show)})"


def points(estimate: Estimate) -> str:
    """Return a difference of fractions: ``+3.4 points (95 % interval 1.0 to 5.8)``."""
    return told(estimate, signed, "points")


def correlation(estimate: Estimate) -> str:
    """Return a correlation: ``0.61 (95 % interval 0.31 to 0.80)``."""
    return f"{decimal(estimate.value)} (95 % interval {_bounds(estimate, decimal)})"


def cell(estimates: Sequence[Estimate], show: Show = percent) -> str:
    """Return the mean over seeds with its interval over items, and the range over seeds."""
    text = figure(averaged(estimates), show)
    if len(estimates) == 1:
        return text
    low, high = (show(end(item.value for item in estimates)) for end in (min, max))
    return f"{text} [{low} to {high}]" if low != high else text


def several(values: Sequence[float], show: Show = percent) -> str:
    """Return the mean over seeds with their range, ``85.0 [84.1 to 86.3]``; one figure alone."""
    return (over_seeds(values, show) or [show(values[0])])[0]


def decimal(value: float) -> str:
    """Return a figure without unit, with two decimals: ``0.61``."""
    if not math.isfinite(value):
        return percent(value)
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "\u2212")


def coefficient(values: Sequence[float]) -> str:
    """Return the coefficients of all seeds: ``0.4``, or ``0.4, 0.5, 0.4`` where they differ."""
    texts = [f"{value:g}" for value in values]
    return ", ".join(dict.fromkeys(texts)) if len(set(texts)) == 1 else ", ".join(texts)


def seeds_note(seeds: Sequence[int]) -> str:
    """Return ``Seed 0.`` or ``Means over the seeds 0, 1, 2.``."""
    if len(seeds) == 1:
        return f"Seed {seeds[0]}."
    return f"Means over the seeds {', '.join(map(str, seeds))}."


def columns(rows: Mapping[str, Sequence[str]], header: Sequence[str], left: int = 1) -> str:
    """Return a table whose rows start with their names."""
    return markdown_table(header, [[name, *cells] for name, cells in rows.items()], left)


def _bounds(estimate: Estimate, show: Show) -> str:
    plain = percent if show is signed else show
    return f"{plain(estimate.low)} to {plain(estimate.high)}"
