"""Expressions computed: from names of vectors to the vector that is added to a model."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from taskvec import plugins
from taskvec.errors import IncompatibleWeights, InvalidExpression, InvalidInput
from taskvec.expressions import Call, Edit, Linear, Vector, parse
from taskvec.lazy import Lazy, combination, materialize
from taskvec.mapped import check_finite

if TYPE_CHECKING:
    from taskvec.vectors import TaskVector


def evaluate(sum_: Linear, vectors: Mapping[str, Lazy]) -> Lazy:
    """Return a weighted sum of vectors and methods, computed when it is read.

    Statistics that methods need (thresholds, inner products) are computed at once.

    Args:
        sum_: of an edit without choices: see `Edit.alternatives`.
        vectors: by name; equal names and shapes.
    """
    terms = [(_atom(atom, vectors), weight) for atom, weight in sum_.terms]
    if len(terms) == 1 and terms[0][1] == 1:
        return terms[0][0]
    return combination(terms)


def at(edit: Edit, coefficients: Mapping[str, float], vectors: Mapping[str, Lazy]) -> Lazy | None:
    """Return ``b_0 + sum_k c_k * basis_k``, or None if every coefficient is zero.

    Args:
        edit: without choices.
        coefficients: a value for each coefficient of the edit; no unit, any sign.
        vectors: by name.

    Raises:
        InvalidInput: not exactly the coefficients of the edit are given.
    """
    if coefficients.keys() != set(edit.coefficients):
        raise InvalidInput(
            f"the expression has the coefficients {', '.join(edit.coefficients) or 'none'}; "
            f"values are given for {', '.join(sorted(coefficients)) or 'none'}"
        )
    offset = edit.offset and evaluate(edit.offset, vectors)
    basis = {
        name: evaluate(sum_, vectors) for name, sum_ in edit.basis.items() if coefficients[name]
    }
    return weighted(basis, offset or None, coefficients)


def weighted(
    basis: Mapping[str, Lazy], offset: Lazy | None, coefficients: Mapping[str, float]
) -> Lazy | None:
    """Return ``offset + sum_k c_k * basis_k``, added in this order; None if nothing is left."""
    terms = [(offset, 1.0)] if offset else []
    terms += [(basis[name], coefficients[name]) for name in sorted(basis) if coefficients[name]]
    return combination(terms) if terms else None


def merge(method: str, vectors: Mapping[str, "TaskVector"], /, **options: Any) -> "TaskVector":
    """Return task vectors in memory merged by a method of taskvec/merging/, found by its name.

    Args:
        method: such as "ties"; docs/method.md says when to use which.
        vectors: name -> vector, all of one origin.
        options: of the method; what is left out has the published value.

    Raises:
        InvalidInput: the method or an option is unknown, or a value is impossible.
        IncompatibleWeights: the vectors have different origins, names or shapes.
    """
    try:
        given = plugins.complete("merging", method, options)
    except plugins.Misplaced as error:
        raise InvalidInput(": ".join([method, *map(str, error.place[1:]), str(error)])) from None
    ordered = plugins.constant("merging", method, "ORDERED", False)
    labels = list(vectors) if ordered else sorted(vectors)
    return _in_memory(
        lambda lazy: _call(method, {label: lazy[label] for label in labels}, given), vectors
    )


def edit_vector(
    expression: str, vectors: Mapping[str, "TaskVector"], /, **coefficients: float
) -> "TaskVector":
    """Return the vector that an expression stands for, in memory.

    Args:
        expression: such as ``"c * ties(mnist, digits, density=0.2)"``.
        vectors: name -> vector, all of one origin.
        coefficients: a value for each coefficient: ``c=0.4``.
    """
    edit = parse(expression, vectors, coefficients)
    if edit.choices:
        raise InvalidExpression(
            f"{expression!r}: {next(iter(edit.choices))} is a list; one value makes one vector"
        )

    def compute(lazy: Mapping[str, Lazy]) -> Lazy:
        nothing = combination([(next(iter(lazy.values())), 0.0)])
        return at(edit, coefficients, lazy) or nothing

    return _in_memory(compute, vectors)


def _in_memory(compute: Any, vectors: Mapping[str, "TaskVector"]) -> "TaskVector":
    if not vectors:
        raise InvalidInput("there are no vectors")
    first = next(iter(vectors.values()))
    for vector in vectors.values():
        if vector.origin != first.origin:
            raise IncompatibleWeights(
                f"the vectors start from different pre-trained weights ({first.origin[:12]} and "
                f"{vector.origin[:12]}); fine-tune all from one checkpoint"
            )
    lazy = {name: vector.lazy() for name, vector in vectors.items()}
    tensors = materialize(compute(lazy))
    for name, values in tensors.items():
        check_finite(values, name, "the result")
    return type(first).held(tensors, first.origin)


def _atom(atom: Vector | Call, vectors: Mapping[str, Lazy]) -> Lazy:
    if isinstance(atom, Vector):
        return vectors[atom.name]
    operands = {str(operand): evaluate(operand, vectors) for operand in atom.operands}
    return _call(atom.method, operands, dict(atom.options))


def _call(method: str, operands: Mapping[str, Lazy], options: Mapping[str, Any]) -> Lazy:
    function = getattr(plugins.load("merging", method), method)
    result: Lazy = function(operands, **options)
    return result
