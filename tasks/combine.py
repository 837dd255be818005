"""Combine task vectors into the basis of an edit: one vector a coefficient."""

from collections.abc import Mapping

from tasks.artifacts import Artifacts
from tasks.inputs import check_origin, mapped
from tasks.stages import Emit
from taskvec import streaming
from taskvec.edits import evaluate
from taskvec.errors import IncompatibleWeights
from taskvec.expressions import names, parse
from taskvec.lazy import Lazy, check_shapes
from taskvec.mapped import Mapped, StoredVector

OFFSET = "offset"


def basis_prefix(alternative: int, coefficient: str) -> str:
    """Return what stands before the names of the parameters that a coefficient scales."""
    return f"{alternative}.basis.{coefficient}."


def offset_prefix(alternative: int) -> str:
    """Return what stands before the names of the parameters of the coefficient-free part."""
    return f"{alternative}.{OFFSET}."


def combine(
    artifacts: Artifacts, *, edit: str, seed: int, expression: str, vectors: list[str], emit: Emit
) -> None:
    """Write one vector a coefficient and, if there is one, the coefficient-free part.

    The edited model is ``theta_0 + offset + sum_k c_k * basis_k`` for any coefficients, so a
    coefficient's range may change without this stage. Options with several values give several
    alternatives, each with its own vectors.
    """
    coefficients = [name for name in names(expression) if name not in vectors]
    recipe = parse(expression, vectors, coefficients)
    loaded = {name: mapped(artifacts.vector(name, seed), "vector") for name in recipe.vectors}
    first = loaded[recipe.vectors[0]].metadata
    operands = stored_vectors(loaded)
    parts: dict[str, Lazy] = {}
    alternatives = recipe.alternatives()
    for number, alternative in enumerate(alternatives):
        for coefficient, sum_ in alternative.basis.items():
            parts[basis_prefix(number, coefficient)] = evaluate(sum_, operands)
        if alternative.offset:
            parts[offset_prefix(number)] = evaluate(alternative.offset, operands)
    streaming.write_vectors(
        artifacts.basis(edit, seed),
        parts,
        kind="basis",
        progress=lambda done, total: emit({"step": done, "steps": total}),
        coefficients=list(recipe.coefficients),
        choices=[dict(alternative.choice) for alternative in alternatives],
        digest=recipe.digest,
        expression=str(recipe),
        identity=first["identity"],
        operands={name: item.fingerprint for name, item in loaded.items()},
        origin=first["origin"],
    )


def stored_vectors(loaded: Mapping[str, Mapped]) -> dict[str, Lazy]:
    """Return opened vectors as operands; all must start from one origin and fit one another."""
    first = next(iter(loaded.values()))
    for name, item in loaded.items():
        check_origin(item, str(first.metadata["origin"]), f"the vector of {name}")
        wrong = [key for key, tensor in item.tensors.items() if tensor.dtype != "F32"]
        if wrong:
            raise IncompatibleWeights(
                f"{wrong[0]!r} of the vector of {name} is {item.tensors[wrong[0]].dtype}; vectors "
                "are float32: delete the file and run `taskvec run`"
            )
    operands: dict[str, Lazy] = {name: StoredVector(item) for name, item in loaded.items()}
    check_shapes(list(operands.values()))
    return operands
