"""Accuracy and its interval: laws, and values that were published."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taskvec.errors import InvalidData
from taskvec.metrics import (
    BATCH,
    Pictures,
    count_correct,
    normalized_accuracy,
    ratio,
    wilson_interval,
)
from tests.test_towers import coloured, tiny_tower

law = settings(deadline=None)  # the first tensor of a process takes its time
COUNTS = st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@law
@given(COUNTS)
def test_an_interval_holds_the_estimate_and_stays_within_zero_and_one(
    count: tuple[int, int],
) -> None:
    correct, items = count
    low, high = wilson_interval(correct, items)
    assert 0 <= low <= correct / items <= high <= 1
    assert low < high
    assert (low == 0) == (correct == 0) and (high == 1) == (correct == items)


@law
@given(COUNTS)
def test_errors_have_the_mirrored_interval(count: tuple[int, int]) -> None:
    correct, items = count
    low, high = wilson_interval(correct, items)
    mirrored = wilson_interval(items - correct, items)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


@law
@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n))))
def test_one_more_correct_answer_moves_both_ends_up(count: tuple[int, int]) -> None:
    correct, items = count
    below, above = wilson_interval(correct, items), wilson_interval(correct + 1, items)
    assert below[0] < above[0] and below[1] < above[1]


@law
@given(COUNTS, st.integers(2, 50))
def test_more_items_make_the_interval_narrower(count: tuple[int, int], times: int) -> None:
    correct, items = count
    few, many = wilson_interval(correct, items), wilson_interval(times * correct, times * items)
    assert many[1] - many[0] < few[1] - few[0]


@pytest.mark.parametrize(
    ("correct", "items", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
     (1, 29, 0.0061, 0.1718)],
)  # fmt: skip
def test_golden_intervals_of_newcombe(correct: int, items: int, low: float, high: float) -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
    assert wilson_interval(correct, items) == pytest.approx((low, high), abs=5e-5)


def test_golden_normalised_accuracies() -> None:
    assert normalized_accuracy(0.5, 0.8) == 0.625
    assert normalized_accuracy(0.9, 0.9) == 1.0
    assert normalized_accuracy(0.0, 0.9) == 0.0
    assert normalized_accuracy(0.9, 0.6) == pytest.approx(1.5)
    with pytest.raises(InvalidData, match="accuracy 0"):
        normalized_accuracy(0.5, 0.0)


def test_a_ratio_to_nothing_is_not_a_number() -> None:
    assert ratio(0.5, 0.25) == 2.0
    assert ratio(0.0, 0.0) != ratio(0.0, 0.0)


@pytest.mark.parametrize("count", [0, 1, 3, BATCH - 1, BATCH, BATCH + 1, 2 * BATCH + 7])
def test_counting_is_the_same_as_asking_picture_by_picture(count: int) -> None:
    tower, (images, labels) = tiny_tower(), coloured(count)
    head = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    correct = 0
    for image, label in zip(images, labels, strict=True):
        with torch.inference_mode():
            (feature,) = tower.features(image[None]).cpu()
        logits = [sum(a * b for a, b in zip(feature, row, strict=True)) for row in head]
        correct += logits.index(max(logits)) == label
    assert count_correct(tower, head, Pictures(tower, images, labels)) == correct


@pytest.mark.parametrize("count", [1, BATCH, BATCH + 1, 2 * BATCH + 7])
def test_chunks_are_the_pictures_one_after_the_other(count: int) -> None:
    tower, (images, labels) = tiny_tower(), coloured(count)
    pictures = Pictures(tower, images, labels)
    chunks = [pictures.chunk(number) for number in range(pictures.chunks)]
    assert torch.equal(torch.cat([part for part, _ in chunks]), tower.normalize(images))
    assert torch.equal(torch.cat([part for _, part in chunks]), labels)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["tower", "head"])
def test_a_model_that_answers_nan_is_refused_instead_of_counted(value: float, place: str) -> None:
    tower, (images, labels) = tiny_tower(), coloured(3)
    head = torch.ones(3, 4)
    broken = tower.module.get_parameter("head.weight").data if place == "tower" else head
    broken[1] = value
    if place == "head" and value == float("inf"):
        broken[1, 0] = float("nan")
    with pytest.raises(InvalidData, match="NaN"):
        count_correct(tower, head, Pictures(tower, images, labels))


def test_pictures_that_do_not_fit_are_normalised_as_they_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tower, (images, labels) = tiny_tower(), coloured(BATCH + 5)
    kept = Pictures(tower, images, labels)
    monkeypatch.setattr("taskvec.metrics.KEPT_BYTES", 0)
    passing = Pictures(tower, images, labels)
    for _ in range(2):
        for (a, la), (b, lb) in zip(kept, passing, strict=True):
            assert torch.equal(a, b) and torch.equal(la, lb)
    assert len(kept) == len(passing) == BATCH + 5
