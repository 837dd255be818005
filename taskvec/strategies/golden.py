"""Golden-section search for one coefficient (Kiefer 1953), with a bisection for the constraint."""

from collections.abc import Callable
from math import sqrt
from typing import Literal

from taskvec.options import Fraction
from taskvec.search import Candidate, Problem
from taskvec.strategies.single import only, sides

SHRINK = (sqrt(5) - 1) / 2
CONTINUOUS = True  # the points of a range mean nothing to it: see `taskvec.params`


def golden(
    problem: Problem,
    *,
    guide: Literal["loss", "objective"] = "loss",
    tolerance: Fraction = 0.05,
) -> None:
    """Shrink the range around the optimum by a factor of 0.618 an evaluation.

    With a constraint, the part of the range that keeps it is found first, by bisection from the
    smallest edit outwards; it is assumed to be an interval that holds the smallest edit. With
    ``select: largest`` its end is the result.

    Args:
        problem: one coefficient; its values may lie between those of the grid.
        guide: "loss" follows the cross-entropy, which is smooth in the coefficient; "objective" the
            objective itself. Both assume a single optimum.
        tolerance: the share of the range down to which an optimum or an end is found.
    """
    name, allowed = only("golden", problem)
    width = tolerance * (allowed.high - allowed.low)
    score = problem.smooth if guide == "loss" else problem.gain
    for choice in problem.choices:

        def at(value: float, choice: object = choice) -> Candidate:
            return problem.evaluate({name: value}, choice)  # type: ignore[arg-type]

        if allowed.low == allowed.high:
            at(allowed.low)
            continue
        low, high = allowed.low, allowed.high
        if problem.goal.constraint:
            ends = [_feasible_end(problem, at, *side, width) for side in sides(allowed)]
            near = sides(allowed)[0][0]
            low, high = min([near, *ends]), max([near, *ends])
        if problem.goal.select != "largest":
            _section(lambda value: score(at(value)), low, high, width)


def _feasible_end(
    problem: Problem, at: Callable[[float], Candidate], near: float, far: float, width: float
) -> float:
    """Return the outermost value found that keeps the constraint, or ``near`` if none does."""
    if problem.slack(at(far)) >= 0:
        return far
    if problem.slack(at(near)) < 0:
        return near
    while abs(far - near) > width:
        middle = (near + far) / 2
        if problem.slack(at(middle)) >= 0:
            near = middle
        else:
            far = middle
    return near


def _section(score: Callable[[float], float], low: float, high: float, width: float) -> None:
    left, right = high - SHRINK * (high - low), low + SHRINK * (high - low)
    while high - low > width:
        if score(left) >= score(right):
            high, right = right, left
            left = high - SHRINK * (high - low)
        else:
            low, left = left, right
            right = low + SHRINK * (high - low)
