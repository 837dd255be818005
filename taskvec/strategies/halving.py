"""Successive halving over the grid: everybody is asked a little, the promising ones more.

The subsets are nested and the same for all, so that differences are paired (the race of Maron and
Moore 1994, "Hoeffding races"; the doubling of Jamieson and Talwalkar 2016, arXiv:1502.07943).
"""

from math import sqrt

from taskvec.options import Positive
from taskvec.search import (
    ROUNDING,
    Candidate,
    Choice,
    Coefficients,
    Problem,
    bound,
    combinations,
    paired_difference,
)


def halving(problem: Problem, *, z: Positive = 2.0) -> None:
    """Ask all points on one chunk of each task, the rest of them on two, four and so on.

    A point is dropped only when the data say so: the upper confidence bound on its paired
    difference to the leader is below zero, or that on its distance to the constraint is. The leader
    is the best of those that keep the constraint for certain.

    Args:
        problem: any number of coefficients; only points of the grid are tried.
        z: the bounds are z standard errors away.
    """
    points: list[tuple[Coefficients, Choice]] = [
        (coefficients, choice)
        for choice in problem.choices
        for coefficients in combinations(problem.ranges)
    ]
    most, chunks = max(problem.chunks.values()), 1
    while True:
        asked = [problem.evaluate(*point, chunks) for point in points]
        if chunks >= most:
            return
        kept = _kept(problem, asked, z)
        points = [(candidate.coefficients, candidate.choice) for candidate in kept]
        chunks = most if len(points) == 1 else min(2 * chunks, most)


def _kept(problem: Problem, asked: list[Candidate], z: float) -> list[Candidate]:
    possible = [candidate for candidate in asked if _slack(problem, candidate, z)[1] >= 0]
    certain = [candidate for candidate in possible if _slack(problem, candidate, z)[0] >= 0]
    if not possible or not certain:
        return possible or [problem.chosen(asked)]
    leader = problem.chosen(certain)
    if problem.goal.select == "largest":
        return [candidate for candidate in possible if _size(candidate) >= _size(leader)]
    kept = []
    for candidate in possible:
        mean, error = paired_difference(candidate, leader, problem.goal)
        if candidate is leader or mean + z * error >= 0:
            kept.append(candidate)
    return kept


def _slack(problem: Problem, candidate: Candidate, z: float) -> tuple[float, float]:
    """Return confidence bounds on the distance to the constraint, in units of its metric."""
    goal, low, high = problem.goal, float("inf"), float("inf")
    for task in goal.constraint.tasks if goal.constraint else ():
        assert goal.constraint is not None
        limit, side = bound(goal.constraint, goal.references[task].pretrained)
        answers = candidate.answers[task]
        values = answers.correct if goal.constraint.metric == "accuracy" else answers.loss
        error = float(values.std()) / sqrt(len(answers))
        value = getattr(candidate.levels[task], goal.constraint.metric)
        if goal.constraint.metric == "perplexity":
            error *= value  # d exp(loss) = exp(loss) d loss
        distance = side * (value - limit) + ROUNDING
        low, high = min(low, distance - z * error), min(high, distance + z * error)
    return low, high


def _size(candidate: Candidate) -> float:
    return sum(abs(value) for value in candidate.coefficients.values())
