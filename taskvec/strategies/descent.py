"""Adam over a handful of coefficients, which stay inside their ranges."""

from collections.abc import Mapping
from math import sqrt

from taskvec import layered
from taskvec.params import Range
from taskvec.search import Candidate, Choice, Of, Problem

DECAYS = (0.9, 0.999)
EPSILON = 1e-8


class Adam:
    """Adam (Kingma and Ba, arXiv:1412.6980, algorithm 1), projected onto the ranges."""

    def __init__(
        self, values: Mapping[str, float], ranges: Mapping[str, Range], rates: Mapping[str, float]
    ) -> None:
        """Start somewhere.

        Args:
            values: ``NAME`` or ``NAME@LAYER`` -> where to start.
            ranges: by NAME.
            rates: by NAME: the learning rate in units of the coefficient.
        """
        self.values = dict(values)
        self._ranges, self._rates = ranges, rates
        self._first = dict.fromkeys(values, 0.0)
        self._second = dict.fromkeys(values, 0.0)
        self._step = 0

    def step(self, gradient: Mapping[str, float], decay: float = 1.0) -> None:
        """Go a step against a gradient, of the learning rates times ``decay``."""
        self._step += 1
        for name, slope in gradient.items():
            allowed = self._ranges[layered.base(name)]
            rate = decay * self._rates[layered.base(name)]
            self._first[name] += (1 - DECAYS[0]) * (slope - self._first[name])
            self._second[name] += (1 - DECAYS[1]) * (slope * slope - self._second[name])
            mean = self._first[name] / (1 - DECAYS[0] ** self._step)
            variance = self._second[name] / (1 - DECAYS[1] ** self._step)
            moved = self.values[name] - rate * mean / (sqrt(variance) + EPSILON)
            self.values[name] = min(max(moved, allowed.low), allowed.high)


def started(problem: Problem, start: float, layers: bool) -> dict[str, float]:
    """Return the same value for all coefficients (or all their layers), moved into the ranges."""
    values = {
        name: min(max(start, allowed.low), allowed.high) for name, allowed in problem.ranges.items()
    }
    return layered.spread(values, problem.layers) if layers else values


def mean_slope(
    problem: Problem, values: Mapping[str, float], choice: Choice, tasks: list[str], step: int,
    of: Of = "cross_entropy",
) -> tuple[dict[str, float], Candidate]:  # fmt: skip
    """Return the slope of the mean loss of some tasks on their next chunk, and the answers."""
    found = {task: problem.slope(values, choice, task, step, of) for task in tasks}
    gradient = {
        name: sum(slope.gradient[name] for slope in found.values()) / len(found) for name in values
    }
    answers = {task: slope.answers for task, slope in found.items()}
    return gradient, Candidate(dict(values), choice, answers, complete=False)


def affordable(problem: Problem, steps: int, tasks: list[str], evaluations: int) -> int:
    """Return how many of the steps the budget pays for, with complete evaluations besides.

    Each of the options has its share of the budget.
    """
    largest = sum(
        max(problem.slope_price(task, chunk) for chunk in range(problem.chunks[task]))
        for task in tasks
    )
    share = problem.limit // len(problem.choices) - evaluations * problem.full_price
    return max(0, min(steps, share // largest))
