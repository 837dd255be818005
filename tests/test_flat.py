"""Editing in place gives what applying task vectors gives, and leaves no trace."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from taskvec import layered
from taskvec.errors import IncompatibleWeights
from taskvec.flat import FlatEditor
from taskvec.lazy import Held, materialize
from taskvec.towers import PREFIX, Tower
from taskvec.vectors import TaskVector
from tests.test_towers import IDENTITY, NORMALIZATION, assert_same, coloured, tiny_tower

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


# Coefficients that differ by layer, and slopes


class Deep(nn.Module):
    """A network with a stem, eleven blocks (10 sorts between 1 and 2) and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, kernel_size=3, stride=2)
        self.blocks = nn.ModuleList(nn.Conv2d(6, 6, kernel_size=1) for _ in range(11))
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(self.norm(x).mean((2, 3)))


def deep_tower() -> Tower:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Deep()
    return Tower(module, *NORMALIZATION, 8, identity=IDENTITY, frozen=("visual.head.",))


LAYERS = [*map(str, range(11)), "rest"]


def loss_of(tower: Tower) -> Tensor:
    images, labels = coloured(6)
    return functional.cross_entropy(tower.features(images) * 5, labels)


def by_layer(tower: Tower, seed: int) -> dict[str, float]:
    values = torch.rand(len(LAYERS), generator=torch.Generator().manual_seed(seed)) - 0.5
    return {f"c@{layer}": float(value) for layer, value in zip(LAYERS, values, strict=True)}


def test_the_layers_are_the_blocks_and_the_rest() -> None:
    tower = deep_tower()
    editor = FlatEditor(tower, {"c": direction(tower, 1)}, {})
    assert editor.layers == LAYERS == layered.layers(tower.edited())
    assert FlatEditor(tiny_tower(), {"c": direction(tiny_tower(), 1)}, {}).layers == ["rest"]


@law
@given(st.integers(0, 1000), COEFFICIENTS)
def test_an_edit_by_layers_scales_every_tensor_with_its_layers_value(seed: int, b: float) -> None:
    tower = deep_tower()
    pretrained, c_vector, b_vector = tower.state(), direction(tower, 1), direction(tower, 2)
    editor = FlatEditor(tower, {"b": b_vector, "c": c_vector}, {})
    values = by_layer(tower, seed)
    editor.apply({"b": b, **values})
    found = tower.state()
    for name in tower.edited():
        value = values[f"c@{layered.layer(name)}"]
        expected = pretrained[name] + b * b_vector[name] + value * c_vector[name]
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)
    lazy = layered.scaled_by_layer(
        Held({name: value.numpy() for name, value in c_vector.items()}),
        {layer: values[f"c@{layer}"] for layer in LAYERS},
    )
    for name, value in materialize(lazy).items():
        torch.testing.assert_close(
            torch.from_numpy(value), values[f"c@{layered.layer(name)}"] * c_vector[name],
            rtol=0, atol=1e-7,
        )  # fmt: skip


def test_the_same_value_in_all_layers_is_that_coefficient() -> None:
    one, other = deep_tower(), deep_tower()
    vector = direction(one, 1)
    FlatEditor(one, {"c": vector}, {}).apply({"c": 0.3})
    FlatEditor(other, {"c": vector}, {}).apply(layered.spread({"c": 0.3}, LAYERS))
    assert_same(one.state(), other.state())


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_exactly_the_layers_of_the_model_must_be_given(change: str) -> None:
    tower = deep_tower()
    editor = FlatEditor(tower, {"c": direction(tower, 1)}, {})
    values = layered.spread({"c": 0.3}, LAYERS if change == "missing" else [*LAYERS, "11"])
    if change == "missing":
        del values["c@10"]
    with pytest.raises(IncompatibleWeights, match="the model has the layers 0, 1, 2"):
        editor.apply(values)


@pytest.mark.parametrize("layers", [False, True])
def test_the_slope_is_that_of_a_functional_call(layers: bool) -> None:
    tower = deep_tower()
    basis = {"a": direction(tower, 1), "c": direction(tower, 2)}
    offset, theta = direction(tower, 3), deep_tower().state()
    point = {"a": 0.2, "c": -0.4}
    values = layered.spread(point, LAYERS) if layers else point
    editor = FlatEditor(tower, basis, offset)
    editor.apply(values)
    value, slope = editor.slope(lambda: loss_of(tower), values)

    free = {name: torch.tensor(x, requires_grad=True) for name, x in values.items()}
    other = deep_tower()
    weights = {}
    for name in other.edited():
        part = f"@{layered.layer(name)}" if layers else ""
        moved = sum(free[f"{c}{part}"] * basis[c][name] for c in basis)
        weights[name.removeprefix(PREFIX)] = theta[name] + offset[name] + moved
    images, labels = coloured(6)
    features = functional_call(other.module, weights, (other.normalize(images),))
    logits = functional.normalize(features, dim=-1) * 5
    expected = functional.cross_entropy(logits, labels)
    gradient = torch.autograd.grad(expected, list(free.values()))
    assert value == pytest.approx(expected.item(), rel=1e-5)
    for name, found in zip(free, gradient, strict=True):
        assert slope[name] == pytest.approx(found.item(), rel=1e-3, abs=1e-5)


def test_the_slopes_of_the_layers_add_up_and_leave_the_weights_alone() -> None:
    tower = deep_tower()
    editor = FlatEditor(tower, {"c": direction(tower, 1)}, {})
    editor.apply({"c": 0.3})
    before = tower.state()
    _, parts = editor.slope(lambda: loss_of(tower), layered.spread({"c": 0.3}, LAYERS))
    _, whole = editor.slope(lambda: loss_of(tower), ["c"])
    assert sum(parts.values()) == pytest.approx(whole["c"], rel=1e-5)
    assert_same(tower.state(), before)
    assert all(parameter.grad is None for parameter in tower.module.parameters())


def test_a_parameter_that_the_loss_does_not_reach_has_no_part_in_the_slope() -> None:
    tower = deep_tower()
    editor = FlatEditor(tower, {"c": direction(tower, 1)}, {})
    stem = tower.module.get_parameter("stem.weight")
    _, slope = editor.slope(lambda: stem.square().sum(), layered.spread({"c": 0.0}, LAYERS))
    assert slope["c@rest"] != 0
    assert {slope[f"c@{layer}"] for layer in LAYERS[:-1]} == {0.0}


def test_values_of_layers_and_of_whole_vectors_are_told_apart() -> None:
    found = layered.grouped({"b": 0.5, "a@rest": 2.0, "a@0": 1.0})
    assert found == {"a": {"0": 1.0, "rest": 2.0}, "b": 0.5}
    assert (layered.base("a@rest"), layered.base("b")) == ("a", "b")
