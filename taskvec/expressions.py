"""The expression language of edits: `c * (mnist + digits)`, `a * sent + b * (lm_y - lm_a)`.

A name is a task vector where the caller says so and a coefficient otherwise. An expression must be
linear in the coefficients and in the vectors, so that the edited model is
``theta_0 + b_0 + sum_k c_k * basis_k`` (section 2 of arXiv:2212.04089, with one basis vector
a coefficient): each basis vector and the offset ``b_0`` are weighted sums of task vectors.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from lark import Lark, Tree
from lark.exceptions import UnexpectedInput

from taskvec.errors import InvalidExpression, nearest

MAX_LENGTH = 4096
MAX_DEPTH = 32
MAX_TERMS = 256
NAME = r"[A-Za-z][A-Za-z0-9_]{0,63}"

GRAMMAR = rf"""
    ?start: sum
    ?sum: product | sum "+" product -> add | sum "-" product -> subtract
    ?product: factor | product "*" factor -> multiply
    ?factor: atom | "-" factor -> negate
    ?atom: NUMBER -> number | NAME -> name | "(" sum ")"
    NAME: /{NAME}(?![A-Za-z0-9_])/
    NUMBER: /([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?/
    %ignore /[ \t\r\n]+/
"""

# One term is a number times at most one coefficient times at most one vector.
Term = tuple[str, str]  # (coefficient or "", vector or "")
Terms = dict[Term, float]


@dataclass(frozen=True)
class Edit:
    """An expression in normal form.

    Attributes:
        basis: coefficient name -> {vector name: weight}, both sorted by name; a coefficient whose
            terms cancel is not there.
        offset: the coefficient-free part, {vector name: weight}; empty if there is none.
    """

    basis: Mapping[str, Mapping[str, float]]
    offset: Mapping[str, float]

    @property
    def coefficients(self) -> tuple[str, ...]:
        """The names of the coefficients, sorted."""
        return tuple(self.basis)

    @property
    def vectors(self) -> tuple[str, ...]:
        """The names of all task vectors that the edit uses, sorted."""
        used = {name for weights in (*self.basis.values(), self.offset) for name in weights}
        return tuple(sorted(used))


def parse(text: str, vectors: Collection[str], coefficients: Collection[str]) -> Edit:
    """Return the normal form of an expression.

    Args:
        text: at most 4,096 characters, depth 32, 256 terms.
        vectors: the names that are task vectors.
        coefficients: the names that are coefficients; a name may not be both.

    Raises:
        InvalidExpression: it cannot be read, names something unknown, or is not linear.
    """
    tree = _tree(text)
    terms = _terms(tree, text, frozenset(vectors), frozenset(coefficients), depth=0)
    basis: dict[str, dict[str, float]] = {}
    offset: dict[str, float] = {}
    for (coefficient, vector), weight in sorted(terms.items()):
        if not vector:
            raise InvalidExpression(
                f"{text!r}: the term {coefficient or weight!r} names no task vector; "
                "every term must be a number or coefficient times a vector"
            )
        if not math.isfinite(weight):
            raise InvalidExpression(f"{text!r}: the weight of {vector!r} is too large for a float")
        if weight != 0.0:
            (basis.setdefault(coefficient, {}) if coefficient else offset)[vector] = weight
    if not basis and not offset:
        raise InvalidExpression(f"{text!r}: everything cancels; the edit would change nothing")
    return Edit(basis, offset)


def names(text: str) -> tuple[str, ...]:
    """Return every name in an expression, sorted: task vectors and coefficients alike."""
    # Not Tree.scan_values: it recurses, and nothing has checked the depth yet.
    leaves = _tree(text).iter_subtrees_topdown()
    return tuple(sorted({str(leaf.children[0]) for leaf in leaves if leaf.data == "name"}))


@cache
def _parser() -> Lark:
    return Lark(GRAMMAR, parser="lalr", propagate_positions=True)


def _tree(text: str) -> Tree[Any]:
    if len(text) > MAX_LENGTH:
        raise InvalidExpression(f"the expression has {len(text)} characters; at most {MAX_LENGTH}")
    try:
        tree: Tree[Any] = Tree("start", [_parser().parse(text)])
    except UnexpectedInput as error:
        token = getattr(error, "token", None)
        ended = token is not None and token.type == "$END"
        place = len(text) if ended else error.pos_in_stream or 0
        line = re.sub(r"\s", " ", text)
        raise InvalidExpression(
            f"cannot read the expression at character {place + 1}:\n  {line}\n  {' ' * place}^\n"
            "expected names, numbers, + - * and parentheses"
        ) from None
    leaves = sum(sub.data in ("name", "number") for sub in tree.iter_subtrees_topdown())
    if leaves > MAX_TERMS:
        raise InvalidExpression(
            f"the expression has {leaves} names and numbers; at most {MAX_TERMS}"
        )
    return tree


def _terms(
    tree: Tree[Any], text: str, vectors: frozenset[str], coefficients: frozenset[str], depth: int
) -> Terms:
    if depth > MAX_DEPTH:
        raise InvalidExpression(f"the expression is nested deeper than {MAX_DEPTH}")
    # A chain such as a + b + c leans to the left; it is long, not deep.
    leaning = tree.data in ("start", "add", "subtract", "multiply")
    children = [
        _terms(child, text, vectors, coefficients, depth + (place > 0 or not leaning))
        for place, child in enumerate(_operands(tree))
    ]
    match tree.data:
        case "number":
            return {("", ""): float(str(tree.children[0]))}
        case "name":
            return {_name(str(tree.children[0]), text, vectors, coefficients): 1.0}
        case "negate":
            result = _scale(children[0], -1.0)
        case "subtract":
            result = _sum([children[0], *(_scale(child, -1.0) for child in children[1:])])
        case "add":
            result = _sum(children)
        case "multiply":
            result = _product(children[0], children[1], text)
        case _:
            result = children[0]
    if len(result) > MAX_TERMS:
        raise InvalidExpression(f"the expression has more than {MAX_TERMS} terms")
    return result


def _operands(tree: Tree[Any]) -> list[Tree[Any]]:
    return [child for child in tree.children if isinstance(child, Tree)]


def _name(
    name: str, text: str, vectors: frozenset[str], coefficients: frozenset[str]
) -> tuple[str, str]:
    if name in vectors:
        return ("", name)
    if name in coefficients:
        return (name, "")
    raise InvalidExpression(
        f"{text!r}: {name!r} is neither a task nor a coefficient; "
        f"{nearest(name, vectors | coefficients)}"
    )


def _scale(terms: Terms, factor: float) -> Terms:
    return {key: factor * weight for key, weight in terms.items()}


def _sum(parts: list[Terms]) -> Terms:
    total: Terms = {}
    for part in parts:
        for key, weight in part.items():
            total[key] = total.get(key, 0.0) + weight
    return total


def _product(left: Terms, right: Terms, text: str) -> Terms:
    result: Terms = {}
    for (c_left, v_left), w_left in left.items():
        for (c_right, v_right), w_right in right.items():
            if v_left and v_right:
                raise InvalidExpression(
                    f"{text!r}: {v_left} * {v_right} multiplies two task vectors; "
                    "an edit must be linear in the vectors"
                )
            if c_left and c_right:
                raise InvalidExpression(
                    f"{text!r}: {c_left} * {c_right} multiplies two coefficients; "
                    "an edit must be linear in its coefficients"
                )
            key = (c_left or c_right, v_left or v_right)
            result[key] = result.get(key, 0.0) + w_left * w_right
    return result
