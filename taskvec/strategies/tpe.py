"""The tree-structured Parzen estimator of Optuna (Bergstra et al., NeurIPS 2011)."""

from typing import Literal

import optuna

from taskvec.options import Count
from taskvec.search import Problem

CHOICE = "the choice"  # no name of a coefficient has a space
CONTINUOUS = True  # the points of a range mean nothing to it: see `taskvec.params`


def tpe(
    problem: Problem,
    *,
    guide: Literal["objective", "loss"] = "objective",
    startup: Count = 10,
) -> None:
    """Evaluate where good values are likely, given all values so far, until the budget is spent.

    Args:
        problem: any number of coefficients, any options, any constraint.
        guide: "objective", or "loss" for the cross-entropy, which is smooth.
        startup: evaluations at random places before the estimator starts.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=problem.seed, n_startup_trials=startup)
    study = optuna.create_study(sampler=sampler, direction="maximize")
    for _ in range(problem.limit // problem.full_price):
        trial = study.ask()
        coefficients = {
            name: trial.suggest_float(name, allowed.low, allowed.high)
            for name, allowed in sorted(problem.ranges.items())
        }
        choice = trial.suggest_categorical(CHOICE, list(range(len(problem.choices))))
        candidate = problem.evaluate(coefficients, problem.choices[choice])
        if problem.goal.constraint:
            trial.set_constraint("constraint", -problem.slack(candidate))
        study.tell(trial, problem.worth(candidate, guide))
