"""The expression language of edits: `c * (mnist + digits)`, `a * ties(mnist, digits, density=0.2)`.

A name is a task vector where the caller says so and a coefficient otherwise. Methods of
taskvec/merging/ are called with vectors and options; `sum(*)` adds all vectors there are. An
expression must be linear in the coefficients, so that the edited model is
``theta_0 + b_0 + sum_k c_k * basis_k`` (section 2 of arXiv:2212.04089, with one basis vector a
coefficient): each basis vector and the offset ``b_0`` are weighted sums of task vectors and of
methods applied to task vectors. An option with a list of values stands for one edit a value.

Equal edits have equal text: `parse` sorts terms and the operands of methods that are symmetric,
fills in the options that are left out, and ``parse(str(edit)) == edit``.
"""

import hashlib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any

from taskvec import plugins
from taskvec.errors import InvalidExpression, nearest

if TYPE_CHECKING:
    from lark import Lark, Tree

MAX_LENGTH = 4096
MAX_DEPTH = 32
MAX_TERMS = 256
MAX_ALTERNATIVES = 64
NAME = r"[A-Za-z][A-Za-z0-9_]{0,63}"
SUM = "sum"

GRAMMAR = rf"""
    ?start: sum
    ?sum: product | sum "+" product -> add | sum "-" product -> subtract
    ?product: factor | product "*" factor -> multiply | product "/" factor -> divide
    ?factor: atom | "-" factor -> negate
    ?atom: NUMBER -> number | NAME -> name | call | "(" sum ")"
    call: NAME "(" argument ("," argument)* ")"
    ?argument: sum | "*" -> all | option
    ?option: NAME "=" value -> option | NAME "=" "[" value ("," value)* "]" -> choice
    value: SIGN? NUMBER | STRING | NAME
    SIGN: "-"
    NAME: /{NAME}(?![A-Za-z0-9_])/
    NUMBER: /([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?/
    STRING: /"[A-Za-z0-9_.-]{{0,64}}"|'[A-Za-z0-9_.-]{{0,64}}'/
    %ignore /[ \t\r\n]+/
"""

Value = bool | int | float | str


