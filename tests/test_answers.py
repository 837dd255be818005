"""Answers item by item: what the tower says, in a fair order, and as bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from taskvec.answers import (
    CHUNK,
    Answers,
    answer,
    cross_entropy,
    entropy,
    join,
    unpacked,
)
from taskvec.errors import InvalidData
from taskvec.metrics import Pictures, count_correct
from tests.test_towers import coloured, tiny_tower

law = settings(deadline=None, max_examples=30)


@st.composite
def said(draw: st.DrawFn) -> Answers:
    number = draw(st.integers(1, 30))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    losses = generator.exponential(1, number).astype(np.float32)
    return Answers(generator.random(number) < 0.5, losses)


@given(said())
def test_answers_come_back_from_bytes(found: Answers) -> None:
    again = unpacked(found.packed())
    assert again.correct.dtype == np.bool_ and again.loss.dtype == np.float32
    assert (again.correct == found.correct).all() and (again.loss == found.loss).all()


@given(st.lists(said(), min_size=1, max_size=4))
def test_joined_answers_are_those_of_all_items(parts: list[Answers]) -> None:
    whole = join(parts)
    assert len(whole) == sum(map(len, parts))
    share = sum(part.accuracy * len(part) for part in parts) / len(whole)
    assert whole.accuracy == pytest.approx(share)
    loss = sum(part.mean_loss * len(part) for part in parts) / len(whole)
    assert whole.mean_loss == pytest.approx(loss)


def head() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(5))


def test_the_answers_are_those_of_the_tower() -> None:
    tower, (images, labels) = tiny_tower(), coloured(CHUNK + 30)
    pictures = Pictures(tower, images, labels)
    assert pictures.chunks == 2
    found = [answer(tower, head(), pictures, chunk) for chunk in range(2)]
    assert [len(part) for part in found] == [CHUNK, 30]
    with torch.inference_mode():
        logits = tower.features(images).cpu() @ head().T
    losses = functional.cross_entropy(logits, labels, reduction="none").numpy()
    np.testing.assert_allclose(join(found).loss, losses, rtol=1e-4, atol=1e-5)
    assert int(join(found).correct.sum()) == count_correct(tower, head(), pictures)


@law
@given(st.integers(0, 100))
def test_the_losses_to_differentiate_are_those_of_the_answers(seed: int) -> None:
    tower, (images, labels) = tiny_tower(seed), coloured(12, seed)
    pictures = Pictures(tower, images, labels)
    expected = answer(tower, head(), pictures, 0)
    loss, judged = cross_entropy(tower, head(), pictures, 0)
    assert loss.requires_grad
    assert loss.item() == pytest.approx(expected.mean_loss, rel=1e-5)
    uncertainty, judged_too = entropy(tower, head(), pictures, 0)
    for found in (judged, judged_too):
        assert (found.correct == expected.correct).all()
        np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        logits = tower.features(images).cpu() @ head().T
    reference = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert uncertainty.item() == pytest.approx(reference.item(), rel=1e-5)


def test_the_entropy_does_not_depend_on_the_labels() -> None:
    tower, (images, labels) = tiny_tower(), coloured(12)
    values = [
        entropy(tower, head(), Pictures(tower, images, given_), 0)[0].item()
        for given_ in (labels, labels.flip(0))
    ]
    assert values[0] == values[1]


def test_a_model_that_answers_nan_is_refused() -> None:
    tower = tiny_tower()
    pictures = Pictures(tower, *coloured(6))
    with torch.no_grad():
        tower.module.get_parameter("point.weight")[0] = float("nan")
    for ask in (answer, cross_entropy, entropy):
        with pytest.raises(InvalidData, match="answers NaN.*smaller coefficients"):
            ask(tower, head(), pictures, 0)
