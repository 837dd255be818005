"""Covariance matrix adaptation (Hansen 2016, arXiv:1604.00772), by the package that Optuna uses."""

from typing import Literal

import cmaes
import numpy as np

from taskvec.options import Fraction
from taskvec.search import Candidate, Problem

CONTINUOUS = True  # the points of a range mean nothing to it: see `taskvec.params`


def cma_es(
    problem: Problem,
    *,
    guide: Literal["objective", "loss"] = "objective",
    sigma: Fraction = 0.25,
) -> None:
    """Draw populations around a mean that moves to their better half, until the budget is spent.

    Only the order of a population counts: what keeps the constraint is before what does not, the
    former by their worth, the latter by their distance to the constraint. Options with several
    values share the budget.

    Args:
        problem: any number of coefficients.
        guide: "objective", or "loss" for the cross-entropy, which is smooth.
        sigma: the first standard deviation as a share of each range; the first mean is its middle.
    """
    names = sorted(problem.ranges)
    low = np.array([problem.ranges[name].low for name in names])
    high = np.array([problem.ranges[name].high for name in names])
    number = problem.limit // problem.full_price // len(problem.choices)
    for place, choice in enumerate(problem.choices):
        optimizer = cmaes.CMA(
            mean=np.full(len(names), 0.5),
            sigma=sigma,
            bounds=np.tile([0.0, 1.0], (len(names), 1)),
            seed=problem.seed + place,
        )
        population: list[tuple[np.ndarray, Candidate]] = []
        for _ in range(max(1, number)):
            unit = optimizer.ask()
            values = np.clip(low + unit * (high - low), low, high)
            coefficients = dict(zip(names, values.tolist(), strict=True))
            population.append((unit, problem.evaluate(coefficients, choice)))
            if len(population) == optimizer.population_size:
                population.sort(key=lambda item: _rank(problem, item[1], guide), reverse=True)
                optimizer.tell([(unit, float(rank)) for rank, (unit, _) in enumerate(population)])
                population = []


def _rank(problem: Problem, candidate: Candidate, guide: str) -> tuple[bool, float]:
    slack = problem.slack(candidate)
    return slack >= 0, problem.worth(candidate, guide) if slack >= 0 else slack
