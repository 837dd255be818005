"""Gradient descent on the validation loss over the coefficients, also layer by layer."""

from taskvec.options import Count, Fraction
from taskvec.search import Choice, Problem, bound
from taskvec.strategies.descent import Adam, affordable, mean_slope, started

CONTINUOUS = True  # the points of a range mean nothing to it: see `taskvec.params`


def gradient(
    problem: Problem,
    *,
    steps: Count = 40,
    rate: Fraction = 0.1,
    start: float = 0.3,
    layerwise: bool = False,
    checks: Count = 2,
) -> None:
    """Follow the slope of the cross-entropy over the objective's tasks with Adam.

    A step looks at one chunk of each task, forward and backward (`taskvec.search.SLOPE_PRICE`).
    Where the chunk says that the constraint is broken, the step follows the constraint's slope
    instead (the switching subgradient method: Polyak 1967; Lan and Zhou, arXiv:1604.03887). The
    result is the best of the points that were evaluated completely on the way.

    Args:
        problem: any number of coefficients.
        steps: at most; the budget may pay for fewer.
        rate: of Adam at the first step, as a share of each range; it falls linearly to zero.
        start: the value of all coefficients, moved into their ranges.
        layerwise: one coefficient for each layer of the network.
        checks: complete evaluations on the way, the last one at the end; the start is one more.

    Source: our own combination; per-layer coefficients learnt on labelled data are in Zhang et al.,
    arXiv:2407.02880 (aTLAS).
    """
    planned = affordable(problem, steps, problem.goal.tasks, checks + 1)
    rates = {name: rate * (item.high - item.low) for name, item in problem.ranges.items()}
    for choice in problem.choices:
        optimizer = Adam(started(problem, start, layerwise), problem.ranges, rates)
        problem.evaluate(optimizer.values, choice)
        for step in range(planned):
            slope = _slope(problem, optimizer, choice, step)
            optimizer.step(slope, decay=1 - step / planned)
            if (step + 1) * checks // planned > step * checks // planned:
                problem.evaluate(optimizer.values, choice)


def _slope(problem: Problem, optimizer: Adam, choice: Choice, step: int) -> dict[str, float]:
    constraint = problem.goal.constraint
    if constraint:
        slope, answered = mean_slope(problem, optimizer.values, choice, constraint.tasks, step)
        if problem.slack(answered) < 0:
            _, side = bound(constraint, problem.goal.references[constraint.tasks[0]].pretrained)
            keeps = side if constraint.metric == "accuracy" else -side
            return {name: keeps * value for name, value in slope.items()}
    slope, _ = mean_slope(problem, optimizer.values, choice, problem.goal.objective.tasks, step)
    return {name: problem.learning * value for name, value in slope.items()}
