"""Fine-tuning on one task or several at once: all edited parameters, the heads frozen.

The paper's recipe (arXiv:2212.04089, appendix B): AdamW, linear warm-up, cosine decay, gradient
norm clipped as in its code; the number of steps, batch and rate are in params.yaml.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import cos, pi

import torch
from torch import Tensor
from torch.nn import functional

from taskvec.errors import InvalidData
from taskvec.passes import Passage
from taskvec.sections import FineTune
from taskvec.towers import PREFIX, Tower


@dataclass(frozen=True)
class Lesson:
    """The training items of one task.

    Attributes:
        head: (classes, D), frozen.
        images: (N, 3, S, S) uint8.
        labels: (N,) int64.
    """

    head: Tensor
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Step:
    """One optimisation step: its number from 1, the batch's cross-entropy in nats, the rate."""

    step: int
    loss: float
    learning_rate: float


def fine_tune(
    tower: Tower,
    lessons: Sequence[Lesson],
    recipe: FineTune,
    seed: int,
    on_step: Callable[[Step], None] = lambda step: None,
    passage: Passage | None = None,
) -> list[Step]:
    """Train the tower in place and return every step.

    Args:
        tower: holds theta_pre; afterwards theta_ft. Batch statistics stay as they are.
        lessons: what to learn; of several, every batch holds items as they are drawn from all.
        recipe: steps, batch size, rate and so on; ``ascend`` makes the loss large instead.
        seed: decides the order of the pictures.
        on_step: is told every step while training goes on.
        passage: how batches go through the tower; made of the recipe, for one process, if None.

    Raises:
        InvalidData: the loss is NaN or infinite.
        OutOfMemory: a step does not fit into the memory; see `Passage` for this and more.
    """
    passage = passage or Passage(tower, recipe)
    names = set(tower.edited())
    parameters = []
    for name, parameter in tower.module.named_parameters():
        parameter.requires_grad_(PREFIX + name in names)
        if parameter.requires_grad:
            parameters.append(parameter)
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    heads = [lesson.head.to(tower.device) for lesson in lessons]
    sign = -1.0 if recipe.direction == "ascend" else 1.0
    items = sum(len(lesson.labels) for lesson in lessons)
    steps = []
    for number, batch in enumerate(batches(items, recipe, seed), start=1):
        rate = recipe.learning_rate * schedule(number, recipe.steps, recipe.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        part = partial(_loss, passage, heads, lessons, len(batch))
        loss = passage.gradient(number, batch, parameters, part, sign)
        if not torch.isfinite(loss):
            raise InvalidData(
                f"the loss is {loss.item()} at step {number}; use a smaller fine_tune.learning_rate"
            )
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
        optimizer.step()
        steps.append(Step(number, loss.item(), rate))
        on_step(steps[-1])
        if number == recipe.stop_after:
            break
    return steps


def _loss(
    passage: Passage,
    heads: Sequence[Tensor],
    lessons: Sequence[Lesson],
    items: int,
    piece: Tensor,
) -> Tensor:
    """Return what a piece of a batch adds to the mean cross-entropy of its items.

    The piece holds positions in the lessons, one after the other.
    """
    images, labels, start = [], [], 0
    for lesson in lessons:
        own = piece[(piece >= start) & (piece < start + len(lesson.labels))] - start
        images.append(lesson.images[own])
        labels.append(lesson.labels[own].to(heads[0].device))
        start += len(lesson.labels)
    features = passage.features(torch.cat(images)).split([len(part) for part in labels])
    losses = [
        functional.cross_entropy(part @ head.T, label, reduction="sum")
        for part, head, label in zip(features, heads, labels, strict=True)
        if len(label)
    ]
    return torch.stack(losses).sum() / items


def batches(items: int, recipe: FineTune, seed: int) -> Iterator[Tensor]:
    """Yield ``recipe.steps`` batches of indices; every item once before any item twice."""
    generator = torch.Generator().manual_seed(seed)
    queue = torch.empty(0, dtype=torch.int64)
    for _ in range(recipe.steps):
        while len(queue) < recipe.batch_size:
            queue = torch.cat([queue, torch.randperm(items, generator=generator)])
        batch, queue = queue[: recipe.batch_size], queue[recipe.batch_size :]
        yield batch


def schedule(step: int, steps: int, warmup: float) -> float:
    """Return the share of the learning rate at a step from 1: linear warm-up, then cosine to 0."""
    rising = max(1, round(warmup * steps))
    if step <= rising:
        return step / rising
    return 0.5 * (1 + cos(pi * (step - rising) / max(1, steps - rising)))
