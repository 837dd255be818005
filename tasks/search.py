"""Search an edit's coefficients on validation data and write the edited model."""

import json
from collections.abc import Mapping

import pandas as pd
from torch import Tensor

from tasks.artifacts import Artifacts
from tasks.combine import BASIS, OFFSET
from tasks.inputs import architecture, check_origin, checkpoint, head, images
from tasks.stages import Emit
from taskvec import tables
from taskvec.atomic import write_text
from taskvec.checkpoints import Weights, load, save
from taskvec.flat import FlatEditor
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
    tower.load(pretrained.tensors)
    editor = FlatEditor(
        tower,
        {name: _part(basis, f"{BASIS}.{name}.") for name in basis.metadata["coefficients"]},
        _part(basis, f"{OFFSET}."),
    )
    tasks = sorted({*objective.tasks, *(constraint.tasks if constraint else [])})
    references = {task: _reference(artifacts, task, seed) for task in tasks}
    data = {
        task: (head(artifacts, task), Pictures(tower, *images(artifacts, task, "validation")))
        for task in tasks
    }
    points = grid(ranges)
    candidates = []
    for number, coefficients in enumerate(points, start=1):
        editor.apply(coefficients)
        accuracy = {
            task: count_correct(tower, *parts) / len(parts[1]) for task, parts in data.items()
        }
        candidates.append(Candidate(coefficients, accuracy))
        value = objective_value(candidates[-1], objective, references)
        emit({"step": number, "steps": len(points), "objective": value})
    chosen = decide(candidates, objective, constraint, select, references)
    table = _table(candidates, chosen, objective, constraint, references)
    tables.write(artifacts.search_table(edit, seed), table, tables.Search)
    summary = {
        **{f"coefficient.{name}": value for name, value in points[chosen].items()},
        "objective": float(table["objective"][chosen]),
        "feasible": bool(table["feasible"][chosen]),
        "evaluated": len(points),
        "image_evaluations": len(points) * sum(len(parts[1]) for parts in data.values()),
    }
    text = json.dumps(summary, indent=2, sort_keys=True) + "\n"
    write_text(artifacts.coefficients(edit, seed), text)
    editor.apply(points[chosen])
    save(
        artifacts.edited(edit, seed),
        tower.state(),
        kind="checkpoint",
        identity=dict(tower.identity),
        origin=pretrained.fingerprint,
        basis=basis.fingerprint,
        coefficients=points[chosen],
        expression=basis.metadata["expression"],
        edit=edit,
        seed=seed,
    )


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
