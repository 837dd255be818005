"""Laws of task vectors: exact where IEEE arithmetic is exact, up to rounding elsewhere."""

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taskvec.checkpoints import fingerprint, load, save, tied
from taskvec.errors import IncompatibleWeights
from taskvec.lazy import materialize
from taskvec.merging.task_arithmetic import task_arithmetic
from taskvec.vectors import TaskVector

ORIGIN = "0" * 64
SHAPES = st.sampled_from(
    [(), (0,), (1,), (3,), (97,), (2, 3), (4, 0, 2), (2, 3, 2, 2), (1, 1, 1, 1)]
)
VALUES = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)
COEFFICIENTS = st.floats(-2, 2, width=32, allow_subnormal=False)
law = settings(deadline=None)  # the first tensor of a process takes its time


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    few = draw(st.lists(VALUES, min_size=min(count, 8), max_size=min(count, 8)))
    return torch.tensor([few[i % 8] for i in range(count)], dtype=torch.float32).reshape(shape)


@st.composite
def states(draw: st.DrawFn, count: int) -> list[dict[str, Tensor]]:
    """Return some state dicts with the same names and shapes."""
    shapes = draw(st.dictionaries(st.sampled_from(["w", "b", "x.y"]), SHAPES, min_size=1))
    return [{name: draw(tensors(shape)) for name, shape in shapes.items()} for _ in range(count)]


def vectors(count: int) -> st.SearchStrategy[list[TaskVector]]:
    return states(count).map(lambda found: [TaskVector(state, ORIGIN) for state in found])


def vector(**values: list[float]) -> TaskVector:
    return TaskVector({name: torch.tensor(value) for name, value in values.items()}, ORIGIN)


def equal(left: TaskVector, right: TaskVector) -> bool:
    return left.tensors.keys() == right.tensors.keys() and all(
        torch.equal(value, right.tensors[name]) for name, value in left.tensors.items()
    )


def assert_close(left: TaskVector, right: TaskVector, scale: float) -> None:
    for name, value in left.tensors.items():
        torch.testing.assert_close(value, right.tensors[name], rtol=1e-5, atol=1e-6 * (1 + scale))


@law
@given(vectors(2))
def test_addition_is_commutative_to_the_last_bit(pair: list[TaskVector]) -> None:
    a, b = pair
    assert equal(a + b, b + a)


@law
@given(vectors(1))
def test_negating_twice_subtracting_itself_and_doubling_are_exact(one: list[TaskVector]) -> None:
    (a,) = one
    assert equal((-a).__neg__(), a)
    assert equal(a + a, 2 * a)
    assert equal(a - a, 0 * a)
    assert all(not value.any() for value in (a - a).tensors.values())


@law
@given(vectors(2))
def test_subtracting_is_adding_the_negative(pair: list[TaskVector]) -> None:
    a, b = pair
    assert equal(a - b, a + -b)
    assert equal(a - b, -(b - a))


@law
@given(vectors(3), COEFFICIENTS)
def test_association_and_distribution_hold_up_to_rounding(
    three: list[TaskVector], coefficient: float
) -> None:
    a, b, c = three
    assert_close((a + b) + c, a + (b + c), scale=3e3)
    assert_close(coefficient * (a + b), coefficient * a + coefficient * b, scale=4e3)


@law
@given(vectors(3))
def test_sum_starts_from_zero(three: list[TaskVector]) -> None:
    a, b, c = three
    assert equal(sum([a, b, c]), (a + b) + c)  # type: ignore[arg-type]
    assert equal(sum([a]), a)  # type: ignore[arg-type]


@law
@given(vectors(2))
def test_an_analogy_between_a_task_and_itself_returns_the_third(pair: list[TaskVector]) -> None:
    a, c = pair
    assert equal(c + (a - a), c)


@law
@given(states(2))
def test_coefficient_zero_gives_back_the_pretrained_weights(pair: list[dict[str, Tensor]]) -> None:
    pretrained, finetuned = pair
    tau = TaskVector.between(pretrained, finetuned, ORIGIN, list(pretrained))
    edited = tau.apply(pretrained, 0.0)
    assert all(torch.equal(edited[name], value) for name, value in pretrained.items())


@law
@given(states(2))
def test_coefficient_one_gives_back_the_finetuned_weights_up_to_rounding(
    pair: list[dict[str, Tensor]],
) -> None:
    pretrained, finetuned = pair
    edited = TaskVector.between(pretrained, finetuned, ORIGIN, list(pretrained)).apply(pretrained)
    for name, value in finetuned.items():
        torch.testing.assert_close(edited[name], value, rtol=1e-6, atol=5e-4)


