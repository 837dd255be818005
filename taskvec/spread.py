"""How sure a figure over several units is: means over edits or seeds, correlations over pairs.

The units are what was drawn or chosen: seeds, pairs of tasks, targets. These intervals say how the
figure would move with other units, not with other test items; see `taskvec.summaries` for those.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from taskvec.bootstrap import ENDS, RESAMPLES, SEED
from taskvec.summaries import Estimate

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]

ROUNDING = 1e-12


def mean_of(values: Sequence[float]) -> Estimate:
    """Return the mean of n >= 1 figures with Student's t interval, 95 %, n - 1 degrees of freedom.

    A single figure says nothing of its spread: its interval is unbounded.
    """
    drawn = np.asarray(values, np.float64)
    value, number = float(drawn.mean()), len(drawn)
    if number == 1:
        return Estimate(value, -math.inf, math.inf)
    half = float(stdtrit(number - 1, 0.975) * drawn.std(ddof=1)) / math.sqrt(number)
    return Estimate(value, value - half, value + half)


def averaged(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean of estimates from the same test items, such as those of several seeds.

    The bounds are averaged too: an interval over items does not narrow with the number of seeds.
    """
    value, low, high = (
        math.fsum(getattr(item, name) for item in estimates) / len(estimates)
        for name in ("value", "low", "high")
    )
    return Estimate(value, low, high)


def over_range(values: Sequence[float]) -> Estimate:
    """Return the mean of figures with their range in place of an interval."""
    return Estimate(math.fsum(values) / len(values), min(values), max(values))


def resampled(statistic: Callable[[Places], float], units: int) -> Estimate:
    """Return a statistic with its percentile bootstrap interval, 95 %, over units.

    Args:
        statistic: of the units at the given places, of which some stand several times; NaN where
            it is undefined, and then the resample is left out.
        units: how many there are.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    drawn = np.random.default_rng(SEED).integers(0, units, (RESAMPLES, units))
    values = np.array([statistic(places) for places in drawn])
    known = values[~np.isnan(values)]
    value = statistic(np.arange(units))
    if math.isnan(value) or not len(known):
        return Estimate(math.nan, math.nan, math.nan)
    low, high = np.percentile(known, ENDS)
    return Estimate(value, float(low), float(high))


def pearson(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Return the correlation of two lists of figures; NaN where one of them is constant."""
    left, right = (np.asarray(values, np.float64).ravel() for values in (x, y))
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return math.nan
    left, right = left - left.mean(), right - right.mean()
    norm = math.sqrt(float(left @ left) * float(right @ right))
    return float(left @ right) / norm if norm else math.nan  # 0: squares underflow


def spearman(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Return the rank correlation of two lists of figures; NaN where one of them is constant."""
    return pearson(_ranks(x), _ranks(y))


def mantel(left: Floats, right: Floats) -> float:
    """Return the two-sided p value of the rank correlation of two symmetric matrices (n, n).

    The names of one matrix are permuted, since its pairs share names and are not independent
    (Mantel 1967, Cancer Research 27:209). The diagonals do not count. NaN where one is constant.
    """
    rows, columns = np.triu_indices(len(left), 1)
    here, there = _ranks(left[rows, columns]), np.zeros_like(right)
    there[rows, columns] = there[columns, rows] = _ranks(right[rows, columns])
    found = pearson(here, there[rows, columns])
    if math.isnan(found):
        return math.nan
    generator = np.random.default_rng(SEED)
    as_large = 0
    for _ in range(RESAMPLES):
        order = generator.permutation(len(left))
        other = pearson(here, there[order[rows], order[columns]])
        as_large += abs(other) >= abs(found) - ROUNDING
    return (as_large + 1) / (RESAMPLES + 1)


def _ranks(values: npt.ArrayLike) -> Floats:
    """Return the ranks of figures, from 1; those equal to 12 decimals share the mean of theirs."""
    _, places, counts = np.unique(
        np.round(np.asarray(values, np.float64).ravel(), 12),
        return_inverse=True,
        return_counts=True,
    )
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return ranks
