"""Combine task vectors into the basis of an edit: one vector a coefficient."""

from collections.abc import Mapping

from torch import Tensor

from tasks.artifacts import Artifacts
from tasks.inputs import check_origin
from tasks.stages import Emit
from taskvec.checkpoints import Weights, load, save
from taskvec.expressions import names, parse
from taskvec.merging.task_arithmetic import task_arithmetic
from taskvec.vectors import TaskVector, check_alike

BASIS, OFFSET = "basis", "offset"


def combine(
    artifacts: Artifacts, *, edit: str, seed: int, expression: str, vectors: list[str], emit: Emit
) -> None:
    """Write ``basis.COEFFICIENT.PARAMETER`` and, if there is one, ``offset.PARAMETER``.

    The edited model is ``theta_0 + offset + sum_k c_k * basis_k`` for any coefficients, so a
    coefficient's range may change without this stage.
    """
    del emit
    coefficients = [name for name in names(expression) if name not in vectors]
    recipe = parse(expression, vectors, coefficients)
    loaded = {name: load(artifacts.vector(name, seed), "vector") for name in recipe.vectors}
    _check_one_origin(loaded)
    operands = {
        name: TaskVector(item.tensors, item.metadata["origin"]) for name, item in loaded.items()
    }
    tensors = {}
    for coefficient, weights in recipe.basis.items():
        tensors.update(_prefixed(f"{BASIS}.{coefficient}", operands, weights))
    if recipe.offset:
        tensors.update(_prefixed(OFFSET, operands, recipe.offset))
    first = loaded[recipe.vectors[0]].metadata
    save(
        artifacts.basis(edit, seed),
        tensors,
        kind="basis",
        coefficients=list(recipe.coefficients),
        expression=expression,
        identity=first["identity"],
        operands={name: item.fingerprint for name, item in loaded.items()},
        origin=first["origin"],
        method="task_arithmetic",
    )


def _check_one_origin(loaded: Mapping[str, Weights]) -> None:
    """Raise IncompatibleWeights unless all vectors fit, also those of different coefficients."""
    one, first = next(iter(loaded.items()))
    for name, item in loaded.items():
        check_origin(item, str(first.metadata["origin"]), f"the vector of {name}")
        check_alike(first.tensors, item.tensors, f"the vector of {one}", f"the vector of {name}")


def _prefixed(
    prefix: str, operands: Mapping[str, TaskVector], weights: Mapping[str, float]
) -> dict[str, Tensor]:
    total = task_arithmetic(operands, weights)
    return {f"{prefix}.{name}": value for name, value in total.tensors.items()}
