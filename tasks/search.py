"""Search an edit's coefficients on validation data and write the edited model."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import ceil
from typing import Any

import pandas as pd
from torch import Tensor

from tasks import kept
from tasks.artifacts import Artifacts
from tasks.combine import basis_prefix, offset_prefix
from tasks.inputs import check_origin
from tasks.stages import Emit, Progress
from tasks.validation import Validation
from taskvec import layered, plugins, streaming, tables
from taskvec.answers import Answers
from taskvec.atomic import write_text
from taskvec.bootstrap import not_worse
from taskvec.checkpoints import Weights
from taskvec.edits import weighted
from taskvec.flat import FlatEditor
from taskvec.lazy import Lazy
from taskvec.mapped import StoredVector, open_weights
from taskvec.memo import Memo
from taskvec.metrics import ratio
from taskvec.params import Constraint, Objective, Range, SearchParams
from taskvec.search import (
    Candidate,
    Choice,
    Coefficients,
    Goal,
    Level,
    Of,
    Problem,
    Reference,
    Slope,
    combinations,
    feasible,
    objective_value,
    solve,
)
from taskvec.sections import Model
from taskvec.towers import Tower


def search(
    artifacts: Artifacts,
    *,
    edit: str,
    seed: int,
    model: Model,
    ranges: Mapping[str, Range],
    objective: Objective,
    constraint: Constraint | None,
    select: str,
    search: SearchParams,
    emit: Emit,
) -> None:
    """Write the table of everything evaluated, the chosen coefficients and the edited model.

    Args:
        artifacts: where files lie.
        edit: its name.
        seed: of the fine-tuned models.
        model: architecture.
        ranges: coefficient -> the values that may be tried.
        objective: what is made large or small, on validation data.
        constraint: what must be kept, if anything.
        select: the rule; see `taskvec.search.decide`.
        search: strategy, its options, budget and seed.
        emit: is told every evaluation; ``steps`` is the budget in complete evaluations, or what was
            done if that is more.

    Answers and slopes that an earlier search has asked for come from the memory. The price in the
    outputs is nominal, as if the memory had been empty.
    """
    with posed(
        artifacts, edit, seed, model, ranges, objective, constraint, select, search
    ) as problem:
        problem.tell = _Progress(problem, emit)
        strategy = getattr(plugins.load("strategies", search.strategy), search.strategy)
        options = plugins.complete("strategies", search.strategy, search.options)
        winner = solve(problem, strategy, options)
    chosen = problem.candidates.index(winner)
    good = not_worse(problem.candidates, chosen, problem.goal)
    table = _table(problem, chosen, good)
    tables.write(artifacts.search_table(edit, seed), table, tables.Search)
    summary = {
        **{f"coefficient.{name}": value for name, value in winner.coefficients.items()},
        **{f"option.{name}": value for name, value in winner.choice.items()},
        **_interval(problem.candidates, winner, good),
        "objective": problem.value(winner),
        "feasible": feasible(winner, constraint, problem.goal.references),
        "strategy": search.strategy,
        "evaluated": len(problem.candidates),
        "image_evaluations": problem.price,
        "grid_image_evaluations": problem.grid_price,
    }
    text = json.dumps(summary, indent=2, sort_keys=True) + "\n"
    write_text(artifacts.coefficients(edit, seed), text)
    _write_model(artifacts, edit, seed, winner)


def assist(artifacts: Artifacts, *, search: SearchParams, emit: Emit, **stated: Any) -> None:
    """Ask what `search` will ask, from the last point on, so that it finds the answers.

    Only a grid is known beforehand; any other strategy gets no help. The arguments are those of
    `search`.
    """
    del emit
    if search.strategy != "grid":
        return
    with posed(artifacts, search=search, **stated) as problem:
        for choice in reversed(problem.choices):
            for coefficients in reversed(combinations(problem.ranges)):
                problem.evaluate(coefficients, choice)


@contextmanager
def posed(
    artifacts: Artifacts,
    edit: str,
    seed: int,
    model: Model,
    ranges: Mapping[str, Range],
    objective: Objective,
    constraint: Constraint | None,
    select: str,
    search: SearchParams,
) -> Iterator[Problem]:
    """Yield what a strategy drives, answered by the model and the memory.

    The arguments are those of `search`.
    """
    tasks = sorted({*objective.tasks, *(constraint.tasks if constraint else [])})
    references = {task: _reference(artifacts, task, seed) for task in tasks}
    goal = Goal(objective, references, constraint, select)
    basis = kept.basis(artifacts, edit, seed)
    with kept.base_model(artifacts, model) as (tower, pretrained), Memo(artifacts.memo()) as memo:
        check_origin(basis, pretrained.fingerprint, f"the basis of {edit}")
        validation = Validation(artifacts, tower, tasks, memo)
        edits = _Edits(tower, pretrained, basis, validation)
        yield Problem(
            ranges=ranges,
            choices=basis.metadata["choices"],
            goal=goal,
            sizes=validation.sizes,
            ask=edits.ask,
            differentiate=edits.differentiate,
            layers=layered.layers(tower.edited()),
            seed=search.seed,
            budget=search.budget,
        )


class _Edits:
    """The edits of one basis in one tower: what `Problem` asks, answered by the model."""

    def __init__(
        self, tower: Tower, pretrained: Weights, basis: Weights, validation: Validation
    ) -> None:
        self._tower, self._pretrained, self._basis = tower, pretrained, basis
        self._validation = validation
        self._present: tuple[int, FlatEditor] | None = None

    def ask(self, coefficients: Coefficients, choice: Choice, task: str, chunk: int) -> Answers:
        """Return the answers of an edit on a chunk."""
        number = self._number(choice)
        return self._validation.answers(
            self._weights(number, coefficients),
            lambda: self._editor(number).apply(coefficients),
            task,
            chunk,
        )

    def differentiate(
        self, coefficients: Coefficients, choice: Choice, task: str, chunk: int, of: Of
    ) -> Slope:
        """Return a loss of an edit on a chunk, and its slope."""
        number = self._number(choice)
        return self._validation.slope(
            self._weights(number, coefficients),
            lambda: self._editor(number).apply(coefficients),
            lambda loss: self._editor(number).slope(loss, coefficients),
            task,
            chunk,
            of,
        )

    def _number(self, choice: Choice) -> int:
        return [dict(item) for item in self._basis.metadata["choices"]].index(dict(choice))

    def _weights(self, number: int, coefficients: Coefficients) -> dict[str, object]:
        return {
            "origin": self._pretrained.fingerprint,
            "basis": self._basis.fingerprint,
            "alternative": number,
            "coefficients": dict(coefficients),
        }

    def _editor(self, number: int) -> FlatEditor:
        if self._present is None or self._present[0] != number:
            self._tower.load(self._pretrained.tensors)
            self._present = number, FlatEditor(self._tower, *_parts(self._basis, number))
        return self._present[1]


class _Progress:
    """Tells how far a search is: evaluations and slopes done, of how many at most."""

    def __init__(self, problem: Problem, emit: Emit) -> None:
        self._problem, self._emit, self._step = problem, emit, 0

    def __call__(self, found: Candidate | Slope) -> None:
        self._step += 1
        bound = ceil(self._problem.limit / self._problem.full_price)
        progress: Progress = {"step": self._step, "steps": max(self._step, bound)}
        if isinstance(found, Candidate):
            progress["objective"] = self._problem.value(found)
        else:
            progress["loss"] = found.value
        self._emit(progress)


def _interval(candidates: list[Candidate], winner: Candidate, good: list[bool]) -> dict[str, float]:
    """Return the ends of each coefficient among what is not significantly worse.

    Only with the chosen options: under others a coefficient scales another vector.
    """
    among = [
        candidate
        for candidate, is_good in zip(candidates, good, strict=True)
        if is_good and candidate.choice == winner.choice
    ]
    found = {}
    for name in winner.coefficients:
        values = [candidate.coefficients[name] for candidate in among]
        found[f"interval.{name}.low"] = min(values)
        found[f"interval.{name}.high"] = max(values)
    return found


def _write_model(artifacts: Artifacts, edit: str, seed: int, winner: Candidate) -> None:
    """Write the edited model, file to file; `taskvec edit` gives the same tensors."""
    pretrained = open_weights(artifacts.pretrained())
    combined = open_weights(artifacts.basis(edit, seed))
    number = combined.metadata["choices"].index(winner.choice)
    offset = StoredVector(combined, offset_prefix(number))
    basis: dict[str, Lazy] = {}
    factors: dict[str, float] = {}
    for name, value in layered.grouped(winner.coefficients).items():
        vector = StoredVector(combined, basis_prefix(number, name))
        if isinstance(value, dict):
            basis[name], factors[name] = layered.scaled_by_layer(vector, value), 1.0
        else:
            basis[name], factors[name] = vector, value
    streaming.apply(
        pretrained,
        weighted(basis, offset if offset.shapes else None, factors),
        artifacts.edited(edit, seed),
        identity=pretrained.metadata["identity"],
        basis=combined.fingerprint,
        coefficients=dict(winner.coefficients),
        choice=dict(winner.choice),
        expression=combined.metadata["expression"],
        edit=edit,
        seed=seed,
    )


def _parts(
    basis: Weights, alternative: int
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return the vector of each coefficient and the coefficient-free part."""
    vectors = {
        name: _part(basis, basis_prefix(alternative, name))
        for name in basis.metadata["coefficients"]
    }
    return vectors, _part(basis, offset_prefix(alternative))


