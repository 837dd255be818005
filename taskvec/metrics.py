"""Accuracy, its interval, and what the paper derives from it. Shares are fractions in [0, 1]."""

from math import sqrt

import torch
from torch import Tensor

from taskvec.errors import InvalidData
from taskvec.towers import Tower

# Large enough to be efficient; fixed because it decides the last bit of the features.
BATCH = 100
Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@torch.inference_mode()
def count_correct(tower: Tower, head: Tensor, images: Tensor, labels: Tensor) -> int:
    """Return how many pictures get their label.

    Args:
        tower: the model.
        head: (classes, D) classifier; the predicted class has the largest inner product.
        images: (N, 3, S, S) uint8.
        labels: (N,) int64.

    Raises:
        InvalidData: a logit is NaN, for which argmax would silently answer class 0.
    """
    weights = head.to(tower.device)
    correct = 0
    for start in range(0, len(images), BATCH):
        logits = tower.features(images[start : start + BATCH]) @ weights.T
        if torch.isnan(logits).any():
            raise InvalidData(
                "the model answers NaN; a weight overflowed: use smaller coefficients"
            )
        predicted = logits.argmax(dim=1).cpu()
        correct += int((predicted == labels[start : start + BATCH]).sum())
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
