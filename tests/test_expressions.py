"""The expression language against a naive evaluator, and everything it must refuse."""

import random
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from taskvec import plugins
from taskvec.errors import InvalidExpression
from taskvec.expressions import (
    MAX_ALTERNATIVES,
    MAX_DEPTH,
    MAX_LENGTH,
    MAX_TERMS,
    Call,
    Edit,
    Linear,
    Vector,
    names,
    parse,
)

VECTORS = ("mnist", "digits", "lm_y", "lm_a", "sent")
COEFFICIENTS = ("a", "b", "c")


def read(text: str) -> Edit:
    return parse(text, VECTORS, COEFFICIENTS)


def refused(text: str) -> str:
    with pytest.raises(InvalidExpression) as caught:
        read(text)
    assert caught.value.exit_code == 3
    return str(caught.value)


# A naive evaluator: trees are printed for the parser and computed directly


@dataclass(frozen=True)
class Node:
    """An expression: a name or a number with no operands, an operator, or a call of a method."""

    symbol: str
    operands: tuple["Node", ...] = ()
    options: tuple[tuple[str, str], ...] = ()


def printed(node: Node) -> str:
    parts = [printed(operand) for operand in node.operands]
    if not parts:
        return node.symbol
    if node.symbol.isidentifier():
        return f"{node.symbol}({', '.join(parts + [f'{k}={v}' for k, v in node.options])})"
    if len(parts) == 1:
        return f"(-{parts[0]})"
    return f"({parts[0]} {node.symbol} {parts[1]})"


def call_value(method: str, operands: list[Fraction], options: Mapping[str, Any]) -> Fraction:
    """Stand for a method: any function of the operands that is not linear."""
    if method != "slerp":
        operands = sorted(operands)
    values = [(name, x if isinstance(x, str) else float(x)) for name, x in options.items()]
    found = repr((method, operands, sorted(values)))
    return Fraction(zlib.crc32(found.encode()) % 1009 - 504)


def evaluated(node: Node, values: dict[str, Fraction]) -> Fraction:
    found = [evaluated(operand, values) for operand in node.operands]
    if not found:
        return values[node.symbol] if node.symbol in values else Fraction(node.symbol)
    if node.symbol == "sum":
        return sum(found, Fraction())
    if node.symbol.isidentifier():
        given_options = {
            name: text[1:-1] if text[0] in "'\"" else float(text) for name, text in node.options
        }
        return call_value(node.symbol, found, {**DEFAULTS[node.symbol], **given_options})
    if len(found) == 1:
        return -found[0]
    left, right = found
    match node.symbol:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
    return left / right


def linear_value(sum_: Linear, values: dict[str, Fraction]) -> Fraction:
    return sum((Fraction(w) * atom_value(atom, values) for atom, w in sum_.terms), Fraction())


def atom_value(atom: Vector | Call, values: dict[str, Fraction]) -> Fraction:
    if isinstance(atom, Vector):
        return values[atom.name]
    operands = [linear_value(operand, values) for operand in atom.operands]
    return call_value(atom.method, operands, dict(atom.options))


def edit_value(edit: Edit, values: dict[str, Fraction]) -> Fraction:
    found = linear_value(edit.offset, values) if edit.offset else Fraction()
    for coefficient, sum_ in edit.basis.items():
        found += values[coefficient] * linear_value(sum_, values)
    return found


DEFAULTS: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.2, "scope": "flat", "variant": "mean"},
    "dare": {"p": 0.5, "rescale": "unbiased", "seed": 0},
    "slerp": {"t": 0.5},
    "average": {},
}
OPTIONS: dict[str, dict[str, list[str]]] = {
    "ties": {"density": ["1", ".5", "2e-1"], "variant": ["'sum'", '"mean"'], "scope": ["'tensor'"]},
    "dare": {"p": ["0", "0.25"], "seed": ["0", "-3", "12"], "rescale": ["'none'"]},
    "slerp": {"t": ["0", "0.5", "1.0"]},
    "average": {},
    "sum": {},
}
# Powers of two, so that floats compute with them exactly.
NUMBERS = st.sampled_from(["0", "1", "2", "0.5", "3", ".25", "1e1", "2.", "5E-1"]).map(Node)
DIVISORS = st.sampled_from(["2", ".5", "4."]).map(Node)


def sums(leaves: st.SearchStrategy[Node], size: int = 6) -> st.SearchStrategy[Node]:
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.tuples(inner).map(lambda pair: Node("-", pair)),
            st.builds(lambda op, x, y: Node(op, (x, y)), st.sampled_from("+-"), inner, inner),
        ),
        max_leaves=size,
    )