@law
@given(states(2), COEFFICIENTS)
def test_operations_leave_their_operands_as_they_are(
    pair: list[dict[str, Tensor]], coefficient: float
) -> None:
    pretrained, finetuned = pair
    before = [{name: value.clone() for name, value in state.items()} for state in pair]
    tau = TaskVector.between(pretrained, finetuned, ORIGIN, list(pretrained))
    kept = TaskVector({name: value.clone() for name, value in tau.tensors.items()}, ORIGIN)
    tau.apply(pretrained, coefficient)
    assert -tau + tau - coefficient * tau is not None
    materialize(task_arithmetic({"a": tau.lazy(), "b": tau.lazy()}))
    assert equal(tau, kept)
    for state, copy in zip(pair, before, strict=True):
        assert all(torch.equal(state[name], value) for name, value in copy.items())


def test_golden_values_of_norm_dot_and_cosine() -> None:
    a = vector(w=[3.0, 0.0], b=[4.0])
    b = vector(w=[0.0, 2.0], b=[1.0])
    assert a.norm() == 5.0
    assert a.dot(b) == 4.0
    assert a.cosine(b) == pytest.approx(4 / (5 * math.sqrt(5)), rel=1e-15)
    assert a.cosine(a) == 1.0
    assert a.cosine(-a) == -1.0
    assert a.cosine(0 * b) == 0.0


@law
@given(vectors(2))
def test_cosine_is_symmetric_and_bounded(pair: list[TaskVector]) -> None:
    a, b = pair
    assert a.cosine(b) == pytest.approx(b.cosine(a), abs=1e-12)
    assert -1.0 <= a.cosine(b) <= 1.0


def test_golden_values_of_an_edit() -> None:
    pretrained = {"w": torch.tensor([1.0, 2.0])}
    tau = TaskVector.between(pretrained, {"w": torch.tensor([2.0, 4.0])}, ORIGIN, ["w"])
    assert tau.apply(pretrained, 0.5)["w"].tolist() == [1.5, 3.0]
    assert tau.apply(pretrained, -1.0)["w"].tolist() == [0.0, 0.0]
    assert tau.origin == ORIGIN


def test_names_are_sorted_whatever_the_order_of_the_checkpoint() -> None:
    assert list(vector(b=[1.0], a=[2.0]).tensors) == ["a", "b"]


def test_entries_that_are_not_edited_pass_through_an_edit() -> None:
    count = torch.tensor(7)
    pretrained = {"w": torch.ones(2), "frozen": torch.ones(3), "count": count}
    finetuned = {**pretrained, "w": torch.zeros(2)}
    tau = TaskVector.between(pretrained, finetuned, ORIGIN, ["w"])
    edited = tau.apply(pretrained)
    assert set(tau.tensors) == {"w"}
    assert edited["count"] is count
    assert edited["frozen"] is pretrained["frozen"]
    assert list(edited) == list(pretrained)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_edit_keeps_the_dtype_and_computes_in_float32(dtype: torch.dtype) -> None:
    pretrained = {"w": torch.tensor([1.0, 2.0], dtype=dtype)}
    finetuned = {"w": torch.tensor([1.5, 2.5], dtype=dtype)}
    tau = TaskVector.between(pretrained, finetuned, ORIGIN, ["w"])
    assert tau.tensors["w"].dtype == torch.float32
    assert tau.apply(pretrained)["w"].dtype == dtype
    assert torch.equal(tau.apply(pretrained)["w"], finetuned["w"])


def test_numpy_doubles_are_numbers_too() -> None:
    assert equal(np.float64(2.0) * vector(w=[1.0]), vector(w=[2.0]))


@pytest.mark.parametrize("other", [1, 0.0, 1.5, False, "c", None, torch.ones(2)])
def test_only_vectors_and_the_zero_of_sum_can_be_added(other: object) -> None:
    a = vector(w=[1.0, 2.0])
    with pytest.raises(TypeError):
        a + other  # type: ignore[operator]
    with pytest.raises(TypeError):
        a - other  # type: ignore[operator]


@pytest.mark.parametrize("other", [True, "c", None, [2], "vector"])
def test_vectors_are_scaled_by_plain_numbers_only(other: object) -> None:
    a = vector(w=[1.0])
    factor = vector(w=[1.0]) if other == "vector" else other
    with pytest.raises(TypeError):
        factor * a  # type: ignore[operator]
    with pytest.raises(TypeError):
        a * factor  # type: ignore[operator]


def test_vectors_from_different_pretrained_weights_do_not_add() -> None:
    a, b = vector(w=[1.0]), TaskVector({"w": torch.ones(1)}, "f" * 64)
    for combine in (a.__add__, a.__sub__, a.dot, a.cosine):
        with pytest.raises(IncompatibleWeights, match="different pre-trained weights") as caught:
            combine(b)
        assert ORIGIN[:12] in str(caught.value)
        assert "f" * 12 in str(caught.value)


