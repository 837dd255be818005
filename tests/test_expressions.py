"""The expression language against a naive evaluator, and everything it must refuse."""

import random
import time
from dataclasses import dataclass
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from taskvec.errors import InvalidExpression
from taskvec.expressions import MAX_DEPTH, MAX_LENGTH, MAX_TERMS, Edit, names, parse

VECTORS = ("mnist", "digits", "lm_y", "lm_a", "sent")
COEFFICIENTS = ("a", "b", "c")


def read(text: str) -> Edit:
    return parse(text, VECTORS, COEFFICIENTS)


def refused(text: str) -> str:
    with pytest.raises(InvalidExpression) as caught:
        read(text)
    assert caught.value.exit_code == 3
    return str(caught.value)


@dataclass(frozen=True)
class Node:
    """An expression: a name or number with no operands, else an operator with one or two."""

    symbol: str
    operands: tuple["Node", ...] = ()


def printed(node: Node) -> str:
    if not node.operands:
        return node.symbol
    if len(node.operands) == 1:
        return f"(-{printed(node.operands[0])})"
    left, right = map(printed, node.operands)
    return f"({left} {node.symbol} {right})"


def evaluated(node: Node, values: dict[str, Fraction]) -> Fraction:
    found = [evaluated(operand, values) for operand in node.operands]
    if not found:
        return values[node.symbol] if node.symbol in values else Fraction(node.symbol)
    if len(found) == 1:
        return -found[0]
    left, right = found
    return {"+": left + right, "-": left - right, "*": left * right}[node.symbol]


NUMBERS = st.sampled_from(["0", "1", "2", "0.5", "3", ".25", "1e1", "2.", "5E-1"]).map(Node)


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
    """Multiply what the factors give, in any order."""

    def fold(nodes: list[Node]) -> Node:
        result = nodes[0]
        for node in nodes[1:]:
            result = Node("*", (result, node))
        return result

    return st.tuples(*factors).flatmap(lambda found: st.permutations(found)).map(fold)


SCALARS = sums(NUMBERS, 3)
SPANS = sums(st.one_of(*(st.just(Node(name)) for name in VECTORS)).flatmap(
    lambda leaf: st.one_of(st.just(leaf), products(st.just(leaf), SCALARS))
))  # fmt: skip
FREE = st.sampled_from(COEFFICIENTS).map(Node)
TREES = sums(st.one_of(SPANS, products(FREE, SPANS), products(SCALARS, sums(FREE, 3), SPANS)))


@settings(deadline=None)
@given(TREES, st.lists(st.integers(-9, 9), min_size=8, max_size=8))
def test_the_normal_form_has_the_value_of_the_expression(tree: Node, values: list[int]) -> None:
    drawn = map(Fraction, values)
    given_values = dict(zip((*VECTORS, *COEFFICIENTS), drawn, strict=True))
    expected = evaluated(tree, given_values)
    try:
        edit = read(printed(tree))
    except InvalidExpression as error:
        assume("nested deeper" not in str(error))
        assert "everything cancels" in str(error)
        assert expected == 0
        return
    found = sum(Fraction(w) * given_values[v] for v, w in edit.offset.items())
    for coefficient, weights in edit.basis.items():
        basis = sum(Fraction(w) * given_values[v] for v, w in weights.items())
        found += given_values[coefficient] * basis
    assert found == expected
    assert set(edit.vectors) | set(edit.coefficients) <= set(names(printed(tree)))
    assert all(weight for weights in edit.basis.values() for weight in weights.values())


