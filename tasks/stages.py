"""What each stage is given: its function and exactly the parameters that dvc.yaml declares for it.

Stages work on one item: a task (`mnist`), a task or an edit with a seed (`mnist-0`), or a page.
"""

import importlib
from collections.abc import Callable
from typing import Any

from tasks.artifacts import Artifacts
from taskvec.errors import InvalidInput, nearest
from taskvec.params import Model, Params

NAMES = (
    "prepare", "pretrain", "head", "fine_tune", "extract",
    "combine", "search", "evaluate", "report",
)  # fmt: skip

Progress = dict[str, float]
Emit = Callable[[Progress], None]


def run(stage: str, item: str, params: Params, artifacts: Artifacts, emit: Emit) -> None:
    """Do one stage for one item.

    Args:
        stage: one of `NAMES`.
        item: the task, task-seed, edit-seed or page; empty for pretrain.
        params: the checked parameters.
        artifacts: where files lie.
        emit: is told the progress: ``step``, ``steps`` and any metrics.
    """
    keywords = arguments(stage, item, params)
    function = getattr(importlib.import_module(f"tasks.{stage}"), stage)
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
            _task(name, params)
            return {
                "task": name,
                "seed": seed,
                "model": params.model,
                "recipe": params.recipe(name),
            }
        case "extract":
            _task(name, params)
            return {"task": name, "seed": seed}
        case "evaluate" if name in params.tasks:
            return {"name": name, "seed": seed, "model": params.model, "tasks": None}
        case "evaluate":
            tasks = _edit(name, params).evaluate
            return {"name": name, "seed": seed, "model": params.model, "tasks": tasks}
        case "combine":
            expression = _edit(name, params).expression
            vectors = list(params.tasks)
            return {"edit": name, "seed": seed, "expression": expression, "vectors": vectors}
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


def _task(name: str, params: Params) -> Any:
    if name not in params.tasks:
        raise InvalidInput(f"unknown task {name!r}; {nearest(name, params.tasks)}")
    return params.tasks[name]


def _edit(name: str, params: Params) -> Any:
    if name not in params.edits:
        raise InvalidInput(f"unknown edit {name!r}; {nearest(name, params.edits)}")
    return params.edits[name]
