"""What each stage is given: its function and exactly the parameters that dvc.yaml declares for it.

Stages work on one item: a task (`mnist`), a task or an edit with a seed (`mnist-0`), or a page.
"""

import importlib
from collections.abc import Callable, Collection
from typing import Any

from tasks.artifacts import Artifacts
from taskvec.errors import InvalidInput, nearest
from taskvec.params import Params
from taskvec.sections import Model

NAMES = (
    "prepare", "pretrain", "head", "fine_tune", "extract",
    "combine", "search", "evaluate", "sweep", "few_shot", "report",
)  # fmt: skip

# Stages that ask a memory first, and have a function `assist` that fills it from the other end.
ASSISTED = ("search", "sweep")
TRAINING = ("fine_tune", "few_shot")  # stages with an optimizer

Progress = dict[str, float]
Emit = Callable[[Progress], None]


def run(
    stage: str,
    item: str,
    params: Params,
    artifacts: Artifacts,
    emit: Emit,
    *,
    assist: bool = False,
) -> None:
    """Do one stage for one item.

    Args:
        stage: one of `NAMES`.
        item: the task, task-seed, edit-seed or page; empty for pretrain.
        params: the checked parameters.
        artifacts: where files lie.
        emit: is told the progress: ``step``, ``steps`` and any metrics.
        assist: do not do the stage, but fill the memory for the process that does, from the end.
    """
    keywords = arguments(stage, item, params)
    function = getattr(importlib.import_module(f"tasks.{stage}"), "assist" if assist else stage)
    function(artifacts, emit=emit, **keywords)


def arguments(stage: str, item: str, params: Params) -> dict[str, Any]:
    """Return the keyword arguments of a stage for an item."""
    match stage:
        case "prepare":
            task = _task(item, params)
            return {
                "task": item,
                "data": task.data,
                "classes": task.head.classes,
                "templates": task.head.templates,
                "image_size": _image_size(params.model),
                "shots": params.model.shots,
            }
        case "pretrain":
            return {"model": params.model}
        case "head":
            return {"task": item, "head": _task(item, params).head, "model": params.model}
        case "report":
            return {"page": item, "params": params}
    name, seed = _seeded(item)
    match stage:
        case "fine_tune":
            _known(name, params.experts, "task or variant")
            return {
                "expert": name,
                "seed": seed,
                "tasks": params.learnt(name),
                "model": params.model,
                "recipe": params.recipe(name),
            }
        case "extract":
            _known(name, params.experts, "task or variant")
            return {"expert": name, "seed": seed}
        case "evaluate":
            return {"name": name, "seed": seed, "model": params.model, **_evaluated(name, params)}
        case "combine":
            expression = _edit(name, params).expression
            vectors = params.experts
            return {"edit": name, "seed": seed, "expression": expression, "vectors": vectors}
        case "sweep":
            _known(name, params.sweeps, "sweep")
            sweep = params.sweeps[name]
            return {"name": name, "seed": seed, "model": params.model, "sweep": sweep}
        case "few_shot":
            _known(name, params.few_shots, "few_shots entry")
            few = params.few_shots[name]
            return {
                "name": name,
                "seed": seed,
                "model": params.model,
                "few": few,
                "recipe": params.overridden(few.fine_tune),
            }
        case "search":
            edit = _edit(name, params)
            return {
                "edit": name,
                "seed": seed,
                "model": params.model,
                "ranges": edit.coefficients,
                "objective": edit.objective,
                "constraint": edit.constraint,
                "select": edit.select,
                "search": edit.search,
            }
    raise InvalidInput(f"unknown stage {stage!r}; {nearest(stage, NAMES)}")


def _seeded(item: str) -> tuple[str, int]:
    name, _, seed = item.rpartition("-")
    if not name or not seed.isdigit():
        raise InvalidInput(f"item {item!r}: expected a name and a seed, such as mnist-0")
    return name, int(seed)


def _image_size(model: Model) -> int:
    """Return the side of the pictures in pixels, that of the model unless it is set."""
    if model.image_size:
        return model.image_size
    inputs = importlib.import_module("tasks.inputs")  # heavy, which few callers need
    return int(inputs.architecture(model).image_size)


def _evaluated(name: str, params: Params) -> dict[str, Any]:
    """Return what the stage evaluate is given for a task, a variant or an edit."""
    given = {"gates": params.gates, "checks": params.checks, "constraint": None}
    if name in params.tasks:
        return {**given, "kind": "task", "tasks": [name], "vectors": [name]}
    if name in params.variants:
        tasks = params.evaluated(name)
        return {**given, "kind": "variant", "tasks": tasks, "vectors": params.learnt(name)}
    edit = _edit(name, params)
    learnt = [task for vector in params.parse(name).vectors for task in params.learnt(vector)]
    return {
        **given,
        "kind": "edit",
        "tasks": edit.evaluate,
        "vectors": list(dict.fromkeys(learnt)),
        "constraint": edit.constraint,
    }


def _task(name: str, params: Params) -> Any:
    _known(name, params.tasks, "task")
    return params.tasks[name]


def _edit(name: str, params: Params) -> Any:
    _known(name, params.edits, "edit")
    return params.edits[name]


def _known(name: str, names: Collection[str], what: str) -> None:
    if name not in names:
        raise InvalidInput(f"unknown {what} {name!r}; {nearest(name, names)}")
