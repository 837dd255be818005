"""The vision tower: weights go in only if they fit, and come out as a copy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from taskvec.errors import IncompatibleWeights
from taskvec.towers import Tower, check_identity

law = settings(deadline=None, max_examples=40)  # the first tensor of a process takes its time
IDENTITY = {"family": "tiny", "activation": "relu"}
NORMALIZATION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Tiny(nn.Module):
    """A convolutional network with batch statistics, a 1 x 1 convolution and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, kernel_size=3, stride=2)
        self.norm = nn.BatchNorm2d(5)
        self.point = nn.Conv2d(5, 7, kernel_size=1)
        self.head = nn.Linear(7, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.norm(self.conv(x)).relu())  # (N, 7, H, W)
        return self.head(x.relu().mean((2, 3)))  # (N, 4)


def tiny_tower(seed: int = 0, *, frozen: tuple[str, ...] = ("visual.head.",)) -> Tower:
    """Return a tower for pictures of 8 x 8 with random weights and batch statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = Tiny()
        nn.init.uniform_(module.get_buffer("norm.running_mean"), -0.1, 0.1)
        nn.init.uniform_(module.get_buffer("norm.running_var"), 0.5, 1.5)
    return Tower(module, *NORMALIZATION, image_size=8, identity=IDENTITY, frozen=frozen)


def coloured(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return noisy pictures (N, 3, 8, 8) whose label 0, 1, 2 is the brightest channel."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 150, (count, 3, 8, 8), generator=generator)
    images[torch.arange(count), labels] += 100
    return images.to(torch.uint8), labels


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_weights_that_are_loaded_come_out_again() -> None:
    state = tiny_tower(1).state()
    tower = tiny_tower(2)
    tower.load(state)
    assert_same(tower.state(), state)


def test_the_state_holds_parameters_and_buffers_under_the_names_of_open_clip() -> None:
    assert sorted(tiny_tower().state()) == [
        "visual.conv.bias",
        "visual.conv.weight",
        "visual.head.weight",
        "visual.norm.bias",
        "visual.norm.num_batches_tracked",
        "visual.norm.running_mean",
        "visual.norm.running_var",
        "visual.norm.weight",
        "visual.point.bias",
        "visual.point.weight",
    ]


def test_the_state_is_a_copy_in_both_directions() -> None:
    tower = tiny_tower()
    before, state = tower.state(), tower.state()
    for value in state.values():
        value.zero_()
    assert_same(tower.state(), before)
    tower.load(before)
    for value in before.values():
        value.zero_()
    assert tower.state()["visual.conv.weight"].any()


@pytest.mark.parametrize("name", sorted(tiny_tower().state()))
@pytest.mark.parametrize("change", ["missing", "shape", "dtype"])
def test_weights_that_do_not_fit_are_refused_and_change_nothing(name: str, change: str) -> None:
    tower = tiny_tower()
    before, state = tower.state(), tiny_tower(1).state()
    match change:
        case "missing":
            del state[name]
        case "shape":
            state[name] = state[name].unsqueeze(0)
        case "dtype":
            state[name] = state[name].to(torch.float16)
    with pytest.raises(IncompatibleWeights, match=name.replace(".", r"\.")) as caught:
        tower.load(state)
    assert caught.value.exit_code == 3
    assert_same(tower.state(), before)


@pytest.mark.parametrize("extra", ["visual.more", "conv.weight", "text.weight"])
def test_weights_that_are_left_over_are_refused(extra: str) -> None:
    state = tiny_tower().state()
    with pytest.raises(IncompatibleWeights, match=f"1 only in the checkpoint.*'{extra}'"):
        tiny_tower().load({**state, extra: torch.zeros(1)})


def test_frozen_prefixes_and_buffers_are_not_edited() -> None:
    everything = tiny_tower(frozen=()).edited()
    assert everything == [
        "visual.conv.bias",
        "visual.conv.weight",
        "visual.head.weight",
        "visual.norm.bias",
        "visual.norm.weight",
        "visual.point.bias",
        "visual.point.weight",
    ]
    assert tiny_tower().edited() == [name for name in everything if ".head." not in name]
    assert tiny_tower(frozen=("visual.norm.", "visual.conv.")).edited() == [
        "visual.head.weight",
        "visual.point.bias",
        "visual.point.weight",
    ]


def test_golden_values_of_normalisation() -> None:
    tower = Tower(
        nn.Identity(), (0.0, 0.5, 0.2), (1.0, 0.5, 0.1), image_size=1, identity=IDENTITY
    )  # fmt: skip
    images = torch.tensor([[0, 0, 0], [255, 255, 255], [51, 102, 153]], dtype=torch.uint8)
    normalized = tower.normalize(images[:, :, None, None]).flatten(1).cpu()
    expected = [[0.0, -1.0, -2.0], [1.0, 1.0, 8.0], [0.2, -0.2, 4.0]]
    torch.testing.assert_close(normalized, torch.tensor(expected))
    assert normalized.dtype == torch.float32


@law
@given(st.integers(1, 4), st.integers(0, 2**31))
def test_features_have_length_one_and_do_not_depend_on_the_batch(count: int, seed: int) -> None:
    tower, (images, _) = tiny_tower(), coloured(count, seed)
    with torch.inference_mode():
        together = tower.features(images)
        alone = torch.cat([tower.features(image[None]) for image in images])
    assert together.shape == (count, 4)
    torch.testing.assert_close(together.norm(dim=1).cpu(), torch.ones(count))
    torch.testing.assert_close(together, alone)


def test_a_tower_never_moves_its_batch_statistics() -> None:
    tower = tiny_tower()
    before = tower.state()
    tower.features(coloured(6)[0]).sum().backward()
    assert_same(tower.state(), before)


def test_an_identity_must_agree_in_every_part() -> None:
    tower = tiny_tower()
    check_identity(tower, {"identity": dict(IDENTITY), "kind": "checkpoint"}, "a.safetensors")
    for other in (
        {},
        {"identity": None},
        {"identity": {}},
        {"identity": {**IDENTITY, "activation": "quickgelu"}},
        {"identity": {**IDENTITY, "more": "x"}},
    ):
        with pytest.raises(IncompatibleWeights, match="a.safetensors belongs to the model"):
            check_identity(tower, other, "a.safetensors")