def test_vectors_of_different_parameters_do_not_add() -> None:
    a, b = vector(w=[1.0]), vector(w=[1.0], y=[1.0], x=[1.0])
    for left, right in ((a, b), (b, a)):
        with pytest.raises(IncompatibleWeights, match=r"2 only in .*first: 'x'"):
            left + right


def test_vectors_of_different_shapes_do_not_broadcast() -> None:
    with pytest.raises(IncompatibleWeights, match=r"'w' has the shape \(1,\) .* and \(2,\)"):
        vector(w=[1.0]) + vector(w=[1.0, 2.0])


PRETRAINED = {"a": torch.ones(2), "b": torch.ones(2, 2), "count": torch.tensor(3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": None}, r"1 only in the pre-trained checkpoint, .*first: 'b'"),
        ({"z": torch.ones(1)}, r"1 only in the fine-tuned one, .*first: 'z'"),
        ({"b": torch.ones(4)}, r"'b' has the shape \(2, 2\) in .* and \(4,\)"),
        ({"b": torch.ones(2, 2).half()}, r"'b' is torch.float32 in .* and torch.float16"),
        ({"a": torch.tensor([1.0, math.nan])}, r"'a' holds 1 NaN or infinite values of 2"),
        ({"a": torch.tensor([-math.inf, math.inf])}, r"'a' holds 2 NaN or infinite values of 2"),
        ({"b": torch.zeros(2, 2)}, r"1 frozen tensors changed .*first: 'b'"),
        ({"count": torch.tensor(4)}, r"1 frozen tensors changed .*first: 'count'"),
    ],
    ids=["missing", "extra", "shape", "dtype", "nan", "inf", "frozen", "buffer"],
)
def test_checkpoints_that_cannot_be_subtracted_are_refused(
    change: dict[str, Tensor | None], message: str
) -> None:
    finetuned = {n: v for n, v in {**PRETRAINED, **change}.items() if v is not None}
    with pytest.raises(IncompatibleWeights, match=message) as caught:
        TaskVector.between(PRETRAINED, finetuned, ORIGIN, ["a"])
    assert caught.value.exit_code == 3


def test_parameters_that_the_checkpoint_lacks_cannot_be_edited() -> None:
    with pytest.raises(IncompatibleWeights, match=r"2 edited parameters .*first: 'y'"):
        TaskVector.between(PRETRAINED, PRETRAINED, ORIGIN, ["z", "a", "y"])


def test_integer_buffers_cannot_be_edited() -> None:
    with pytest.raises(IncompatibleWeights, match=r"not floating \(first: 'count', torch.int64\)"):
        TaskVector.between(PRETRAINED, PRETRAINED, ORIGIN, ["a", "count"])
    tau = TaskVector({"count": torch.tensor(0.5)}, ORIGIN)
    with pytest.raises(IncompatibleWeights, match=r"not floating \(first: 'count', torch.int64\)"):
        tau.apply(PRETRAINED)


def test_a_vector_does_not_apply_to_another_architecture() -> None:
    with pytest.raises(IncompatibleWeights, match=r"1 only in the vector, .*first: 'other'"):
        vector(other=[1.0]).apply(PRETRAINED)
    with pytest.raises(IncompatibleWeights, match=r"'a' has the shape \(1,\) .* and \(2,\)"):
        vector(a=[1.0]).apply(PRETRAINED)


# Ties, defaults and files


def test_by_default_all_floating_tensors_are_edited_and_the_origin_is_measured() -> None:
    pretrained = {"w": torch.ones(2), "h": torch.ones(2).half(), "count": torch.tensor(3)}
    finetuned = {"w": torch.zeros(2), "h": torch.zeros(2).half(), "count": torch.tensor(3)}
    tau = TaskVector.between(pretrained, finetuned)
    assert list(tau.tensors) == ["h", "w"]
    assert tau.origin == fingerprint(pretrained)
    with pytest.raises(IncompatibleWeights, match=r"1 frozen tensors changed .*first: 'count'"):
        TaskVector.between(pretrained, {**finetuned, "count": torch.tensor(4)})


def tied_model(value: float) -> dict[str, Tensor]:
    shared = torch.full((2, 2), value)
    return {"head": shared, "embedding": shared, "bias": torch.zeros(2)}


