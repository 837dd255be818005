"""Which candidates of a search are not significantly worse than the chosen one: paired bootstrap.

All candidates have answered the same items, so one resample of the items serves all of them, and
what an item is worth to everybody cancels (Efron and Tibshirani 1993, "An Introduction to the
Bootstrap", chapters 8 and 13; the items of each task are resampled on their own).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from taskvec.search import ROUNDING, Candidate, Goal, feasible, item_scores, sign

Floats = npt.NDArray[np.float64]

RESAMPLES = 2000
SEED = 0
ENDS = (2.5, 97.5)  # percent: the two-sided 95 % interval
BLOCK = 1 << 22  # weights that are in memory at a time: 32 MiB


def not_worse(candidates: Sequence[Candidate], chosen: int, goal: Goal) -> list[bool]:
    """Return which candidates are complete, feasible and not significantly worse than the chosen.

    A candidate is significantly worse if the whole 95 % interval of its gain over the chosen one
    (in the objective) lies below zero. The chosen one itself is not.
    """
    result = [False] * len(candidates)
    rivals = [
        position
        for position, candidate in enumerate(candidates)
        if candidate.complete
        and candidate.known
        and feasible(candidate, goal.constraint, goal.references)
    ]
    _, high = intervals([candidates[position] for position in rivals], candidates[chosen], goal)
    for position, end in zip(rivals, high, strict=True):
        result[position] = bool(end >= -ROUNDING)
    result[chosen] = True
    return result


def intervals(
    candidates: Sequence[Candidate], chosen: Candidate, goal: Goal
) -> tuple[Floats, Floats]:
    """Return the ends of the 95 % percentile intervals of the gains over the chosen candidate.

    Args:
        candidates: C of them, on the same items as the chosen one.
        chosen: the one to compare with.
        goal: of whose objective the gains are.

    Returns:
        (C,) lower ends and (C,) upper ends, in units of the objective; above zero is better.
    """
    gains = np.zeros((RESAMPLES, len(candidates)))
    if not candidates:
        return gains[:0].sum(axis=0), gains[:0].sum(axis=0)
    generator = np.random.default_rng(SEED)
    for task in sorted(goal.objective.tasks):
        own, *others = (
            item_scores(item.answers[task], task, goal.objective, goal.references)
            for item in (chosen, *candidates)
        )
        differences = sign(goal.objective) * (np.stack(others, axis=1) - own[:, None])  # (n, C)
        gains += resampled_means(differences, generator)
    low, high = np.percentile(gains, ENDS, axis=0)
    return low, high


def resampled_means(values: Floats, generator: np.random.Generator) -> Floats:
    """Return the means of values over resamples of their n items, (RESAMPLES, C).

    Args:
        values: (n, C).
        generator: draws n items with replacement for each resample.
    """
    number = len(values)
    rows = max(1, BLOCK // number)
    found = []
    for start in range(0, RESAMPLES, rows):
        count = min(rows, RESAMPLES - start)
        drawn = generator.integers(0, number, (count, number))
        drawn += number * np.arange(count)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=count * number).reshape(count, number)
        found.append(weights.astype(np.float64) @ values / number)
    return np.concatenate(found)
