"""AdaMerging: layer-wise coefficients that minimise the entropy of predictions, without labels.

Source: Yang et al., ICLR 2024, arXiv:2310.02575, sections 3.2 and 3.3; defaults as in the authors'
code: Adam with rate 1e-3, 500 steps, all coefficients from 0.3, clamped to [0, 1].
"""

from taskvec.errors import InvalidInput
from taskvec.options import Count, Positive, Unit
from taskvec.params import Range
from taskvec.search import Problem
from taskvec.strategies.descent import Adam, affordable, mean_slope, started

CONTINUOUS = True  # the points of a range mean nothing to it: see `taskvec.params`


def adamerging(
    problem: Problem, *, steps: Count = 500, rate: Positive = 0.001, start: Unit = 0.3
) -> None:
    """Minimise the mean entropy over the objective's tasks on validation images.

    Labels have no part in it; only the last point is evaluated. The paper does this on test images,
    here no test image is seen. A step costs three image evaluations an image, so that the default
    budget, the price of the grid, pays for a few steps only: set ``budget`` too.

    Args:
        problem: any number of coefficients, each with a value for every layer.
        steps: at most; the budget may pay for fewer. One chunk of each task a step, where the
            authors take 16 images.
        rate: of Adam, in units of the coefficients.
        start: the value of all coefficients, moved into their ranges.

    Raises:
        InvalidInput: the objective is to forget, of which entropy knows nothing.
    """
    if problem.learning < 0:
        raise InvalidInput(
            "adamerging makes a model certain, which no edit that forgets wants; "
            "choose another strategy for this objective"
        )
    tasks = problem.goal.objective.tasks
    ranges = {name: _clamped(allowed) for name, allowed in problem.ranges.items()}
    planned = affordable(problem, steps, tasks, 1)
    for choice in problem.choices:
        rates = dict.fromkeys(ranges, rate)
        optimizer = Adam(started(problem, start, layers=True), ranges, rates)
        for step in range(planned):
            slope, _ = mean_slope(problem, optimizer.values, choice, tasks, step, "entropy")
            optimizer.step(slope)
        problem.evaluate(optimizer.values, choice)


def _clamped(allowed: Range) -> Range:
    """Return the part of a range inside [0, 1], or all of it if there is none."""
    low, high = max(0.0, allowed.low), min(1.0, allowed.high)
    return Range(low=low, high=high, points=2) if low < high else allowed