@pytest.mark.parametrize(
    ("text", "basis", "offset"),
    [
        ("mnist", {}, {"mnist": 1}),
        ("c * (mnist + digits)", {"c": {"mnist": 1, "digits": 1}}, {}),
        ("-c * mnist", {"c": {"mnist": -1}}, {}),
        ("a*sent + b*(lm_y - lm_a)", {"a": {"sent": 1}, "b": {"lm_y": 1, "lm_a": -1}}, {}),
        ("mnist * c", {"c": {"mnist": 1}}, {}),
        ("sent + c * mnist", {"c": {"mnist": 1}}, {"sent": 1}),
        ("0.5 * mnist - .25*digits", {}, {"mnist": 0.5, "digits": -0.25}),
        ("mnist - digits - sent", {}, {"mnist": 1, "digits": -1, "sent": -1}),
        ("mnist - (digits - sent)", {}, {"mnist": 1, "digits": -1, "sent": 1}),
        ("mnist + 2 * digits * 3", {}, {"mnist": 1, "digits": 6}),
        ("--mnist", {}, {"mnist": 1}),
        ("2 * -3 * mnist", {}, {"mnist": -6}),
        ("mnist - -digits", {}, {"mnist": 1, "digits": 1}),
        ("-mnist * 2 + digits", {}, {"mnist": -2, "digits": 1}),
        ("(1 + 2) * (a + b) * mnist", {"a": {"mnist": 3}, "b": {"mnist": 3}}, {}),
        ("c * mnist - c * mnist + sent", {}, {"sent": 1}),
        ("c * mnist + 0 * digits", {"c": {"mnist": 1}}, {}),
        ("1e-3*mnist", {}, {"mnist": 0.001}),
        ("\tc\n*\r\n mnist ", {"c": {"mnist": 1}}, {}),
    ],
)
def test_golden_normal_forms(
    text: str, basis: dict[str, dict[str, float]], offset: dict[str, float]
) -> None:
    assert read(text) == Edit(basis, offset)


def test_the_normal_form_is_sorted_and_lists_what_it_uses() -> None:
    edit = read("b * sent + a * (mnist + digits) + lm_y")
    assert edit.coefficients == ("a", "b")
    assert edit.vectors == ("digits", "lm_y", "mnist", "sent")
    assert list(edit.basis["a"]) == ["digits", "mnist"]


def test_names_are_all_tasks_and_coefficients_known_or_not() -> None:
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
    "text", ["1", "2 * 3", "c", "c * 2", "mnist + 1", "c + c * mnist", "1 - 1"]
)
def test_terms_without_a_task_vector_are_refused(text: str) -> None:
    assert "names no task vector" in refused(text)


@pytest.mark.parametrize(
    "text", ["mnist - mnist", "c*mnist - mnist*c", "0 * mnist", "1e-400*mnist"]
)
def test_edits_that_change_nothing_are_refused(text: str) -> None:
    assert "everything cancels" in refused(text)


@pytest.mark.parametrize(
    "text", ["1e999 * mnist", "1e308*10*mnist", "c*1e999*mnist*0", "9" * 400 + "*sent"]
)
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
        ("c / mnist", 3),
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


@pytest.mark.parametrize("deep", ["negation", "product", "difference"])
def test_deep_expressions_are_refused(deep: str) -> None:
    def nested(depth: int) -> str:
        if deep == "negation":
            return "-" * depth + "mnist"
        operator = "2*(" if deep == "product" else "digits-("
        return operator * depth + "mnist" + ")" * depth

    assert "mnist" in read(nested(MAX_DEPTH)).vectors
    assert f"deeper than {MAX_DEPTH}" in refused(nested(MAX_DEPTH + 1))
    assert "mnist" in names("-" * 4000 + "mnist")


def test_long_chains_are_not_deep() -> None:
    assert read("+".join(["mnist"] * MAX_TERMS)).offset == {"mnist": MAX_TERMS}
    assert read("1*" * 100 + "mnist").offset == {"mnist": 1}
    assert read("(" * 1000 + "mnist" + ")" * 1000).offset == {"mnist": 1}


def test_expressions_of_too_many_terms_are_refused() -> None:
    assert f"at most {MAX_TERMS}" in refused("+".join(["mnist"] * (MAX_TERMS + 1)))
    many = [f"v{i}" for i in range(20)]
    free = [f"k{i}" for i in range(20)]
    with pytest.raises(InvalidExpression, match=f"more than {MAX_TERMS} terms"):
        parse(f"({'+'.join(free)}) * ({'+'.join(many)})", many, free)


def test_random_text_raises_nothing_but_invalid_expression() -> None:
    letters = ["a", "c", "mnist", "digits", "1", ".5", "+", "-", "*", "(", ")", " ", "e", "é", "\n"]
    rng = random.Random(0)
    accepted = 0
    started = time.monotonic()
    for _ in range(20_000):
        text = "".join(rng.choices(letters, k=rng.randrange(12)))
        try:
            read(text)
            accepted += 1
        except InvalidExpression:
            pass
    assert accepted > 100
    assert time.monotonic() - started < 20


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=60))
def test_any_text_raises_nothing_but_invalid_expression(text: str) -> None:
    try:
        read(text)
    except InvalidExpression:
        return