def test_a_tied_tensor_is_in_a_vector_once_and_stays_tied_in_the_edited_model() -> None:
    pretrained, finetuned = tied_model(1.0), tied_model(3.0)
    tau = TaskVector.between(pretrained, finetuned)
    assert list(tau.tensors) == ["bias", "embedding"]
    assert equal(tau, TaskVector.between(pretrained, finetuned, "", ["head", "bias"]))
    edited = tau.apply(pretrained, 0.5)
    assert edited["head"] is edited["embedding"]
    assert edited["head"].tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert tied(edited) == {"head": "embedding"}
    assert list(edited) == list(pretrained)


def test_checkpoints_that_are_tied_differently_are_refused() -> None:
    untied = {name: value.clone() for name, value in tied_model(3.0).items()}
    for pair in ((tied_model(1.0), untied), (untied, tied_model(1.0))):
        with pytest.raises(IncompatibleWeights, match="'head' is tied .* only one of the two"):
            TaskVector.between(*pair)


@law
@given(vectors(1))
def test_a_vector_survives_its_file(
    tmp_path_factory: pytest.TempPathFactory, one: list[TaskVector]
) -> None:
    (a,) = one
    path = tmp_path_factory.mktemp("vector") / "v.safetensors"
    mark = a.save(path, task="mnist")
    again = TaskVector.load(path)
    assert equal(again, a)
    assert again.origin == a.origin == ORIGIN
    assert load(path, "vector").metadata["task"] == "mnist"
    assert load(path, "vector").fingerprint == mark


def test_a_checkpoint_is_no_vector(tmp_path: Path) -> None:
    save(tmp_path / "x", {"w": torch.ones(1)}, "checkpoint")
    with pytest.raises(IncompatibleWeights, match="holds a 'checkpoint', expected a 'vector'"):
        TaskVector.load(tmp_path / "x")


@law
@given(vectors(1))
def test_a_vector_becomes_lazy_and_held_without_a_copy(one: list[TaskVector]) -> None:
    (a,) = one
    lazy = a.lazy()
    assert dict(lazy.shapes) == {name: tuple(value.shape) for name, value in a.tensors.items()}
    again = TaskVector.held(materialize(lazy), ORIGIN)
    assert equal(again, a)
    for name, value in a.tensors.items():
        if value.numel():
            assert np.shares_memory(lazy.block(name, 0, value.numel()), value.numpy())
    arrays = materialize(lazy)
    held = TaskVector.held(arrays, ORIGIN)
    for name, value in held.tensors.items():
        assert value.shape == a.tensors[name].shape
        assert not value.numel() or np.shares_memory(value.numpy(), arrays[name])


def test_a_lazy_vector_is_float32_whatever_the_tensors_are() -> None:
    half = TaskVector({"w": torch.nn.Parameter(torch.ones(2, dtype=torch.float16))}, ORIGIN)
    assert half.lazy().block("w", 0, 2).dtype == np.float32
    turned = TaskVector({"w": torch.arange(6.0).reshape(2, 3).T}, ORIGIN)
    assert materialize(turned.lazy())["w"].tolist() == turned.tensors["w"].tolist()


# Task arithmetic as a merging method


def merged(vectors: Mapping[str, TaskVector]) -> TaskVector:
    lazy = task_arithmetic({name: tau.lazy() for name, tau in vectors.items()})
    return TaskVector.held(materialize(lazy), ORIGIN)


@law
@given(vectors(3))
def test_task_arithmetic_is_the_sum_in_the_order_given(three: list[TaskVector]) -> None:
    a, b, c = three
    assert equal(merged({"a": a, "b": b, "c": c}), (a + b) + c)
    assert equal(merged({"c": c, "b": b, "a": a}), (c + b) + a)
    assert equal(merged({"b": b}), b)


def test_vectors_of_different_shapes_do_not_merge() -> None:
    with pytest.raises(IncompatibleWeights, match=r"'w' has the shape \(1,\) .* and \(2,\)"):
        merged({"a": vector(w=[1.0]), "b": vector(w=[1.0, 2.0])})
    with pytest.raises(IncompatibleWeights, match=r"1 only in some of them \(first: 'x'\)"):
        merged({"a": vector(w=[1.0]), "b": vector(w=[1.0], x=[1.0])})


# The core is small


def test_importing_the_algebra_imports_torch_and_safetensors_and_nothing_else() -> None:
    code = """
import json, sys
import torch, safetensors, safetensors.torch
before = set(sys.modules)
import taskvec.vectors
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = set(json.loads(done.stdout))
    ours = {"", ".atomic", ".checkpoints", ".errors", ".headers", ".vectors"}
    assert {name for name in new if name.partition(".")[0] == "taskvec"} == {
        f"taskvec{name}" for name in ours
    }
    others = {name.partition(".")[0] for name in new} - {"taskvec"}
    assert others <= set(sys.stdlib_module_names)
