"""Which edits of a sweep to look at, at which coefficients, and which to keep; no models, no files.

A sweep compares ``theta_0 + c * (sum of some vectors)`` over subsets of vectors and values of c
(arXiv:2212.04089, section 4). A score is larger for a better edit. Ties go to the smaller edit, and
NaN never wins against a number.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from math import isnan

COARSE = 4  # every 4th value of c is tried first
REACH = 2  # how far to go from the best value where nothing has been tried yet

Subset = tuple[str, ...]


def subsets(names: Iterable[str], sizes: Iterable[int]) -> list[Subset]:
    """Return all subsets of the given sizes, each sorted, by size and then by names."""
    ordered = sorted(names)
    return [subset for size in sorted(sizes) for subset in combinations(ordered, size)]


def coarse(values: Sequence[float]) -> list[float]:
    """Return the first of the ascending values, every 4th from it, and the last."""
    return [*values[: len(values) - 1 : COARSE], values[-1]]


def climb(
    values: Sequence[float], start: Sequence[float], score: Callable[[float], float]
) -> dict[float, float]:
    """Return the scores of the values that are tried from some on, until `refined` has no more.

    The best of them has no better neighbour, and is the best of all values if the scores rise to
    one peak and fall from it.

    Args:
        values: of the coefficient, ascending.
        start: what to try first; at least one of the values.
        score: of a value; asked once for each that is tried.
    """
    scores: dict[float, float] = {}
    untried = list(start)
    while untried:
        scores |= {value: score(value) for value in untried}
        untried = refined(values, scores)
    return scores


def refined(values: Sequence[float], scores: Mapping[float, float]) -> list[float]:
    """Return what to try next: the middle of the gaps beside the best value so far.

    Where nothing has been tried on a side, the value two places away. Empty once both neighbours of
    the best value are tried.

    Args:
        values: of the coefficient, ascending.
        scores: of those that were tried, at least one.
    """
    place = values.index(best(scores))
    tried = [i for i, value in enumerate(values) if value in scores]
    below = max((i for i in tried if i < place), default=max(place - 2 * REACH, -1))
    above = min((i for i in tried if i > place), default=min(place + 2 * REACH, len(values)))
    near = {place - (place - below) // 2, place + (above - place) // 2}
    return [values[i] for i in sorted(near - {place})]


def usual_price(values: Sequence[float], start: Sequence[float]) -> int:
    """Return how many values `climb` tries if the best one stays near where it starts."""
    return min(len(values), len(start) + 4)


def best(scores: Mapping[float, float]) -> float:
    """Return the coefficient with the best score; ties go to the smaller, by magnitude first."""
    return min(scores, key=lambda value: (*_falling(scores[value]), abs(value), value))


def going_on(scores: Mapping[Subset, float], keep: int) -> list[Subset]:
    """Return the ``keep`` best subsets and the best of the largest ones, in the order of `subsets`.

    The largest is the sum of all vectors, if that is among them: a screening does not drop it.
    """
    ranked = sorted(scores, key=lambda subset: (*_falling(scores[subset]), len(subset), subset))
    size = max(map(len, scores))
    largest = next(subset for subset in ranked if len(subset) == size)
    return sorted({*ranked[:keep], largest}, key=lambda subset: (len(subset), subset))


def _falling(score: float) -> tuple[bool, float]:
    """Return a key by which larger scores come first and NaN last."""
    return (True, 0.0) if isnan(score) else (False, -score)