def products(*factors: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    """Multiply what the factors give, in any order; perhaps divide."""

    def fold(nodes: list[Node], divisor: Node | None) -> Node:
        result = nodes[0]
        for node in nodes[1:]:
            result = Node("*", (result, node))
        return Node("/", (result, divisor)) if divisor else result

    ordered = st.tuples(*factors).flatmap(lambda found: st.permutations(found))
    return st.builds(fold, ordered, st.none() | DIVISORS)


@st.composite
def calls(draw: st.DrawFn, operands: st.SearchStrategy[Node]) -> Node:
    method = draw(st.sampled_from(sorted(OPTIONS)))
    least, most = (2, 2) if method == "slerp" else (1, 3)
    found = draw(st.lists(operands, min_size=least, max_size=most))
    options = {
        name: draw(st.sampled_from(values))
        for name, values in OPTIONS[method].items()
        if draw(st.booleans())
    }
    return Node(method, tuple(found), tuple(options.items()))


SCALARS = sums(NUMBERS, 3)
LEAVES = st.sampled_from(VECTORS).map(Node)
SPANS = st.recursive(
    LEAVES | products(LEAVES, SCALARS),
    lambda inner: st.one_of(sums(inner, 3), calls(inner), products(inner, SCALARS)),
    max_leaves=6,
)
FREE = st.sampled_from(COEFFICIENTS).map(Node)
TREES = sums(st.one_of(SPANS, products(FREE, SPANS), products(SCALARS, sums(FREE, 3), SPANS)))
EXPECTED = ("everything cancels", "cancels to nothing", "stands twice", "nested deeper")


def normal(tree: Node) -> Edit:
    """Return the normal form of a tree; another tree must be drawn if it has none."""
    try:
        return read(printed(tree))
    except InvalidExpression as error:
        assert any(words in str(error) for words in EXPECTED), error
        assume("everything cancels" in str(error))
        return Edit({}, None)


@settings(deadline=None)
@given(TREES, st.lists(st.integers(-9, 9), min_size=8, max_size=8))
def test_the_normal_form_has_the_value_of_the_expression(tree: Node, values: list[int]) -> None:
    drawn = map(Fraction, values)
    given_values = dict(zip((*VECTORS, *COEFFICIENTS), drawn, strict=True))
    edit = normal(tree)
    assert edit_value(edit, given_values) == evaluated(tree, given_values)
    assert set(edit.vectors) | set(edit.coefficients) <= set(names(printed(tree)))
    for sum_ in [*edit.basis.values(), *([edit.offset] if edit.offset else [])]:
        assert sum_.terms and all(weight for _, weight in sum_.terms)


@settings(deadline=None)
@given(TREES)
def test_reading_the_text_of_an_edit_gives_the_edit(tree: Node) -> None:
    edit = normal(tree)
    assume(edit.basis or edit.offset)
    again = read(str(edit))
    assert again == edit
    assert str(again) == str(edit)
    assert again.digest == edit.digest


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", *COEFFICIENTS]),
            st.sampled_from(VECTORS),
            st.floats(allow_nan=False, allow_infinity=False).filter(bool),
            st.floats(0, 1, exclude_min=True),
            st.booleans(),
        ),
        min_size=1,
        max_size=5,
        unique_by=lambda term: term[:2],
    )
)
def test_every_float_is_written_so_that_it_is_read_again(terms: list[Any]) -> None:
    parts = []
    for coefficient, vector, weight, density, call in terms:
        atom = f"ties({vector}, density={density!r})" if call else vector
        parts.append(f"({weight!r}) * {coefficient or '1'} * {atom}")
    edit = read(" + ".join(parts))
    weights = {
        (name, str(atom).removeprefix("ties(").partition(",")[0]): weight
        for name, sum_ in {**edit.basis, **({"": edit.offset} if edit.offset else {})}.items()
        for atom, weight in sum_.terms
    }
    assert weights == {(c, vector): weight for c, vector, weight, _, _ in terms}
    assert read(str(edit)) == edit


def shuffled(node: Node, rng: random.Random) -> Node:
    """Return a tree of the same value: other orders of terms, factors, operands and options."""
    operands = [shuffled(operand, rng) for operand in node.operands]
    options = list(node.options)
    if node.symbol not in ("-", "/", "slerp"):
        rng.shuffle(operands)
    rng.shuffle(options)
    return Node(node.symbol, tuple(operands), tuple(options))


@settings(deadline=None)
@given(TREES, st.randoms(use_true_random=False))
def test_the_order_of_terms_operands_and_options_does_not_matter(
    tree: Node, rng: random.Random
) -> None:
    edit = normal(tree)
    assume(edit.basis or edit.offset)
    other = read(printed(shuffled(tree, rng)))
    assert str(other) == str(edit)
    assert other.digest == edit.digest
    assert other == edit


def form(basis: dict[str, dict[str, float]], offset: dict[str, float]) -> Edit:
    """Return a normal form of plain vectors."""

    def linear(weights: dict[str, float]) -> Linear:
        return Linear(tuple((Vector(name), weights[name]) for name in sorted(weights)))

    return Edit(
        {name: linear(basis[name]) for name in sorted(basis)}, linear(offset) if offset else None
    )


