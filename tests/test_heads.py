"""Classifiers from class prototypes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from taskvec.heads import prototype_head
from taskvec.metrics import BATCH, Pictures, count_correct
from taskvec.towers import Tower
from tests.test_towers import NORMALIZATION, coloured, tiny_tower

law = settings(deadline=None, max_examples=40)  # the first tensor of a process takes its time


def test_a_prototype_is_the_centred_unit_mean_of_its_class() -> None:
    tower, (images, labels) = tiny_tower(), coloured(9)
    with torch.inference_mode():
        features = tower.features(images).cpu()
    means = [
        sum(features[i] for i in range(9) if labels[i] == label) / 3 for label in range(3)
    ]  # fmt: skip
    centre = sum(means) / 3
    rows = [functional.normalize(mean - centre, dim=0) for mean in means]
    head = prototype_head(tower, images, labels, scale=20.0)
    torch.testing.assert_close(head, 20.0 * torch.stack(rows), rtol=1e-4, atol=1e-5)


@law
@given(st.integers(3, 12), st.floats(0.5, 100), st.randoms(use_true_random=False))
def test_rows_have_the_length_of_the_scale_and_the_order_of_pictures_does_not_matter(
    count: int, scale: float, random: object
) -> None:
    tower, (images, labels) = tiny_tower(), coloured(count)
    order = list(range(count))
    random.shuffle(order)  # type: ignore[attr-defined]
    head = prototype_head(tower, images, labels, scale)
    shuffled = prototype_head(tower, images[order], labels[order], scale)
    assert head.shape == (3, 4)
    torch.testing.assert_close(head.norm(dim=1), torch.full((3,), scale))
    torch.testing.assert_close(head, shuffled, rtol=1e-3, atol=1e-4 * scale)


def test_prototypes_classify_separable_pictures() -> None:
    colours = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    tower = Tower(colours, *NORMALIZATION, image_size=8, identity={})
    head = prototype_head(tower, *coloured(BATCH + 50), scale=20.0)
    assert count_correct(tower, head, Pictures(tower, *coloured(60, seed=1))) == 60


def test_a_head_can_serve_in_training() -> None:
    tower, (images, labels) = tiny_tower(), coloured(6)
    head = prototype_head(tower, images, labels, scale=20.0)
    assert not head.requires_grad
    (tower.features(images) @ head.to(tower.device).T).sum().backward()