@dataclass(frozen=True)
class Vector:
    """A task vector."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Call:
    """A merging method applied to vectors.

    Attributes:
        operands: sorted by their text, unless the order matters to the method.
        options: all of the method's options, sorted; a tuple of values is a choice.
    """

    method: str
    operands: "tuple[Linear, ...]"
    options: tuple[tuple[str, Value | tuple[Value, ...]], ...]

    def __str__(self) -> str:
        options = [f"{name}={_written(value)}" for name, value in self.options]
        return f"{self.method}({', '.join([*map(str, self.operands), *options])})"


@dataclass(frozen=True)
class Linear:
    """A weighted sum of vectors and methods, sorted by their text; no weight is zero."""

    terms: "tuple[tuple[Vector | Call, float], ...]"

    def __str__(self) -> str:
        parts: list[str] = []
        for atom, weight in self.terms:
            size = "" if abs(weight) == 1 else f"{_number(abs(weight))} * "
            sign = ("-" if weight < 0 else "") if not parts else " - " if weight < 0 else " + "
            parts.append(f"{sign}{size}{atom}")
        return "".join(parts)


@dataclass(frozen=True)
class Edit:
    """An expression in normal form.

    Attributes:
        basis: coefficient name -> weighted sum, sorted by name; a coefficient whose terms cancel
            is not there.
        offset: the coefficient-free part; None if there is none.
        choice: the values that were chosen from lists: "ties.density" -> 0.2.
    """

    basis: Mapping[str, Linear]
    offset: Linear | None
    choice: Mapping[str, Value] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the canonical text: equal edits, and only they, have equal texts."""
        parts = [] if self.offset is None else [str(self.offset)]
        for name, sum_ in self.basis.items():
            (atom, weight), *more = sum_.terms
            if more:
                parts.append(f"{name} * ({sum_})")
            elif abs(weight) == 1:
                parts.append(f"{'-' if weight < 0 else ''}{name} * {atom}")
            else:
                parts.append(f"{_number(weight)} * {name} * {atom}")
        return parts[0] + "".join(
            f" - {part[1:]}" if part.startswith("-") else f" + {part}" for part in parts[1:]
        )

    @property
    def digest(self) -> str:
        """The SHA-256 (hex) of the canonical text, which identifies the edit."""
        return hashlib.sha256(str(self).encode()).hexdigest()

    @property
    def coefficients(self) -> tuple[str, ...]:
        """The names of the coefficients, sorted."""
        return tuple(self.basis)

    @property
    def atoms(self) -> "list[Vector | Call]":
        """All vectors and calls, also those inside calls, sorted by their text."""
        sums = [*self.basis.values(), *([self.offset] if self.offset else [])]
        return sorted({atom for sum_ in sums for atom in _atoms(sum_)}, key=str)

    @property
    def vectors(self) -> tuple[str, ...]:
        """The names of all task vectors that the edit uses, sorted."""
        return tuple(atom.name for atom in self.atoms if isinstance(atom, Vector))

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of all merging methods that the edit uses, sorted."""
        return tuple(sorted({atom.method for atom in self.atoms if isinstance(atom, Call)}))

    @property
    def choices(self) -> dict[str, tuple[Value, ...]]:
        """The options that are lists: "ties.density" -> (0.1, 0.2)."""
        return {label: values for label, (_, _, values) in self._choices().items()}

    def alternatives(self) -> "list[Edit]":
        """Return one edit a combination of the options that are lists; itself if there is none."""
        choices = self._choices()
        result = []
        for values in product(*(item[2] for item in choices.values())):
            chosen = {
                (call, option): value
                for (call, option, _), value in zip(choices.values(), values, strict=True)
            }
            basis = {name: _chosen(sum_, chosen) for name, sum_ in self.basis.items()}
            offset = self.offset and _chosen(self.offset, chosen)
            # Other values may stand in another order, so the text is brought to normal form again.
            edit = _normal(str(Edit(basis, offset)), self.vectors, self.coefficients)
            result.append(replace(edit, choice=dict(zip(choices, values, strict=True))))
        return result if choices else [self]

    def _choices(self) -> dict[str, tuple[Call, str, tuple[Value, ...]]]:
        result: dict[str, tuple[Call, str, tuple[Value, ...]]] = {}
        for atom in self.atoms:
            for option, value in atom.options if isinstance(atom, Call) else ():
                if isinstance(value, tuple):
                    label = name = f"{atom.method}.{option}"  # type: ignore[union-attr]
                    number = 1
                    while label in result:
                        number += 1
                        label = f"{name}_{number}"
                    result[label] = (atom, option, value)  # type: ignore[assignment]
        return result


# One term is a number times at most one coefficient times at most one vector or call.
Term = tuple[str, Vector | Call | None]
Terms = dict[Term, float]


def parse(text: str, vectors: Collection[str], coefficients: Collection[str]) -> Edit:
    """Return the normal form of an expression.

    Args:
        text: at most 4,096 characters, depth 32, 256 terms.
        vectors: the names that are task vectors; what `*` stands for.
        coefficients: the names that are coefficients; a name may not be both.

    Raises:
        InvalidExpression: it cannot be read, names something unknown, or is not linear.
    """
    edit = _normal(text, vectors, coefficients)
    number = math.prod(len(values) for values in edit.choices.values())
    if number > MAX_ALTERNATIVES:
        raise InvalidExpression(
            f"{text!r}: its options have {number} combinations; at most {MAX_ALTERNATIVES}"
        )
    try:
        if str(edit) != text:
            _normal(str(edit), vectors, coefficients)
    except InvalidExpression as error:
        raise InvalidExpression(f"written in full, with all options: {error}") from None
    for alternative in edit.alternatives():
        if alternative.coefficients != edit.coefficients:
            values = ", ".join(f"{key}={value}" for key, value in alternative.choice.items())
            raise InvalidExpression(f"{text!r}: with {values} two terms cancel")
    return edit


def _normal(text: str, vectors: Collection[str], coefficients: Collection[str]) -> Edit:
    """Return the normal form of an expression whose alternatives nobody has looked at."""
    reader = _Reader(text, frozenset(vectors), frozenset(coefficients))
    tree = _tree(text)
    basis: dict[str, dict[Vector | Call, float]] = {}
    offset: dict[Vector | Call, float] = {}
    for (coefficient, atom), weight in reader.terms(tree).items():
        if atom is None:
            raise InvalidExpression(
                f"{text!r}: the term {coefficient or _number(weight)!r} names no task vector; "
                "every term must be a number or coefficient times a vector"
            )
        (basis.setdefault(coefficient, {}) if coefficient else offset)[atom] = weight
    sums = {name: _linear(basis[name], text) for name in sorted(basis)}
    rest = _linear(offset, text)
    edit = Edit(
        {name: sum_ for name, sum_ in sums.items() if sum_.terms}, rest if rest.terms else None
    )
    if not edit.basis and edit.offset is None:
        raise InvalidExpression(f"{text!r}: everything cancels; the edit would change nothing")
    return edit


def names(text: str) -> tuple[str, ...]:
    """Return every name in an expression, sorted: task vectors and coefficients alike."""
    # Not Tree.scan_values: it recurses, and nothing has checked the depth yet.
    leaves = _tree(text).iter_subtrees_topdown()
    return tuple(sorted({str(leaf.children[0]) for leaf in leaves if leaf.data == "name"}))


@cache
def _parser() -> "Lark":
    from lark import Lark  # not needed by those who build an `Edit` themselves

    return Lark(GRAMMAR, parser="lalr", propagate_positions=True)


def _tree(text: str) -> "Tree[Any]":
    from lark import Tree
    from lark.exceptions import UnexpectedInput

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
            "expected names, numbers, + - * /, parentheses and methods: ties(a, b, density=0.2)"
        ) from None
    leaves = sum(
        sub.data in ("name", "number", "value", "all") for sub in tree.iter_subtrees_topdown()
    )
    if leaves > MAX_TERMS:
        raise InvalidExpression(
            f"the expression has {leaves} names and numbers; at most {MAX_TERMS}"
        )
    return tree


class _Reader:
    """Reads the tree of one expression."""

    def __init__(self, text: str, vectors: frozenset[str], coefficients: frozenset[str]) -> None:
        self._text = text
        self._vectors = vectors
        self._coefficients = coefficients

    def terms(self, tree: "Tree[Any]", depth: int = 0) -> Terms:
        """Return the terms of a part of the tree."""
        if depth > MAX_DEPTH:
            raise InvalidExpression(f"the expression is nested deeper than {MAX_DEPTH}")
        if tree.data == "call":
            return self._call(tree, depth)
        # A chain such as a + b + c leans to the left; it is long, not deep.
        leaning = tree.data in ("start", "add", "subtract", "multiply", "divide")
        children = [
            self.terms(child, depth + (place > 0 or not leaning))
            for place, child in enumerate(tree.children)
            if hasattr(child, "data")
        ]
        match tree.data:
            case "number":
                return {("", None): float(str(tree.children[0]))}
            case "name":
                return {self._name(str(tree.children[0])): 1.0}
            case "negate":
                result = _scale(children[0], -1.0)
            case "subtract":
                result = _sum([children[0], _scale(children[1], -1.0)])
            case "add":
                result = _sum(children)
            case "multiply":
                result = self._product(children[0], children[1], tree)
            case "divide":
                result = self._quotient(children[0], children[1], tree)
            case _:
                result = children[0]
        if len(result) > MAX_TERMS:
            raise InvalidExpression(f"the expression has more than {MAX_TERMS} terms")
        return result

    def _name(self, name: str) -> Term:
        if name in self._vectors:
            return ("", Vector(name))
        if name in self._coefficients:
            return (name, None)
        known = self._vectors | self._coefficients
        raise InvalidExpression(
            f"{self._text!r}: {name!r} is neither a task nor a coefficient; {nearest(name, known)}"
        )

    def _product(self, left: Terms, right: Terms, tree: "Tree[Any]") -> Terms:
        result: Terms = {}
        for (c_left, a_left), w_left in left.items():
            for (c_right, a_right), w_right in right.items():
                if a_left and a_right:
                    raise InvalidExpression(
                        f"{self._part(tree)} multiplies two task vectors, {a_left} and {a_right}; "
                        "an edit must be linear in the vectors"
                    )
                if c_left and c_right:
                    raise InvalidExpression(
                        f"{self._part(tree)} multiplies two coefficients, {c_left} and {c_right}; "
                        "an edit must be linear in its coefficients"
                    )
                key = (c_left or c_right, a_left or a_right)
                result[key] = result.get(key, 0.0) + w_left * w_right
        return result

    def _quotient(self, left: Terms, right: Terms, tree: "Tree[Any]") -> Terms:
        if set(right) != {("", None)} or not right["", None]:
            raise InvalidExpression(
                f"{self._part(tree)} divides by {self._words(tree.children[1])}; an edit is "
                "linear, so only numbers other than zero may divide"
            )
        return {key: weight / right["", None] for key, weight in left.items()}

    def _call(self, tree: "Tree[Any]", depth: int) -> Terms:
        method = str(tree.children[0])
        operands: list[Terms] = []
        options: dict[str, Value | tuple[Value, ...]] = {}
        for child in tree.children[1:]:
            if child.data == "all":
                operands += [{("", Vector(name)): 1.0} for name in sorted(self._vectors)]
            elif child.data in ("option", "choice"):
                self._option(child, options, tree)
            else:
                operands.append(self.terms(child, depth + 1))
        if method == SUM:
            if options or not operands:
                raise InvalidExpression(f"{self._part(tree)}: sum takes vectors and no options")
            return _sum(operands)
        sums = [self._operand(operand, tree) for operand in operands]
        self._check_operands(method, sums, tree)
        if not plugins.constant("merging", method, "ORDERED", False):
            sums.sort(key=str)
        call = Call(method, tuple(sums), self._all_options(method, options, tree))
        return {("", call): 1.0}

    def _option(
        self, child: "Tree[Any]", options: dict[str, Value | tuple[Value, ...]], tree: "Tree[Any]"
    ) -> None:
        name, *values = child.children
        if str(name) in options:
            raise InvalidExpression(f"{self._part(tree)}: the option {str(name)!r} stands twice")
        read = tuple(self._value(value) for value in values)
        if len(set(read)) < len(read):  # 1 and 1.0 are one value
            raise InvalidExpression(f"{self._part(tree)}: a value of {name} stands twice")
        options[str(name)] = read if child.data == "choice" and len(read) > 1 else read[0]

    def _value(self, value: "Tree[Any]") -> Value:
        token = value.children[-1]
        text, kind = str(token), token.type  # type: ignore[union-attr]
        if kind == "STRING":
            return text[1:-1]
        if kind == "NAME":
            if text not in ("true", "false"):
                raise InvalidExpression(
                    f"{self._part(value)} is no value; expected a number, true, false or a text in "
                    f'quotes, such as "{text}"'
                )
            return text == "true"
        number = int(text) if text.isdigit() else float(text)
        if not math.isfinite(float(text)):
            raise InvalidExpression(f"{self._part(value)} is too large for a float")
        return -number if len(value.children) > 1 and number else number

    def _operand(self, terms: Terms, tree: "Tree[Any]") -> Linear:
        free = sorted({coefficient for coefficient, _ in terms if coefficient})
        if free:
            raise InvalidExpression(
                f"{self._part(tree)}: the coefficient {free[0]!r} stands inside a method, which is "
                f"not linear in it; write it outside: {free[0]} * {tree.children[0]}(...)"
            )
        if any(atom is None for _, atom in terms):
            raise InvalidExpression(f"{self._part(tree)}: a number stands where a vector must")
        found = _linear({atom: weight for (_, atom), weight in terms.items() if atom}, self._text)
        if not found.terms:
            raise InvalidExpression(f"{self._part(tree)}: an operand cancels to nothing")
        return found

    def _check_operands(self, method: str, sums: list[Linear], tree: "Tree[Any]") -> None:
        known = plugins.names("merging")
        if method not in known:
            raise InvalidExpression(
                f"{self._part(tree)}: {method!r} is no method; {nearest(method, [SUM, *known])}"
            )
        if plugins.constant("merging", method, "STATISTICS", ()):
            raise InvalidExpression(
                f"{self._part(tree)}: {method} needs statistics of data, which no stage computes"
            )
        wanted = plugins.constant("merging", method, "OPERANDS", 0)
        if not sums or (wanted and len(sums) != wanted):
            raise InvalidExpression(
                f"{self._part(tree)}: {method} takes {wanted or 'one or more'} vectors, "
                f"found {len(sums)}"
            )
        if len(set(sums)) < len(sums):
            twice = next(item for item in sums if sums.count(item) > 1)
            raise InvalidExpression(f"{self._part(tree)}: the operand {twice} stands twice")

    def _all_options(
        self, method: str, given: Mapping[str, Value | tuple[Value, ...]], tree: "Tree[Any]"
    ) -> tuple[tuple[str, Value | tuple[Value, ...]], ...]:
        try:
            options = plugins.complete("merging", method, given)
        except plugins.Misplaced as error:
            where = "".join(f"{key}: " for key in error.place[1:])
            raise InvalidExpression(f"{self._part(tree)}: {where}{error}") from None
        return tuple(sorted(options.items()))

    def _words(self, tree: "Tree[Any]") -> str:
        return self._text[tree.meta.start_pos : tree.meta.end_pos]

    def _part(self, tree: "Tree[Any]") -> str:
        """Return the offending part as it was written, with its place if it is not everything."""
        words = self._words(tree)
        if words == self._text.strip():
            return repr(words)
        return f"{words!r} (character {tree.meta.start_pos + 1} of {self._text!r})"


def _linear(terms: Mapping[Vector | Call, float], text: str) -> Linear:
    for atom, weight in terms.items():
        if not math.isfinite(weight):
            raise InvalidExpression(f"{text!r}: the weight of {atom} is too large for a float")
    kept = [(atom, weight) for atom, weight in terms.items() if weight != 0.0]
    return Linear(tuple(sorted(kept, key=lambda term: str(term[0]))))


def _atoms(sum_: Linear) -> "Iterator[Vector | Call]":
    for atom, _ in sum_.terms:
        yield atom
        for operand in atom.operands if isinstance(atom, Call) else ():
            yield from _atoms(operand)


def _chosen(sum_: Linear, chosen: Mapping[tuple[Call, str], Value]) -> Linear:
    """Return a sum with every list replaced by its chosen value."""

    def replace(atom: Vector | Call) -> Vector | Call:
        if isinstance(atom, Vector):
            return atom
        options = tuple((name, chosen.get((atom, name), value)) for name, value in atom.options)
        return Call(atom.method, tuple(_chosen(o, chosen) for o in atom.operands), options)

    return Linear(tuple((replace(atom), weight) for atom, weight in sum_.terms))


def _scale(terms: Terms, factor: float) -> Terms:
    return {key: factor * weight for key, weight in terms.items()}


def _sum(parts: list[Terms]) -> Terms:
    total: Terms = {}
    for part in parts:
        for key, weight in part.items():
            total[key] = total.get(key, 0.0) + weight
    return total


def _number(value: float) -> str:
    return str(int(value)) if abs(value) < 1e15 and value == int(value) else repr(value)


def _written(value: Value | tuple[Value, ...]) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)
