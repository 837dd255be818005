"""Search an edit's coefficients on validation data and write the edited model."""

import json
from collections.abc import Mapping

import pandas as pd
from torch import Tensor

from tasks.artifacts import Artifacts
from tasks.combine import basis_prefix, offset_prefix
from tasks.inputs import architecture, check_origin, checkpoint, head, images
from tasks.stages import Emit
from taskvec import streaming, tables
from taskvec.atomic import write_text
from taskvec.checkpoints import Weights, load
from taskvec.edits import weighted
from taskvec.flat import FlatEditor
from taskvec.mapped import StoredVector, open_weights
from taskvec.metrics import Pictures, count_correct, ratio
from taskvec.params import Constraint, Model, Objective, Range
from taskvec.search import Candidate, Reference, decide, feasible, grid, objective_value


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
    emit: Emit,
) -> None:
    """Write the table of everything evaluated, the chosen coefficients and the edited model."""
    tower = architecture(model)
    pretrained = checkpoint(artifacts.pretrained(), tower)
    basis = load(artifacts.basis(edit, seed), "basis")
    check_origin(basis, pretrained.fingerprint, f"the basis of {edit}")
    tasks = sorted({*objective.tasks, *(constraint.tasks if constraint else [])})
    references = {task: _reference(artifacts, task, seed) for task in tasks}
    data = {
        task: (head(artifacts, task), Pictures(tower, *images(artifacts, task, "validation")))
        for task in tasks
    }
    steps = len(basis.metadata["choices"]) * len(grid(ranges))
    candidates: list[Candidate] = []
    for number, choice in enumerate(basis.metadata["choices"]):
        tower.load(pretrained.tensors)
        editor = FlatEditor(tower, *_parts(basis, number))
        for coefficients in grid(ranges):
            editor.apply(coefficients)
            accuracy = {
                task: count_correct(tower, *parts) / len(parts[1]) for task, parts in data.items()
            }
            candidates.append(Candidate(coefficients, accuracy, choice))
            value = objective_value(candidates[-1], objective, references)
            emit({"step": len(candidates), "steps": steps, "objective": value})
    chosen = decide(candidates, objective, constraint, select, references)
    table = _table(candidates, chosen, objective, constraint, references)
    tables.write(artifacts.search_table(edit, seed), table, tables.Search)
    winner = candidates[chosen]
    summary = {
        **{f"coefficient.{name}": value for name, value in winner.coefficients.items()},
        **{f"option.{name}": value for name, value in winner.choice.items()},
        "objective": float(table["objective"][chosen]),
        "feasible": bool(table["feasible"][chosen]),
        "evaluated": len(candidates),
        "image_evaluations": len(candidates) * sum(len(parts[1]) for parts in data.values()),
    }
    text = json.dumps(summary, indent=2, sort_keys=True) + "\n"
    write_text(artifacts.coefficients(edit, seed), text)
    _write_model(artifacts, edit, seed, winner)


def _write_model(artifacts: Artifacts, edit: str, seed: int, winner: Candidate) -> None:
    """Write the edited model, file to file; `taskvec edit` gives the same tensors."""
    pretrained = open_weights(artifacts.pretrained())
    combined = open_weights(artifacts.basis(edit, seed))
    number = combined.metadata["choices"].index(winner.choice)
    offset = StoredVector(combined, offset_prefix(number))
    basis = {
        name: StoredVector(combined, basis_prefix(number, name)) for name in winner.coefficients
    }
    streaming.apply(
        pretrained,
        weighted(basis, offset if offset.shapes else None, winner.coefficients),
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
    rows = table[table["split"] == "validation"].set_index("model")["accuracy"]
    return Reference(pretrained=float(rows["pretrained"]), finetuned=float(rows["finetuned"]))


def _table(
    candidates: list[Candidate],
    chosen: int,
    objective: Objective,
    constraint: Constraint | None,
    references: Mapping[str, Reference],
) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "point": position,
                **{f"coefficient.{name}": v for name, v in candidate.coefficients.items()},
                **{f"option.{name}": v for name, v in candidate.choice.items()},
                **{f"accuracy.{task}": v for task, v in candidate.accuracy.items()},
                **{
                    f"ratio.{task}": ratio(v, references[task].pretrained)
                    for task, v in candidate.accuracy.items()
                },
                "objective": objective_value(candidate, objective, references),
                "feasible": feasible(candidate, constraint, references),
                "chosen": position == chosen,
            }
            for position, candidate in enumerate(candidates)
        ]
    )
