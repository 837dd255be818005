"""Accuracy, its interval, and what the paper derives from it. Shares are fractions in [0, 1]."""

from collections.abc import Iterator
from math import sqrt

import torch
from torch import Tensor

from taskvec.errors import InvalidData
from taskvec.towers import Tower

# Large enough to be efficient; fixed because it decides the last bit of the features.
BATCH = 100
KEPT_BYTES = 2**30  # of normalised pictures a task
Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


class Pictures:
    """Labelled pictures in batches, normalised once if they fit into memory, else as they come.

    A search looks at the same pictures for every coefficient.
    """

    def __init__(self, tower: Tower, images: Tensor, labels: Tensor) -> None:
        """Take the pictures.

        Args:
            tower: knows the normalisation; its weights do not matter.
            images: (N, 3, S, S) uint8.
            labels: (N,) int64.
        """
        self._tower = tower
        self._images = images.split(BATCH)
        self._labels = labels.split(BATCH)
        fits = images.numel() * 4 <= KEPT_BYTES
        self._normalized = [tower.normalize(batch) for batch in self._images] if fits else None

    def __len__(self) -> int:
        return sum(len(batch) for batch in self._labels)

    @property
    def chunks(self) -> int:
        """The number of batches."""
        return len(self._labels)

    def chunk(self, number: int) -> tuple[Tensor, Tensor]:
        """Return one batch as `__iter__` yields it; numbers start from 0."""
        if self._normalized is not None:
            return self._normalized[number], self._labels[number]
        return self._tower.normalize(self._images[number]), self._labels[number]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised pictures (n, 3, S, S) float32 and their labels (n,)."""
        kept = self._normalized or map(self._tower.normalize, self._images)
        return zip(kept, self._labels, strict=True)


@torch.inference_mode()
def count_correct(tower: Tower, head: Tensor, pictures: Pictures) -> int:
    """Return how many pictures get their label.

    Args:
        tower: the model.
        head: (classes, D) classifier; the predicted class has the largest inner product.
        pictures: what to look at.

    Raises:
        InvalidData: a logit is NaN, for which argmax would silently answer class 0.
    """
    weights = head.to(tower.device).T
    correct = 0
    for normalized, labels in pictures:
        best, predicted = (tower.embed(normalized) @ weights).max(dim=1)
        if torch.isnan(best).any():  # max passes NaN on
            raise InvalidData(
                "the model answers NaN; a weight overflowed: use smaller coefficients"
            )
        correct += int((predicted.cpu() == labels).sum())
    return correct


def wilson_interval(correct: int, items: int, z: float = Z95) -> tuple[float, float]:
    """Return the Wilson score interval of ``correct / items`` (Wilson 1927, JASA 22:209)."""
    p = correct / items
    center = p + z * z / (2 * items)
    spread = z * sqrt(p * (1 - p) / items + z * z / (4 * items * items))
    scale = 1 + z * z / items
    # The ends are exact at 0 and 1; rounding must not push them past the estimate.
    low = 0.0 if correct == 0 else (center - spread) / scale
    high = 1.0 if correct == items else (center + spread) / scale
    return max(0.0, low), min(1.0, high)


def normalized_accuracy(accuracy: float, finetuned: float) -> float:
    """Return ``accuracy / finetuned`` (arXiv:2212.04089, section 4).

    Raises:
        InvalidData: the fine-tuned model is never right, so that nothing can be compared with it.
    """
    if finetuned <= 0:
        raise InvalidData(
            "the fine-tuned model has accuracy 0, normalised accuracy is undefined; "
            "check the task's labels and fine_tune in params.yaml"
        )
    return accuracy / finetuned


def ratio(accuracy: float, pretrained: float) -> float:
    """Return ``accuracy / pretrained``; NaN if the pre-trained model is never right."""
    return accuracy / pretrained if pretrained else float("nan")
