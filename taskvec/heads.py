"""Frozen classifiers made of class prototypes; text heads come from the model family."""

import torch
from torch import Tensor
from torch.nn import functional

from taskvec.metrics import BATCH
from taskvec.towers import Tower


@torch.no_grad()  # not inference_mode: the head must serve in training
def prototype_head(tower: Tower, images: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Return ``scale`` times the centred unit mean feature of each class, (classes, D).

    A nearest-class-mean classifier on pre-trained features; a text head's stand-in for towers
    without text.

    Args:
        tower: the pre-trained model.
        images: (N, 3, S, S) uint8.
        labels: (N,) int64, dense from 0.
        scale: length of the rows: logits are ``scale`` times the cosine.
    """
    features = torch.cat(
        [tower.features(images[i : i + BATCH]).cpu() for i in range(0, len(images), BATCH)]
    )
    classes = int(labels.max()) + 1
    means = torch.stack([features[labels == label].mean(0) for label in range(classes)])
    return (scale * functional.normalize(means - means.mean(0), dim=-1)).clone()
