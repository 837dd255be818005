"""Editing in place gives what applying task vectors gives, and leaves no trace."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taskvec.errors import IncompatibleWeights
from taskvec.flat import FlatEditor
from taskvec.towers import Tower
from taskvec.vectors import TaskVector
from tests.test_towers import assert_same, coloured, tiny_tower

COEFFICIENTS = st.floats(-2, 2, width=32, allow_subnormal=False)
law = settings(deadline=None, max_examples=40)  # the first tensor of a process takes its time


def direction(tower: Tower, seed: int) -> dict[str, Tensor]:
    """Return a random vector over the edited parameters."""
    generator, state = torch.Generator().manual_seed(seed), tower.state()
    return {
        name: 0.1 * torch.randn(state[name].shape, generator=generator) for name in tower.edited()
    }


def features(tower: Tower) -> Tensor:
    with torch.inference_mode():
        return tower.features(coloured(6)[0]).cpu()


@law
@given(st.lists(st.tuples(COEFFICIENTS, COEFFICIENTS), min_size=1, max_size=4), st.booleans())
def test_an_edit_in_place_is_the_edit_of_task_vectors(
    tries: list[tuple[float, float]], with_offset: bool
) -> None:
    tower, other = tiny_tower(), tiny_tower()
    pretrained = tower.state()
    a, b = direction(tower, 1), direction(tower, 2)
    offset = direction(tower, 3) if with_offset else {}
    editor = FlatEditor(tower, {"a": a, "b": b}, offset)
    for x, y in tries:
        editor.apply({"a": x, "b": y})
        start = TaskVector(offset, "").apply(pretrained)
        expected = (x * TaskVector(a, "") + y * TaskVector(b, "")).apply(start)
        found = tower.state()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
        other.load(expected)
        torch.testing.assert_close(features(tower), features(other), rtol=0, atol=1e-5)


@law
@given(st.lists(COEFFICIENTS, min_size=1, max_size=5))
def test_what_was_tried_before_does_not_matter(tries: list[float]) -> None:
    tower, fresh = tiny_tower(), tiny_tower()
    editor = FlatEditor(tower, {"c": direction(tower, 1)}, direction(tower, 2))
    for coefficient in tries:
        editor.apply({"c": coefficient})
    FlatEditor(fresh, {"c": direction(fresh, 1)}, direction(fresh, 2)).apply({"c": tries[-1]})
    assert_same(tower.state(), fresh.state())


def test_coefficient_zero_gives_back_the_pretrained_bytes() -> None:
    tower = tiny_tower()
    before, seen = tower.state(), features(tower)
    editor = FlatEditor(tower, {"c": direction(tower, 1)}, {})
    assert_same(tower.state(), before)
    editor.apply({"c": 0.7})
    assert not torch.equal(features(tower), seen)
    editor.apply({"c": 0.0})
    assert_same(tower.state(), before)
    assert torch.equal(features(tower), seen)


def test_with_an_offset_coefficient_zero_gives_the_offset_edit() -> None:
    tower = tiny_tower()
    offset = direction(tower, 1)
    expected = TaskVector(offset, "").apply(tower.state())
    editor = FlatEditor(tower, {"c": direction(tower, 2)}, offset)
    editor.apply({"c": 0.0})
    assert_same(tower.state(), expected)


def test_the_parameters_of_every_memory_order_are_views_of_one_buffer() -> None:
    tower = tiny_tower()
    strides = {name: value.stride() for name, value in tower.module.named_parameters()}
    FlatEditor(tower, {"c": direction(tower, 1)}, {})
    parameters = dict(tower.module.named_parameters())
    assert strides == {name: value.stride() for name, value in parameters.items()}
    assert parameters["conv.weight"].is_contiguous(memory_format=torch.channels_last)
    edited = [parameters[name.removeprefix("visual.")] for name in tower.edited()]
    assert len({value.untyped_storage().data_ptr() for value in edited}) == 1
    assert edited[0].untyped_storage().size() == 4 * sum(value.numel() for value in edited)


def test_what_is_not_edited_stays_bit_for_bit() -> None:
    tower = tiny_tower()
    before = tower.state()
    FlatEditor(tower, {"c": direction(tower, 1)}, {}).apply({"c": 1.0})
    after = tower.state()
    changed = [name for name in sorted(after) if not torch.equal(after[name], before[name])]
    assert changed == tower.edited()


def test_weights_can_be_loaded_after_editing() -> None:
    tower, state = tiny_tower(), tiny_tower(9).state()
    editor = FlatEditor(tower, {"c": direction(tower, 1)}, {})
    tower.load(state)
    assert_same(tower.state(), state)
    editor.apply({"c": 0.0})
    first = tiny_tower().state()
    assert_same(tower.state(), {**state, **{name: first[name] for name in tower.edited()}})


@pytest.mark.parametrize("coefficients", [{}, {"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}])
def test_exactly_the_coefficients_of_the_basis_must_be_given(
    coefficients: dict[str, float],
) -> None:
    tower = tiny_tower()
    editor = FlatEditor(tower, {"a": direction(tower, 1), "b": direction(tower, 2)}, {})
    with pytest.raises(IncompatibleWeights, match="the basis has the coefficients a, b"):
        editor.apply(coefficients)
    assert_same(tower.state(), tiny_tower().state())


@pytest.mark.parametrize("part", ["basis", "offset"])
@pytest.mark.parametrize("change", ["missing", "extra", "shape", "dtype"])
def test_vectors_that_do_not_fit_the_model_are_refused(part: str, change: str) -> None:
    tower = tiny_tower()
    good, wrong = direction(tower, 1), direction(tower, 2)
    match change:
        case "missing":
            del wrong["visual.conv.bias"]
        case "extra":
            wrong["visual.head.weight"] = torch.zeros(4, 7)
        case "shape":
            wrong["visual.conv.bias"] = torch.zeros(1, 5)
        case "dtype":
            wrong["visual.conv.bias"] = wrong["visual.conv.bias"].half()
    with pytest.raises(IncompatibleWeights) as caught:
        if part == "basis":
            FlatEditor(tower, {"c": wrong}, {})
        else:
            FlatEditor(tower, {"c": good}, wrong)
    assert caught.value.exit_code == 3
    assert_same(tower.state(), tiny_tower().state())