def _part(basis: Weights, prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in basis.tensors.items()
        if name.startswith(prefix)
    }


def _reference(artifacts: Artifacts, task: str, seed: int) -> Reference:
    table = tables.read(artifacts.evaluation(task, seed), tables.Evaluation)
    rows = table[table["split"] == "validation"].to_dict("records")
    levels = {row["model"]: Level(row["accuracy"], row["loss"]) for row in rows}
    return Reference(levels["pretrained"], levels["finetuned"])


def _table(problem: Problem, chosen: int, good: list[bool]) -> pd.DataFrame:
    goal = problem.goal
    return pd.DataFrame(
        [
            {
                "point": position,
                **{f"coefficient.{name}": v for name, v in candidate.coefficients.items()},
                **{f"option.{name}": v for name, v in candidate.choice.items()},
                **{f"accuracy.{task}": v.accuracy for task, v in candidate.levels.items()},
                **{f"loss.{task}": v.loss for task, v in candidate.levels.items()},
                **{
                    f"ratio.{task}": ratio(v.accuracy, goal.references[task].pretrained.accuracy)
                    for task, v in candidate.levels.items()
                },
                "objective": objective_value(candidate, goal.objective, goal.references),
                "items": candidate.items,
                "complete": candidate.complete,
                "feasible": feasible(candidate, goal.constraint, goal.references),
                "not_worse": good[position],
                "chosen": position == chosen,
            }
            for position, candidate in enumerate(problem.candidates)
        ]
    )