@pytest.mark.parametrize(
    ("text", "basis", "offset", "canonical"),
    [
        ("mnist", {}, {"mnist": 1}, "mnist"),
        (
            "c * (mnist + digits)",
            {"c": {"mnist": 1, "digits": 1}},
            {},
            "c * (digits + mnist)",
        ),
        ("-c * mnist", {"c": {"mnist": -1}}, {}, "-c * mnist"),
        (
            "b*(lm_y - lm_a) + a*sent",
            {"a": {"sent": 1}, "b": {"lm_y": 1, "lm_a": -1}},
            {},
            "a * sent + b * (-lm_a + lm_y)",
        ),
        ("mnist * c", {"c": {"mnist": 1}}, {}, "c * mnist"),
        ("sent + c * mnist", {"c": {"mnist": 1}}, {"sent": 1}, "sent + c * mnist"),
        (
            "0.5 * mnist - .25*digits",
            {},
            {"mnist": 0.5, "digits": -0.25},
            "-0.25 * digits + 0.5 * mnist",
        ),
        (
            "mnist - digits - sent",
            {},
            {"mnist": 1, "digits": -1, "sent": -1},
            "-digits + mnist - sent",
        ),
        (
            "mnist - (digits - sent)",
            {},
            {"mnist": 1, "digits": -1, "sent": 1},
            "-digits + mnist + sent",
        ),
        ("mnist + 2 * digits * 3", {}, {"mnist": 1, "digits": 6}, "6 * digits + mnist"),
        ("--mnist", {}, {"mnist": 1}, "mnist"),
        ("2 * -3 * mnist", {}, {"mnist": -6}, "-6 * mnist"),
        ("mnist - -digits", {}, {"mnist": 1, "digits": 1}, "digits + mnist"),
        ("-mnist * 2 + digits", {}, {"mnist": -2, "digits": 1}, "digits - 2 * mnist"),
        (
            "(1 + 2) * (a + b) * mnist",
            {"a": {"mnist": 3}, "b": {"mnist": 3}},
            {},
            "3 * a * mnist + 3 * b * mnist",
        ),
        ("c * mnist - c * mnist + sent", {}, {"sent": 1}, "sent"),
        ("c * mnist + 0 * digits", {"c": {"mnist": 1}}, {}, "c * mnist"),
        ("1e-3*mnist", {}, {"mnist": 0.001}, "0.001 * mnist"),
        ("1e20*mnist", {}, {"mnist": 1e20}, "1e+20 * mnist"),
        ("\tc\n*\r\n mnist ", {"c": {"mnist": 1}}, {}, "c * mnist"),
        (
            "c * (mnist + digits) / 2",
            {"c": {"mnist": 0.5, "digits": 0.5}},
            {},
            "c * (0.5 * digits + 0.5 * mnist)",
        ),
        ("mnist / 2 / 2", {}, {"mnist": 0.25}, "0.25 * mnist"),
        ("mnist / (2 / 2)", {}, {"mnist": 1}, "mnist"),
        ("2 / 4 * mnist", {}, {"mnist": 0.5}, "0.5 * mnist"),
        ("mnist / -2", {}, {"mnist": -0.5}, "-0.5 * mnist"),
        ("sum(mnist, c * digits)", {"c": {"digits": 1}}, {"mnist": 1}, "mnist + c * digits"),
        ("sum(mnist)", {}, {"mnist": 1}, "mnist"),
        (
            "-a * sum(*) - b * sent",
            {"a": dict.fromkeys(VECTORS, -1), "b": {"sent": -1}},
            {},
            "a * (-digits - lm_a - lm_y - mnist - sent) - b * sent",
        ),
        ("-0.5 * mnist - 2 * c * sent", {"c": {"sent": -2}}, {"mnist": -0.5},
         "-0.5 * mnist - 2 * c * sent"),
    ],
)  # fmt: skip
def test_golden_normal_forms(
    text: str, basis: dict[str, dict[str, float]], offset: dict[str, float], canonical: str
) -> None:
    assert read(text) == form(basis, offset)
    assert str(read(text)) == canonical


def test_the_normal_form_is_sorted_and_lists_what_it_uses() -> None:
    edit = read("b * ties(sent, -lm_a) + a * (mnist + digits) + dare(dare(lm_y))")
    assert edit.coefficients == ("a", "b")
    assert edit.vectors == ("digits", "lm_a", "lm_y", "mnist", "sent")
    assert edit.methods == ("dare", "ties")
    assert [str(atom) for atom, _ in edit.basis["a"].terms] == ["digits", "mnist"]
    assert edit.choices == {}
    assert edit.alternatives() == [edit]
    assert read("mnist").methods == ()


# Methods


