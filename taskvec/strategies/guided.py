"""A quarter of the grid's price: a few probes predict all of it, and the best of that is evaluated.

The prediction interpolates the cross-entropy of every single item, which is smooth in the
coefficients where accuracy is noisy: see `taskvec.strategies.kriging`.
"""

from dataclasses import dataclass, field

import numpy as np

from taskvec.options import Count, Fraction
from taskvec.search import Candidate, Choice, Coefficients, Level, Problem, combinations
from taskvec.strategies.kriging import Floats, predicted

PROBES = (0.5, 0.1, 0.9, 0.3, 0.7)  # places of a single coefficient in its range
FEW = 3  # of them, if each is dear
OUTER = (0.1, 0.9)  # of each of several coefficients, the others in the middle


@dataclass(frozen=True, eq=False)
class Expected(Candidate):
    """A candidate that was not evaluated, with the levels that are expected of it."""

    expected: dict[str, Level] = field(default_factory=dict)

    @property
    def levels(self) -> dict[str, Level]:
        """Task -> what is expected."""
        return self.expected


def guided(problem: Problem, *, share: Fraction = 0.25, patience: Count = 6) -> None:
    """Evaluate points of the grid where the prediction is best, until the share is spent.

    First some points spread over the ranges are asked on one chunk of each task; with a constraint
    the middle is evaluated completely instead, for a part of the items says too little about a
    bound. Then, time after time, all points are predicted, the best one that is not evaluated yet
    (by the rules of the search, constraint included) is evaluated completely, and the prediction
    learns from it.

    Args:
        problem: any number of coefficients; only points of the grid are tried.
        share: of the grid's price that may be spent, one complete evaluation at least.
        patience: complete evaluations without a better one, after which it stops.
    """
    limit = min(problem.limit, int(share * problem.grid_price))
    grid = _Grid(problem)
    for choice in problem.choices:
        for number, place in enumerate(grid.probes(limit)):
            whole = number == 0 and problem.goal.constraint is not None
            problem.evaluate(grid.points[place], choice, None if whole else 1)
    complete = [item for item in problem.candidates if item.complete]
    best = problem.chosen(complete) if complete else None
    waited = 0
    while waited < patience:
        rivals = grid.rivals(best)
        if not rivals:
            return
        target = problem.chosen(rivals)
        cost = problem.price_of(target.coefficients, target.choice)
        if best and problem.price + cost > limit:
            return
        found = problem.evaluate(target.coefficients, target.choice)
        better = best is None or problem.chosen([best, found]) is found
        best, waited = (found, 0) if better else (best, waited + 1)


class _Grid:
    """The points of the ranges, and what is expected at each."""

    def __init__(self, problem: Problem) -> None:
        self.points = combinations(problem.ranges)
        self._problem = problem
        low = np.array([problem.ranges[name].low for name in sorted(problem.ranges)])
        high = np.array([problem.ranges[name].high for name in sorted(problem.ranges)])
        self._low, self._width = low, np.where(high > low, high - low, 1.0)
        self._places = np.stack([self._scaled(point) for point in self.points])  # (G, K)

    def probes(self, limit: int) -> list[int]:
        """Return the points to begin with, without repetition; few if each is dear."""
        number = len(self._problem.ranges)
        middle = np.full(number, 0.5)
        if number == 1:
            price = sum(sizes[0] for sizes in self._problem.sizes.values())
            dear = len(PROBES) * price * len(self._problem.choices) > limit / 2
            few = 1 if self._problem.goal.constraint else FEW if dear else len(PROBES)
            wanted = [np.array([x]) for x in PROBES[:few]]
        else:
            wanted = [middle]
            for axis in range(number):
                for x in OUTER:
                    wanted.append(np.where(np.arange(number) == axis, x, middle))
        nearest = [int(((self._places - x) ** 2).sum(axis=1).argmin()) for x in wanted]
        return list(dict.fromkeys(nearest))

    def rivals(self, best: Candidate | None) -> list[Candidate]:
        """Return what is expected of all points that are not complete and that could win."""
        found: list[Candidate] = []
        for choice in self._problem.choices:
            found += self._expected(choice)
        if best is not None and self._problem.goal.select == "largest":
            least = self._problem.worth(best, "objective")
            if self._problem.slack(best) >= 0:
                found = [x for x in found if self._problem.worth(x, "objective") > least]
        return found

    def _expected(self, choice: Choice) -> list[Candidate]:
        own = [item for item in self._problem.candidates if item.choice == choice]
        complete = {tuple(item.coefficients.items()) for item in own if item.complete}
        latest = {tuple(item.coefficients.items()): item for item in own}
        places = [self._scaled(item.coefficients) for item in latest.values()]
        open_ = [i for i, p in enumerate(self.points) if tuple(p.items()) not in complete]
        if not open_:
            return []
        levels = {
            task: predicted(
                places,
                [item.answers[task] for item in latest.values()],
                self._places[open_],
                self._problem.sizes[task],
            )
            for task in self._problem.sizes
        }
        expected = [{task: found[n] for task, found in levels.items()} for n in range(len(open_))]
        return [
            Expected(self.points[i], dict(choice), {}, expected=item)
            for i, item in zip(open_, expected, strict=True)
        ]

    def _scaled(self, point: Coefficients) -> Floats:
        values = np.array([point[name] for name in sorted(point)])
        scaled: Floats = (values - self._low) / self._width
        return scaled
