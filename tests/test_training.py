"""Fine-tuning: the order of the pictures, the schedule, and what moves and what does not."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taskvec.errors import InvalidData
from taskvec.sections import FineTune
from taskvec.training import Lesson, Step, batches, fine_tune, schedule
from tests.test_towers import Tower, assert_same, coloured, tiny_tower

law = settings(deadline=None)  # the first tensor of a process takes its time
SEEDS = st.integers(0, 2**31 - 1)


def recipe(steps: int = 30, batch_size: int = 6, **changes: Any) -> FineTune:
    values = {"learning_rate": 1e-2, "weight_decay": 0.0, "warmup": 0.1, "clip_norm": 1.0}
    return FineTune(steps=steps, batch_size=batch_size, **{**values, **changes})


def classifier() -> Tensor:
    return 10 * torch.randn(3, 4, generator=torch.Generator().manual_seed(5))


def train(how: FineTune, seed: int = 0, count: int = 24) -> tuple[Tower, list[Step]]:
    tower = tiny_tower()
    return tower, fine_tune(tower, [lesson(count)], how, seed)


def lesson(count: int = 24, head: Tensor | None = None) -> Lesson:
    return Lesson(classifier() if head is None else head, *coloured(count))


def order(items: int, how: FineTune, seed: int) -> list[list[int]]:
    return [batch.tolist() for batch in batches(items, how, seed)]


@law
@given(st.integers(1, 20), st.integers(1, 12), st.integers(1, 30), SEEDS)
def test_every_item_comes_once_before_any_item_comes_twice(
    items: int, batch_size: int, steps: int, seed: int
) -> None:
    found = order(items, recipe(steps, batch_size), seed)
    assert [len(batch) for batch in found] == [batch_size] * steps
    flat = [item for batch in found for item in batch]
    for start in range(0, len(flat), items):
        epoch = flat[start : start + items]
        assert len(set(epoch)) == len(epoch)
        assert len(epoch) < items or set(epoch) == set(range(items))
    counts = Counter(flat)
    assert max(counts.values()) - min(counts[item] for item in range(items)) <= 1


@law
@given(st.integers(1, 50), st.integers(1, 12), SEEDS)
def test_the_order_depends_on_the_seed_alone(items: int, batch_size: int, seed: int) -> None:
    torch.manual_seed(seed % 7)
    short, long = (order(items, recipe(steps, batch_size), seed) for steps in (4, 9))
    assert short == long[:4]


@law
@given(st.sets(SEEDS, min_size=2, max_size=2))
def test_other_seeds_give_another_order(seeds: set[int]) -> None:
    first, second = (order(100, recipe(10, 10), seed) for seed in seeds)
    assert first != second


@law
@given(st.integers(1, 300), st.floats(0, 1))
def test_the_schedule_rises_to_its_peak_and_falls_to_zero(steps: int, warmup: float) -> None:
    shares = [schedule(step, steps, warmup) for step in range(1, steps + 1)]
    peak = max(1, round(warmup * steps))
    assert all(0 <= share <= 1 for share in shares)
    assert shares[peak - 1] == 1.0
    assert shares[:peak] == sorted(shares[:peak])
    assert shares[peak - 1 :] == sorted(shares[peak - 1 :], reverse=True)
    assert peak == steps or shares[-1] == pytest.approx(0.0, abs=1e-12)


def test_golden_values_of_the_schedule() -> None:
    found = [schedule(step, 10, 0.2) for step in range(1, 11)]
    root = math.sqrt(0.5)
    cosine = [math.cos(math.pi * i / 8) for i in range(9)]
    assert found[:2] == [0.5, 1.0]
    assert found[2:] == pytest.approx([(1 + value) / 2 for value in cosine[1:]])
    assert found[3] == pytest.approx((1 + root) / 2)
    assert found[5] == pytest.approx(0.5)
    assert [schedule(step, 4, 0.0) for step in range(1, 5)] == pytest.approx([1, 0.75, 0.25, 0])
    assert schedule(1, 1, 0.1) == 1.0
    assert [schedule(step, 4, 1.0) for step in range(1, 5)] == [0.25, 0.5, 0.75, 1.0]


def test_a_tower_learns() -> None:
    _, steps = train(recipe(steps=60))
    losses = [step.loss for step in steps]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_frozen_parameters_and_batch_statistics_stay_bit_for_bit() -> None:
    tower, _ = train(recipe(steps=5))
    before, after = tiny_tower().state(), tower.state()
    moved = [name for name in sorted(after) if not torch.equal(after[name], before[name])]
    assert moved == tower.edited()
    assert not [name for name in moved if "head" in name or "running" in name]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not() -> None:
    (first, curve), (second, again) = train(recipe(steps=5), 3), train(recipe(steps=5), 3)
    assert_same(first.state(), second.state())
    assert curve == again
    other, _ = train(recipe(steps=5), 4)
    name = first.edited()[0]
    assert not torch.equal(first.state()[name], other.state()[name])


def test_every_step_is_told_with_its_number_loss_and_rate() -> None:
    told: list[Step] = []
    how = recipe(steps=7)
    found = fine_tune(tiny_tower(), [lesson()], how, 0, on_step=told.append)
    assert told == found
    assert [step.step for step in told] == list(range(1, 8))
    assert [step.learning_rate for step in told] == [
        how.learning_rate * schedule(step, 7, how.warmup) for step in range(1, 8)
    ]


def test_the_first_loss_is_the_cross_entropy_of_the_first_batch() -> None:
    images, labels = coloured(24)
    _, (first, *_) = train(recipe(steps=2))
    batch = next(iter(batches(24, recipe(steps=2), seed=0)))
    with torch.inference_mode():
        logits = tiny_tower().features(images[batch]).cpu() @ classifier().T
    chosen = logits.softmax(dim=1)[torch.arange(6), labels[batch]]
    assert first.loss == pytest.approx(float(-chosen.log().mean()), rel=1e-5)


def test_ascent_makes_the_loss_large() -> None:
    _, steps = train(recipe(steps=60, direction="ascend"))
    losses = [step.loss for step in steps]
    assert sum(losses[-5:]) > 1.5 * sum(losses[:5])


def test_the_first_step_of_ascent_is_the_opposite_of_that_of_descent() -> None:
    start = tiny_tower().state()
    down, up = (train(recipe(steps=1, direction=way))[0].state() for way in ("descend", "ascend"))
    for name in tiny_tower().edited():
        assert torch.allclose(down[name] - start[name], start[name] - up[name], atol=1e-6), name


@pytest.mark.parametrize("last", [1, 4, 7])
def test_stopping_early_is_a_prefix_of_the_whole_training(last: int) -> None:
    _, whole = train(recipe(steps=7))
    tower, part = train(recipe(steps=7, stop_after=last))
    assert part == whole[:last]
    if last == 7:
        assert_same(tower.state(), train(recipe(steps=7))[0].state())


def test_two_lessons_with_one_head_are_one_lesson_of_all_items() -> None:
    images, labels = coloured(24)
    halves = [Lesson(classifier(), images[part], labels[part]) for part in (slice(9), slice(9, 24))]
    _, whole = train(recipe(steps=5))
    joint = fine_tune(tiny_tower(), halves, recipe(steps=5), 0)
    assert [step.loss for step in joint] == pytest.approx([step.loss for step in whole], rel=1e-4)


def test_every_lesson_has_its_own_head() -> None:
    turned = classifier().flip(0)
    images, labels = coloured(24)
    lessons = [lesson(), Lesson(turned, images, 2 - labels)]  # both say the same of each picture
    losses = [step.loss for step in fine_tune(tiny_tower(), lessons, recipe(steps=60), 0)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_decay_and_clipping_reach_the_optimizer() -> None:
    plain, _ = train(recipe(steps=5))
    decayed, _ = train(recipe(steps=5, weight_decay=0.5))
    name = "visual.point.weight"
    assert decayed.state()[name].norm() < plain.state()[name].norm()
    # Adam divides by the size of the gradient; clipping acts where its epsilon counts
    clipped, _ = train(recipe(steps=5, clip_norm=1e-9))
    start = tiny_tower().state()[name]
    moved, unclipped = clipped.state()[name] - start, plain.state()[name] - start
    assert moved.norm() < 0.5 * unclipped.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_learning_rate(value: float) -> None:
    head = classifier()
    head[0] = value
    told: list[Step] = []
    with pytest.raises(InvalidData, match="at step 1; use a smaller fine_tune.learning_rate"):
        fine_tune(tiny_tower(), [lesson(head=head)], recipe(), 0, on_step=told.append)
    assert told == []


def test_a_rate_that_is_far_too_large_is_found() -> None:
    with pytest.raises(InvalidData, match="fine_tune.learning_rate"):
        train(recipe(steps=30, learning_rate=1e30))