def test_options_that_are_left_out_have_the_published_values() -> None:
    expected = 'ties(digits, mnist, density=0.2, scope="flat", variant="mean")'
    same = [
        "ties(mnist, digits)",
        "ties(digits, mnist, density=0.2)",
        "ties(density=.2, mnist, variant='mean', digits)",
        'ties(mnist, digits, scope="flat", density=2e-1, variant="mean")',
    ]
    assert {str(read(text)) for text in same} == {expected}
    assert len({read(text).digest for text in same}) == 1
    call = read(same[0]).atoms[-1]
    assert isinstance(call, Call)
    assert dict(call.options) == {"density": 0.2, "scope": "flat", "variant": "mean"}
    assert read("ties(mnist, digits, density=0.3)").digest != read(same[0]).digest


def test_whole_numbers_are_floats_where_floats_are_expected_and_only_there() -> None:
    assert str(read("ties(mnist, density=1)")) == str(read("ties(mnist, density=1.0)"))
    assert "density=1.0" in str(read("ties(mnist, density=1)"))
    assert "seed=1)" in str(read("dare(mnist, p=0, seed=1)"))
    assert "expected int, found 1.0" in refused("dare(mnist, seed=1.0)")


def test_minus_zero_is_zero() -> None:
    one, other = read("dare(mnist, p=-0.0, seed=-0)"), read("dare(mnist, p=0, seed=0)")
    assert str(one) == str(other)
    assert one == other


def test_the_order_of_operands_matters_to_some_methods_only() -> None:
    assert str(read("slerp(mnist, digits)")) == "slerp(mnist, digits, t=0.5)"
    assert read("slerp(mnist, digits)").digest != read("slerp(digits, mnist)").digest
    assert read("ties(mnist, digits)").digest == read("ties(digits, mnist)").digest


def test_a_star_stands_for_all_vectors() -> None:
    everything = ", ".join(VECTORS)
    assert str(read("ties(*)")) == str(read(f"ties({everything})"))
    assert str(read("c * average(*)")) == f"c * average({', '.join(sorted(VECTORS))})"
    assert parse("ties(*)", ["mnist"], []).vectors == ("mnist",)
    assert "stands twice" in refused("ties(*, mnist)")
    with pytest.raises(InvalidExpression, match="takes one or more vectors, found 0"):
        parse("ties(*)", [], [])
    with pytest.raises(InvalidExpression, match="sum takes vectors"):
        parse("sum(*)", [], [])


def test_operands_are_expressions_and_methods_nest() -> None:
    text = "c * lines(ties(dare(mnist, p=0.9), 0.5 * digits - sent), beta=1) / 2"
    edit = read(text)
    assert edit.coefficients == ("c",)
    assert edit.vectors == ("digits", "mnist", "sent")
    assert edit.methods == ("dare", "lines", "ties")
    assert str(edit).startswith("0.5 * c * lines(ties(0.5 * digits - sent, dare(mnist, p=0.9,")


def test_what_stands_in_a_method_is_no_term_of_the_edit() -> None:
    edit = read("ties(mnist) - mnist")
    assert edit.offset is not None
    assert [str(atom) for atom, _ in edit.offset.terms] == ["mnist", str(read("ties(mnist)"))]


# Lists of values


def test_a_list_of_values_stands_for_one_edit_a_value() -> None:
    edit = read("c * ties(mnist, digits, density=[0.3, 0.1, 1])")
    assert "density=[0.3, 0.1, 1.0]" in str(edit)
    assert edit.choices == {"ties.density": (0.3, 0.1, 1.0)}
    assert [alternative.choice for alternative in edit.alternatives()] == [
        {"ties.density": 0.3}, {"ties.density": 0.1}, {"ties.density": 1.0},
    ]  # fmt: skip
    for alternative in edit.alternatives():
        density = alternative.choice["ties.density"]
        plain = read(f"c * ties(mnist, digits, density={density})")
        assert str(alternative) == str(plain)
        assert alternative.basis == plain.basis
        assert alternative.choices == {}
        assert not plain.choice
    assert read(str(edit)) == edit


def test_one_value_is_no_list() -> None:
    assert read("ties(mnist, density=[0.2])") == read("ties(mnist)")


def test_lists_multiply_and_the_last_varies_fastest() -> None:
    edit = read("c * dare(mnist, p=[0.1, 0.2]) + ties(sent, variant=['sum', 'mean'])")
    assert [tuple(item.choice.items()) for item in edit.alternatives()] == [
        (("dare.p", p), ("ties.variant", how)) for p in (0.1, 0.2) for how in ("sum", "mean")
    ]  # fmt: skip
    assert str(edit.alternatives()[0]) == str(
        read("c * dare(mnist, p=0.1) + ties(sent, variant='sum')")
    )


def test_the_same_list_in_equal_calls_is_one_choice() -> None:
    call = "ties(mnist, digits, density=[0.1, 0.2])"
    edit = read(f"a * {call} + b * dare({call}) - {call}")
    assert edit.choices == {"ties.density": (0.1, 0.2)}
    for alternative in edit.alternatives():
        one = f"ties(mnist, digits, density={alternative.choice['ties.density']})"
        assert str(alternative) == str(read(f"a * {one} + b * dare({one}) - {one}"))


