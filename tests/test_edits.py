"""Expressions computed: in any order of terms and file layout, in memory and block by block."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taskvec import lazy
from taskvec.edits import at, edit_vector, evaluate, merge, weighted
from taskvec.errors import IncompatibleWeights, InvalidExpression, InvalidInput
from taskvec.expressions import Edit, parse
from taskvec.lazy import Array, Held, Lazy, materialize
from taskvec.merging.dare import dare
from taskvec.merging.lines import lines
from taskvec.merging.slerp import slerp
from taskvec.merging.ties import ties
from taskvec.vectors import TaskVector

law = settings(deadline=None, max_examples=50)
ORIGIN = "0" * 64
NAMES = ("a", "b", "c")
FREE = ("x", "y")
F = np.float32
SHAPES: dict[str, tuple[int, ...]] = {
    "blocks.0.w": (3, 4), "blocks.1.w": (3, 4), "b": (5,), "scalar": (), "empty": (0, 3),
}  # fmt: skip


def arrays(seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {name: np.asarray(random.normal(size=s), F) for name, s in SHAPES.items()}


def vectors(seed: int = 0) -> dict[str, TaskVector]:
    return {name: TaskVector.held(arrays(seed + i), ORIGIN) for i, name in enumerate(NAMES)}


def held(seed: int = 0) -> dict[str, Lazy]:
    return {name: Held(arrays(seed + i)) for i, name in enumerate(NAMES)}


def read(text: str) -> Edit:
    return parse(text, NAMES, FREE)


def same(left: Mapping[str, Array], right: Mapping[str, Array]) -> bool:
    return left.keys() == right.keys() and all(
        value.shape == right[name].shape and value.tobytes() == right[name].tobytes()
        for name, value in left.items()
    )


def values(vector: TaskVector) -> dict[str, Array]:
    return {name: value.numpy() for name, value in vector.tensors.items()}


def computed(text: str, seed: int = 0, **coefficients: float) -> dict[str, Array]:
    return values(edit_vector(text, vectors(seed), **coefficients))


# Evaluating


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", lambda a, b, c: a),
        ("-a", lambda a, b, c: a * F(-1)),
        ("a + b", lambda a, b, c: a + b),
        ("b - 0.25 * a", lambda a, b, c: a * F(-0.25) + b),
        ("sum(*) / 3", lambda a, b, c: a * F(1 / 3) + b * F(1 / 3) + c * F(1 / 3)),
        ("2 * (c - (a + b))", lambda a, b, c: a * F(-2) + b * F(-2) + c * F(2)),
        ("average(a, b, c)", lambda a, b, c: (a + b + c) / F(3)),
        ("task_arithmetic(2 * a, c - b)", lambda a, b, c: a * F(2) + (b * F(-1) + c)),
        ("3 * average(b, a) - c", lambda a, b, c: ((a + b) / F(2)) * F(3) + c * F(-1)),
    ],
)
def test_an_expression_is_its_arithmetic_in_the_order_of_its_text(text: str, expected: Any) -> None:
    edit = read(text)
    assert edit.offset is not None
    found = materialize(evaluate(edit.offset, held()))
    a, b, c = (arrays(i) for i in range(3))
    assert same(found, {name: np.asarray(expected(a[name], b[name], c[name])) for name in SHAPES})


def test_a_single_vector_is_taken_as_it_is() -> None:
    operands = held()
    edit = read("a")
    assert edit.offset is not None
    assert evaluate(edit.offset, operands) is operands["a"]


def test_methods_get_their_operands_by_their_text_sorted_and_their_options() -> None:
    a, b, c = (held()[name] for name in NAMES)
    doubled = lazy.combination([(c, 2.0)])
    expected = ties({"2 * c": doubled, "a": a, "b": b}, density=0.5, variant="sum")
    assert same(computed("ties(b, 2 * c, a, variant='sum', density=0.5)"), materialize(expected))
    assert same(computed("slerp(b, a, t=0.25)"), materialize(slerp({"b": b, "a": a}, t=0.25)))
    nested = lines({"ties": ties({"a": a, "b": b})}, beta=0.5)
    assert same(computed("lines(ties(b, a), beta=0.5)"), materialize(nested))


def test_random_methods_see_the_text_of_their_operands() -> None:
    a, b = held()["a"], held()["b"]
    expected = materialize(dare({"a": a, "b": b}, p=0.5, seed=3))
    assert same(computed("dare(b, a, seed=3)"), expected)
    assert not same(computed("dare(b, a, seed=4)"), expected)


@law
@given(st.integers(0, 99), st.permutations(NAMES), st.sampled_from(["ties", "dare", "average"]))
def test_the_order_of_terms_and_operands_does_not_change_a_bit(
    seed: int, order: list[str], method: str
) -> None:
    text = f"0.3 * {{}} + x * {method}({{}}, {{}}, {{}}) - y * ({{}} - {{}})"
    one = computed(text.format("a", *NAMES, "a", "b"), seed, x=0.7, y=0.1)
    other = f"-y * (-b + a) + {method}({', '.join(order)}) * x + a * 0.3"
    assert same(one, computed(other, seed, x=0.7, y=0.1))


@law
@given(st.floats(-2, 2, width=32), st.floats(-2, 2, width=32), st.integers(1, 5), st.integers(1, 3))
def test_an_edit_is_offset_plus_coefficients_times_basis(
    x: float, y: float, block: int, workers: int
) -> None:
    edit = read("x * ties(a, b, density=0.5) + a - y * (b + c) + x * c")
    operands = held()
    basis = {name: evaluate(sum_, operands) for name, sum_ in edit.basis.items()}
    with lazy.workers(workers), pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy.blocks, "__defaults__", (block,))
        found = at(edit, {"x": x, "y": y}, operands)
        assert found is not None
        result = materialize(found)
    a = arrays(0)
    parts = {name: materialize(vector) for name, vector in basis.items()}
    for name, value in result.items():
        expected = a[name]
        for coefficient, factor in (("x", x), ("y", y)):
            if factor:
                expected = expected + parts[coefficient][name] * F(factor)
        assert value.tobytes() == np.asarray(expected).tobytes()


def test_coefficients_that_are_zero_leave_their_vectors_unread() -> None:
    class Unreadable(Lazy):
        def block(self, name: str, start: int, stop: int) -> Array:
            raise AssertionError("read")

    operands = {**held(), "b": Unreadable(SHAPES)}
    found = at(read("x * a + y * ties(b)"), {"x": 1.0, "y": 0}, operands)
    assert found is not None
    assert same(materialize(found), arrays(0))
    assert at(read("x * ties(b) + y * b"), {"x": 0, "y": 0.0}, operands) is None
    kept = at(read("c + x * b"), {"x": -0.0}, operands)
    assert kept is not None
    assert same(materialize(kept), arrays(2))


@pytest.mark.parametrize(
    ("given_values", "message"),
    [
        ({}, "has the coefficients x, y; values are given for none"),
        ({"x": 1.0}, "has the coefficients x, y; values are given for x"),
        ({"x": 1.0, "y": 1.0, "z": 0.0}, "values are given for x, y, z"),
    ],
)
def test_exactly_the_coefficients_of_the_edit_must_be_given(
    given_values: dict[str, float], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        at(read("x * a + y * b"), given_values, held())


def test_an_edit_without_coefficients_takes_none() -> None:
    found = at(read("a"), {}, held())
    assert found is not None
    with pytest.raises(InvalidInput, match="the coefficients none; values are given for x"):
        at(read("a"), {"x": 1.0}, held())


def test_weighted_adds_the_offset_and_the_basis_in_the_order_of_the_names() -> None:
    operands = held()
    a, b, c = (arrays(i) for i in range(3))
    found = weighted({"y": operands["b"], "x": operands["a"]}, operands["c"], {"x": 0.1, "y": 0.2})
    assert found is not None
    expected = {n: np.asarray(c[n] + a[n] * F(0.1) + b[n] * F(0.2)) for n in SHAPES}
    assert same(materialize(found), expected)
    assert weighted({"x": operands["a"]}, None, {"x": 0.0}) is None
    assert weighted({}, None, {}) is None


# In memory


def test_a_session_in_a_notebook() -> None:
    pretrained = {"blocks.0.w": torch.ones(2, 2), "b": torch.zeros(2), "count": torch.tensor(3)}
    tuned = {
        task: {**pretrained, "b": torch.tensor(bias), "blocks.0.w": torch.eye(2) * scale}
        for task, bias, scale in (("mnist", [1.0, 0.0], 2.0), ("digits", [0.0, -2.0], 3.0))
    }
    tasks = {task: TaskVector.between(pretrained, state) for task, state in tuned.items()}
    merged = merge("ties", tasks, density=1)
    assert merged.tensors["b"].tolist() == [1.0, -2.0]
    assert merged.tensors["blocks.0.w"].tolist() == [[1.5, -1.0], [-1.0, 1.5]]
    edited = edit_vector("c * ties(mnist, digits, density=1)", tasks, c=0.5)
    model = edited.apply(pretrained)
    assert model["b"].tolist() == [0.5, -1.0]
    assert model["blocks.0.w"].tolist() == [[1.75, 0.5], [0.5, 1.75]]
    assert model["count"] is pretrained["count"]
    forget = edit_vector("-c * mnist", tasks, c=1)
    assert torch.equal(forget.tensors["b"], -tasks["mnist"].tensors["b"])
    both = tasks["mnist"] + tasks["digits"]
    assert both.cosine(edit_vector("2 * (mnist + digits)", tasks)) == pytest.approx(1)
    assert edited.origin == merged.origin == forget.origin == tasks["mnist"].origin


@law
@given(st.integers(0, 99), st.permutations(NAMES))
def test_merging_does_not_depend_on_the_order_of_the_tasks_but_where_it_matters(
    seed: int, order: list[str]
) -> None:
    found = vectors(seed)
    shuffled = {name: found[name] for name in order}
    for method in ("ties", "dare", "average", "task_arithmetic"):
        assert same(values(merge(method, found)), values(merge(method, shuffled)))
    one, other = ({name: found[name] for name in pair} for pair in (("a", "b"), ("b", "a")))
    assert not same(values(merge("slerp", one, t=0.2)), values(merge("slerp", other, t=0.2)))


def test_a_merged_vector_is_the_expression_of_the_same_method() -> None:
    found = vectors()
    for method, options, text in (
        ("ties", {"density": 0.5}, "ties(a, b, c, density=0.5)"),
        ("dare", {"p": 0, "seed": 1}, "dare(*, p=0, seed=1)"),
        ("average", {}, "average(*)"),
    ):
        assert same(values(merge(method, found, **options)), values(edit_vector(text, found)))


def test_merging_leaves_the_vectors_as_they_are() -> None:
    found = vectors()
    before = {name: {n: v.copy() for n, v in values(tau).items()} for name, tau in found.items()}
    for method in ("ties", "dare", "average", "task_arithmetic"):
        merge(method, found)
    edit_vector("x * a + ties(b, c) - a", found, x=-1.5)
    assert all(same(values(tau), before[name]) for name, tau in found.items())


def test_half_precision_vectors_are_merged_in_float32() -> None:
    half = {name: TaskVector({"w": torch.ones(3).half() / 3}, ORIGIN) for name in NAMES}
    merged = merge("task_arithmetic", half)
    assert merged.tensors["w"].dtype == torch.float32
    assert torch.equal(merged.tensors["w"], 3 * (torch.ones(3).half() / 3).float())


def test_an_edit_whose_coefficients_are_zero_is_a_vector_of_zeros() -> None:
    nothing = edit_vector("x * a + y * ties(b, c)", vectors(), x=0, y=0.0)
    assert {name: tuple(value.shape) for name, value in nothing.tensors.items()} == SHAPES
    assert not any(value.any() for value in nothing.tensors.values())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("tise", {}, "no module taskvec/merging/tise.py; did you mean 'ties'"),
        ("ties", {"densty": 1}, "ties: densty: unknown key; ties takes density"),
        ("ties", {"density": 0}, "ties: density: expected a number above 0 and at most 1, found 0"),
        ("ties", {"density": math.nan}, "found nan"),
        ("ties", {"variant": "avg"}, "ties: variant: expected one of"),
        ("tall_mask", {}, "tall_mask needs task"),
        ("slerp", {}, "slerp takes two operands, found 3"),
        ("lines", {}, "lines takes one operand, found 3"),
    ],
)
def test_methods_and_options_that_do_not_exist_are_refused(
    method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        merge(method, vectors(), **options)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("use", ["merge", "edit"])
def test_vectors_of_different_origins_do_not_mix(use: str) -> None:
    found = {**vectors(), "c": TaskVector.held(arrays(9), "f" * 64)}
    with pytest.raises(IncompatibleWeights, match="different pre-trained weights") as caught:
        merge("ties", found) if use == "merge" else edit_vector("a + b", found)
    assert ORIGIN[:12] in str(caught.value)
    assert "f" * 12 in str(caught.value)


@pytest.mark.parametrize("use", ["merge", "edit"])
def test_vectors_of_different_shapes_do_not_mix(use: str) -> None:
    found = {**vectors(), "c": TaskVector({"w": torch.ones(3)}, ORIGIN)}
    with pytest.raises(IncompatibleWeights, match="do not have the same parameters"):
        merge("ties", found) if use == "merge" else edit_vector("a - c", found)


def test_no_vectors_are_refused() -> None:
    with pytest.raises(InvalidInput, match="there are no vectors"):
        merge("ties", {})
    with pytest.raises(InvalidExpression):
        edit_vector("ties(*)", {})


def test_lists_of_values_make_no_single_vector() -> None:
    with pytest.raises(InvalidExpression, match="ties.density is a list; one value makes one"):
        edit_vector("ties(a, b, density=[0.1, 0.2])", vectors())
    (first, _) = parse("ties(a, b, density=[0.1, 0.2])", NAMES, []).alternatives()
    assert same(values(edit_vector(str(first), vectors())), computed("ties(a, b, density=0.1)"))


@pytest.mark.parametrize(
    ("text", "coefficients", "message"),
    [
        ("x * a", {}, "'x' is neither a task nor a coefficient"),
        ("a", {"x": 1.0}, "the coefficients none; values are given for x"),
        ("x * a", {"x": 1.0, "y": 2.0}, "the coefficients x; values are given for x, y"),
        ("x * (a - a) + b", {"x": 1.0}, "the coefficients none; values are given for x"),
        ("x * nobody", {"x": 1.0}, "'nobody' is neither a task nor a coefficient"),
    ],
)
def test_values_must_fit_the_coefficients(
    text: str, coefficients: dict[str, float], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        edit_vector(text, vectors(), **coefficients)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
def test_a_vector_in_memory_is_finite_too(value: float) -> None:
    with pytest.raises(InvalidInput):
        edit_vector("x * a", vectors(), x=value)


@pytest.mark.parametrize("text", ["a + b", "1e10 * a - b", "average(a, b)", "a - 2 * b"])
def test_a_vector_that_overflows_is_refused_with_its_tensor(text: str) -> None:
    large = {name: TaskVector.held({"w": np.full(3, 3e38, F)}, ORIGIN) for name in NAMES}
    with pytest.raises(IncompatibleWeights, match="tensor 'w' of the result holds NaN or inf"):
        edit_vector(text, large)


def test_alternatives_of_random_methods_keep_their_masks() -> None:
    # The mask of an operand follows from its text, so the edit that was chosen from a list is the
    # edit that one would have written.
    text = "dare(ties(a, density={}), ties(a, density=0.3), ties(a, density=0.6), seed=5)"
    edit = parse(text.format([0.9, 0.1]), NAMES, [])
    for alternative in edit.alternatives():
        assert alternative.offset is not None
        found = materialize(evaluate(alternative.offset, held()))
        assert same(found, computed(text.format(alternative.choice["ties.density"])))
