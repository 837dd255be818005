"""Which coefficients to try, and which to take: values in, decision out; no models, no files.

The paper tries a grid on validation data and takes the best (arXiv:2212.04089, section 2), or for
negation the largest coefficient whose control accuracy stays above a bound (section 3).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import isnan

from taskvec.params import Constraint, Objective, Range


@dataclass(frozen=True)
class Reference:
    """Validation accuracies that give a task's figures their meaning; fractions in [0, 1]."""

    pretrained: float
    finetuned: float


@dataclass(frozen=True)
class Candidate:
    """One combination of coefficients and options, and its validation accuracy a task."""

    coefficients: Mapping[str, float]
    accuracy: Mapping[str, float]
    choice: Mapping[str, bool | int | float | str] = field(default_factory=dict)


def grid(ranges: Mapping[str, Range]) -> list[dict[str, float]]:
    """Return all combinations of the coefficients' values; the last name varies fastest."""
    names = sorted(ranges)
    values = [ranges[name].values() for name in names]
    return [dict(zip(names, combination, strict=True)) for combination in product(*values)]


def objective_value(
    candidate: Candidate, objective: Objective, references: Mapping[str, Reference]
) -> float:
    """Return the mean over the objective's tasks of what it makes large or small."""
    metric = objective.maximize or objective.minimize
    values = [
        candidate.accuracy[task]
        / (references[task].finetuned if metric == "normalized_accuracy" else 1.0)
        for task in objective.tasks
    ]
    return sum(values) / len(values)


def feasible(
    candidate: Candidate, constraint: Constraint | None, references: Mapping[str, Reference]
) -> bool:
    """Return whether every control task keeps its share of the pre-trained model's accuracy."""
    return constraint is None or all(
        candidate.accuracy[task] >= constraint.min_ratio * references[task].pretrained
        for task in constraint.tasks
    )


def decide(
    candidates: Sequence[Candidate],
    objective: Objective,
    constraint: Constraint | None,
    select: str,
    references: Mapping[str, Reference],
) -> int:
    """Return the position of the candidate to take.

    ``best`` takes the feasible candidate with the best objective, ``largest`` the feasible one
    with the largest coefficient (the paper's rule for negation). Ties go to the smaller edit, then
    to the smaller coefficients in the order of their names, then to the options in the order of
    their text, so that the order of the candidates does not matter. If nothing is feasible the
    smallest edit is taken, which the table marks as not feasible. A candidate with a NaN accuracy
    never wins against one without.
    """
    sign = 1.0 if objective.maximize else -1.0

    def size(position: int) -> float:
        return sum(abs(value) for _, value in sorted(candidates[position].coefficients.items()))

    def smallest(position: int) -> tuple[float, list[float], list[str]]:
        candidate = candidates[position]
        coefficients = [value for _, value in sorted(candidate.coefficients.items())]
        return (
            size(position),
            coefficients,
            [str(item) for item in sorted(candidate.choice.items())],
        )

    def best(position: int) -> tuple[float, float, list[float], list[str]]:
        value = objective_value(candidates[position], objective, references)
        return -sign * value, *smallest(position)

    def largest(position: int) -> tuple[float, float, list[float], list[str]]:
        return -size(position), *smallest(position)

    known = [
        position
        for position, candidate in enumerate(candidates)
        if not any(isnan(value) for value in candidate.accuracy.values())
    ]
    allowed = [
        position for position in known if feasible(candidates[position], constraint, references)
    ]
    if not allowed:
        return min(known or range(len(candidates)), key=smallest)
    return min(allowed, key=largest if select == "largest" else best)