def test_lists_in_different_calls_are_choices_of_their_own() -> None:
    edit = read("a * ties(mnist, density=[0.1, 0.2]) + b * ties(digits, density=[0.3, 0.4])"
                "+ ties(sent, density=[0.5, 0.6])")  # fmt: skip
    assert edit.choices == {
        "ties.density": (0.3, 0.4),
        "ties.density_2": (0.1, 0.2),
        "ties.density_3": (0.5, 0.6),
    }
    assert len(edit.alternatives()) == 8
    last = edit.alternatives()[-1]
    assert str(last) == str(
        read("a*ties(mnist, density=0.2) + b*ties(digits, density=0.4) + ties(sent, density=0.6)")
    )
    assert last.choice == {"ties.density": 0.4, "ties.density_2": 0.2, "ties.density_3": 0.6}


@pytest.mark.parametrize(
    "text",
    [
        "ties(mnist, density=[0.1, 0.5]) + ties(mnist, density=0.3)",
        "ties(dare(mnist, p=[0.1, 0.5]), dare(mnist, p=0.3))",
        "slerp(dare(mnist, p=[0.1, 0.5]), dare(mnist, p=0.3))",
        "c * (dare(mnist, p=[0.5, 0.1, 0.9]) - dare(mnist, p=[0.3, 0.7, 0.95]))",
        "ties(mnist, density=[0.1, 0.5], scope=['flat', 'tensor'], variant=['sum', 'mean'])",
        "lines(dare(dare(ties(mnist, density=[0.2, 0.1]), p=[0.1, 0.2])))",
        "dare(mnist, p=[0.1, 0.3]) + dare(mnist, p=0.3)",
        "c * sent + dare(mnist, p=[0.1, 0.3]) - dare(mnist, p=0.3)",
    ],
)
def test_alternatives_are_in_normal_form_too(text: str) -> None:
    alternatives = read(text).alternatives()
    assert len({str(alternative) for alternative in alternatives}) == len(alternatives) > 1
    for alternative in alternatives:
        again = read(str(alternative))
        assert (again.basis, again.offset) == (alternative.basis, alternative.offset)


@pytest.mark.parametrize(
    "text",
    [
        "ties(dare(mnist, p=[0.1, 0.3]), dare(mnist, p=0.3))",
        "dare(mnist, p=[0.1, 0.3]) - dare(mnist, p=0.3)",
        "c * (dare(mnist, p=[0.1, 0.3]) - dare(mnist, p=0.3)) + sent",
    ],
)
def test_values_that_make_two_calls_one_are_refused(text: str) -> None:
    refused(text)


def test_too_many_combinations_are_refused() -> None:
    def lists(count: int) -> str:
        values = ", ".join(str(1 + i) for i in range(count))
        return f"dare(mnist, p=[0.1, 0.2], seed=[{values}])"

    assert len(read(lists(MAX_ALTERNATIVES // 2)).alternatives()) == MAX_ALTERNATIVES
    message = refused(lists(MAX_ALTERNATIVES // 2 + 1))
    assert f"{MAX_ALTERNATIVES + 2} combinations; at most {MAX_ALTERNATIVES}" in message


# What is refused


def test_names_are_all_tasks_and_coefficients_known_or_not() -> None:
    call = "c * ties(mnist, -sum(nobody), density=[0.1, 0.2], variant='sum') / (2 * d)"
    assert names(call) == ("c", "d", "mnist", "nobody")
    assert names("sum(*)") == ()
    assert names("c * (mnist + nobody) - 2 * c * mnist") == ("c", "mnist", "nobody")


@pytest.mark.parametrize("text", ["mnist * digits", "c * mnist * mnist", "mnist * (c * digits)"])
def test_products_of_task_vectors_are_refused(text: str) -> None:
    assert "multiplies two task vectors" in refused(text)


@pytest.mark.parametrize("text", ["a * b * mnist", "c * (c * mnist)", "(a + b) * (mnist * a)"])
def test_products_of_coefficients_are_refused(text: str) -> None:
    assert "multiplies two coefficients" in refused(text)


def test_unknown_names_are_refused_with_the_nearest_ones() -> None:
    message = refused("c * (mnist + digit)")
    assert "'digit' is neither a task nor a coefficient" in message
    assert "did you mean 'digits'" in message
    assert "lm_a" in message


@pytest.mark.parametrize(
    "text",
    ["1", "2 * 3", "c", "c * 2", "mnist + 1", "c + c * mnist", "1 - 1", "1e999", "1e999 - 1e999",
     "c * 1e999", "-1e999", "sum(1, mnist)", "c / 2"],
)  # fmt: skip
def test_terms_without_a_task_vector_are_refused(text: str) -> None:
    assert "names no task vector" in refused(text)


@pytest.mark.parametrize(
    "text",
    ["mnist - mnist", "c*mnist - mnist*c", "0 * mnist", "1e-400*mnist", "mnist / 1e999",
     "ties(mnist, sent) - ties(sent, mnist, density=0.2)", "c * sum(*) - c * sum(*)"],
)  # fmt: skip
def test_edits_that_change_nothing_are_refused(text: str) -> None:
    assert "everything cancels" in refused(text)


@pytest.mark.parametrize(
    "text",
    ["1e999 * mnist", "1e308*10*mnist", "c*1e999*mnist*0", "9" * 400 + "*sent",
     "mnist / 1e-308 / 1e-9",
     "mnist / (1e999 - 1e999)", "ties(1e999 * mnist)", "ties(mnist, density=1e999)",
     f"ties(mnist, density={'9' * 400})", f"dare(mnist, seed=-{'9' * 400})",
     f"lines(mnist, beta=[1, {'9' * 400}])"],
    ids=range(11),
)  # fmt: skip
def test_weights_that_no_float_holds_are_refused(text: str) -> None:
    assert "too large for a float" in refused(text)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", 1),
        ("mnist +", 8),
        ("mnist digits", 7),
        ("2mnist", 2),
        ("(mnist", 7),
        ("mnist)", 6),
        ("c % mnist", 3),
        ("mnist /", 8),
        ("ties(mnist", 11),
        ("ties(mnist,)", 12),
        ("ties()", 6),
        ("ties(*", 7),
        ("ties(-*)", 7),
        ("mnist + *", 9),
        ("mnist(digits)(sent)", 14),
        ("ties(mnist, density=)", 21),
        ("ties(mnist, density=[])", 22),
        ("ties(mnist, density=[1, [2]])", 25),
        ("ties(mnist, density=1 + 1)", 23),
        ("ties(mnist, density=-digits)", 22),
        ("ties(mnist density=1)", 12),
        ("ties(mnist, variant='a b')", 21),
        ("ties(mnist, variant='mean\")", 21),
        ("mnist ** 2", 8),
        ("c * mnist; 1", 10),
        ("__import__('os')", 1),
        ("mnist.T", 6),
        ("mnist +\n* c", 9),
        ("+mnist", 1),
        ("a" * 65, 1),
        ("1_000 * mnist", 2),
    ],
)
def test_what_is_no_expression_is_refused_with_its_place(text: str, place: int) -> None:
    message = refused(text)
    assert f"at character {place}:" in message
    caret = message.splitlines()[2]
    assert caret == "  " + " " * (place - 1) + "^"


@pytest.mark.parametrize(
    "text", ["mnıst", "é * mnist", "mnist\u200b", "с * mnist", "٣ * mnist", "c\xa0* mnist"]
)
def test_only_ascii_letters_digits_and_spaces_are_read(text: str) -> None:
    assert "cannot read" in refused(text)


def test_the_longest_names_are_read() -> None:
    name = "a" * 64
    assert parse(name, [name], []).vectors == (name,)


def test_long_expressions_are_refused() -> None:
    padded = "mnist" + " " * (MAX_LENGTH - 5)
    assert read(padded).vectors == ("mnist",)
    assert f"at most {MAX_LENGTH}" in refused(padded + " ")


@pytest.mark.parametrize("deep", ["negation", "product", "difference", "call", "second", "sum"])
def test_deep_expressions_are_refused(deep: str) -> None:
    def nested(depth: int) -> str:
        if deep == "negation":
            return "-" * depth + "mnist"
        opening = {
            "product": "2*(", "difference": "digits-(", "call": "dare(", "second": "ties(digits, ",
            "sum": "sum(",
        }[deep]  # fmt: skip
        return opening * depth + "mnist" + ")" * depth

    assert "mnist" in read(nested(MAX_DEPTH)).vectors
    assert f"deeper than {MAX_DEPTH}" in refused(nested(MAX_DEPTH + 1))
    assert "mnist" in names("-" * 4000 + "mnist")


def test_thousands_of_open_parentheses_and_calls_are_refused_in_time() -> None:
    started = time.monotonic()
    assert "deeper than" in refused("dare(" * 680 + "mnist" + ")" * 680)
    assert "cannot read" in refused("ties(" * 800)
    assert "cannot read" in refused("(" * MAX_LENGTH)
    assert "cannot read" in refused("-" * MAX_LENGTH)
    assert time.monotonic() - started < 10


def test_long_chains_are_not_deep() -> None:
    assert read("+".join(["mnist"] * MAX_TERMS)) == form({}, {"mnist": MAX_TERMS})
    assert read("1*" * 100 + "mnist") == form({}, {"mnist": 1})
    assert read("mnist" + "/1" * 100) == form({}, {"mnist": 1})
    assert read("(" * 1000 + "mnist" + ")" * 1000) == form({}, {"mnist": 1})


def test_expressions_of_too_many_terms_are_refused() -> None:
    assert f"at most {MAX_TERMS}" in refused("+".join(["mnist"] * (MAX_TERMS + 1)))
    assert f"at most {MAX_TERMS}" in refused(f"sum({', '.join(['*'] * (MAX_TERMS + 1))})")
    seeds = ", ".join(map(str, range(MAX_TERMS)))
    assert f"at most {MAX_TERMS}" in refused(f"dare(mnist, seed=[{seeds}])")
    many = [f"v{i}" for i in range(20)]
    free = [f"k{i}" for i in range(20)]
    with pytest.raises(InvalidExpression, match=f"more than {MAX_TERMS} terms"):
        parse(f"({'+'.join(free)}) * ({'+'.join(many)})", many, free)


@pytest.mark.parametrize(
    ("vectors", "coefficients", "text"),
    [
        (16, 16, "({}) * sum(*)"),
        (60, 0, " + ".join(f"ties(v0, v1, density=0.{i:03})" for i in range(1, 81))),
        (300, 0, "sum(*)"),
        (2, 1, "dare(" * MAX_DEPTH + "v0" + ")" * MAX_DEPTH + " * k0"),
    ],
    ids=["product", "calls", "star", "depth"],
)
def test_what_is_read_can_be_read_again_in_full(vectors: int, coefficients: int, text: str) -> None:
    tasks = [f"v{i}" for i in range(vectors)]
    free = [f"k{i}" for i in range(coefficients)]
    try:
        edit = parse(text.format("+".join(free)), tasks, free)
    except InvalidExpression:
        return
    assert parse(str(edit), tasks, free) == edit


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mnist / digits", "'mnist / digits' divides by digits"),
        ("c * mnist / (2 * c)", "divides by 2 * c"),
        ("sent + mnist / 0", "'mnist / 0' (character 8 of 'sent + mnist / 0') divides by 0"),
        ("mnist / (1 - 1)", "divides by 1 - 1"),
        ("mnist / ties(mnist)", "divides by ties(mnist)"),
        ("1 / mnist", "'1 / mnist' divides by mnist"),
        ("mnist / 1e-400", "divides by 1e-400"),
        ("2 * ties(c * mnist)", "'ties(c * mnist)' (character 5 of"),
        ("ties(c * mnist)", "the coefficient 'c' stands inside a method"),
        ("ties(c * mnist)", "write it outside: c * ties(...)"),
        ("ties(mnist, sum(digits, dare(sent - b * sent)))", "'b' stands inside a method"),
        ("ties(c)", "'c' stands inside a method"),
        ("ties(2)", "'ties(2)': a number stands where a vector must"),
        ("ties(mnist + 1)", "a number stands where a vector must"),
        ("ties(mnist - mnist)", "'ties(mnist - mnist)': an operand cancels to nothing"),
        ("sent * ties(mnist)", "multiplies two task vectors, sent and ties(mnist, density=0.2"),
        ("ties(sent * mnist)", "'sent * mnist' (character 6 of 'ties(sent * mnist)') multiplies"),
        ("ties(mnist, sent, mnist)", "'ties(mnist, sent, mnist)': the operand mnist stands twice"),
        ("ties(2 * sent, sent + sent)", "the operand 2 * sent stands twice"),
        ("ties(dare(sent), dare(sent, p=.5))", "the operand dare(sent, p=0.5, "),
        ("ties(density=0.2)", "'ties(density=0.2)': ties takes one or more vectors, found 0"),
        ("c * tees(mnist)", "'tees(mnist)' (character 5 of 'c * tees(mnist)'): 'tees'"),
        ("tees(mnist)", "did you mean 'ties'"),
        ("summ(mnist)", "did you mean 'sum'"),
        ("mnist(sent)", "'mnist' is no method"),
        ("magnitude_(mnist)", "did you mean 'magnitude'"),
        ("sum(density=2)", "'sum(density=2)': sum takes vectors and no options"),
        ("sum(mnist, density=2)", "sum takes vectors and no options"),
        ("ties(mnist, densty=1)", "densty: unknown key; ties takes density, variant, scope"),
        ("average(mnist, p=1)", "p: unknown key; average takes none"),
        ("ties(mnist, density=0)", "density: expected a number above 0 and at most 1, found 0"),
        ("ties(mnist, density=-0.5)", "found -0.5"),
        ("ties(mnist, density=[0.2, 1.5])", "density: expected a number above 0 and at most 1"),
        ("ties(mnist, density=[1.5, 0.2])", "found 1.5"),
        ("ties(mnist, density='x')", "density: expected float, found 'x'"),
        ("ties(mnist, density=true)", "density: expected float, found True"),
        ("ties(mnist, density=false)", "density: expected float, found False"),
        ("dare(mnist, seed=1e3)", "seed: expected int, found 1000.0"),
        ("dare(mnist, p=1)", "p: expected a number at least 0 and below 1, found 1"),
        ("ties(mnist, variant='avg')", "variant: expected one of 'mean', 'sum', 'normalized'"),
        ("ties(mnist, variant=1)", "variant: expected one of"),
        ("ties(mnist, variant=sum)", "'sum' (character 21 of 'ties(mnist, variant=sum)') is no"),
        ("ties(mnist, variant=sum)", 'such as "sum"'),
        ("ties(mnist, density=0.1, density=0.1)", "the option 'density' stands twice"),
        ("ties(mnist, density=0.1, density=[0.2])", "the option 'density' stands twice"),
        ("ties(mnist, density=[0.1, 0.1])", "a value of density stands twice"),
        ("ties(mnist, density=[1, 1.0])", "a value of density stands twice"),
        ("dare(mnist, p=[0.0, -0.0])", "a value of p stands twice"),
        ("ties(mnist, variant=['sum', \"sum\"])", "a value of variant stands twice"),
        ("slerp(mnist)", "slerp takes 2 vectors, found 1"),
        ("slerp(*)", "slerp takes 2 vectors, found 5"),
        ("lines(mnist, sent)", "lines takes 1 vectors, found 2"),
        ("ties(nobody)", "'nobody' is neither a task nor a coefficient"),
    ],
)  # fmt: skip
def test_calls_that_mean_nothing_are_refused_with_the_offending_part(
    text: str, message: str
) -> None:
    assert message in refused(text)


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty room of merging methods."""
    monkeypatch.setattr(plugins, "__file__", str(tmp_path / "plugins.py"))
    (tmp_path / "merging").mkdir()
    return tmp_path / "merging"


def test_methods_that_need_statistics_of_data_are_refused(room: Path) -> None:
    (room / "fisher.py").write_text('STATISTICS = ("fisher",)\ndef fisher(vectors): ...\n')
    assert "fisher needs statistics of data, which no stage computes" in refused("fisher(mnist)")


def test_options_may_be_of_any_type_and_required(room: Path) -> None:
    signature = "vectors, *, flag: bool = False, level: int, free: str = 'f'"
    (room / "toy.py").write_text(f"ORDERED = True\nOPERANDS = 2\ndef toy({signature}): ...\n")
    edit = read("toy(mnist, digits, level=-3, flag=true)")
    assert str(edit) == 'toy(mnist, digits, flag=true, free="f", level=-3)'
    assert read(str(edit)) == edit
    both = read("toy(mnist, digits, level=1, flag=[false, true], free='a.b-c_1')")
    assert str(both) == 'toy(mnist, digits, flag=[false, true], free="a.b-c_1", level=1)'
    assert [dict(item.choice) for item in both.alternatives()] == [
        {"toy.flag": False}, {"toy.flag": True},
    ]  # fmt: skip
    assert "toy needs level" in refused("toy(mnist, digits)")
    assert "flag: expected bool, found 1" in refused("toy(mnist, digits, level=1, flag=1)")
    assert "toy takes 2 vectors, found 3" in refused("toy(mnist, digits, sent, level=1)")
    assert "'ties' is no method" in refused("ties(mnist)")


def test_random_text_raises_nothing_but_invalid_expression() -> None:
    letters = ["a", "c", "mnist", "digits", "1", ".5", "+", "-", "*", "/", "(", ")", " ", "e", "é",
               "\n", "ties(", "dare(", "slerp(", "sum(", ",", ", density=", "p=", "[", "]", "'sum'",
               "true", "1e999", "=", "*)"]  # fmt: skip
    rng = random.Random(0)
    accepted = 0
    started = time.monotonic()
    for _ in range(20_000):
        text = "".join(rng.choices(letters, k=rng.randrange(12)))
        try:
            edit = read(text)
        except InvalidExpression:
            continue
        assert read(str(edit)) == edit
        accepted += 1
    assert accepted > 100
    assert time.monotonic() - started < 40


@settings(deadline=None, max_examples=300)
@given(st.integers(), st.integers(1, 6))
def test_damaged_expressions_raise_nothing_but_invalid_expression(seed: int, edits: int) -> None:
    rng = random.Random(seed)
    text = rng.choice(
        [
            "c * ties(mnist, digits, density=[0.1, 0.2]) + dare(sent, p=0.9, seed=3) / 2",
            "a * slerp(ties(*), -0.5 * lm_y, t=.3) - (b - 1) * sum(mnist, 2 * sent)",
            "lines(dare(average(*), rescale='l1'), alpha=1e2, beta=-.5) / (1 + 1)",
        ]
    )
    for _ in range(edits):
        place, length = rng.randrange(len(text) + 1), rng.randrange(4)
        extra = rng.choice(["", "-", "*", "(", ")", "[", ",", "9" * 330, "e999", "'", "0", " c "])
        text = text[:place] + extra + text[place + length :]
    try:
        edit = read(text)
    except InvalidExpression:
        return
    assert read(str(edit)) == edit


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=60))
def test_any_text_raises_nothing_but_invalid_expression(text: str) -> None:
    try:
        read(text)
    except InvalidExpression:
        return
