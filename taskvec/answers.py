"""What a model answers on labelled pictures, item by item: right or wrong, and the cross-entropy.

Pictures are asked about in chunks of `CHUNK`, always the same ones: the last bit of a logit depends
on the batch, so that an answer from one search is an answer of any other. Stage prepare gives them
an order in which the first chunks are a fair sample.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from taskvec.errors import InvalidData
from taskvec.metrics import BATCH, Pictures
from taskvec.towers import Tower

CHUNK = BATCH
NOT_A_NUMBER = "the model answers NaN; a weight overflowed: use smaller coefficients"


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model says of n items, in their order.

    Attributes:
        correct: (n,) whether the largest logit is that of the label.
        loss: (n,) cross-entropy in nats.
    """

    correct: npt.NDArray[np.bool_]
    loss: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.correct)

    @cached_property
    def accuracy(self) -> float:
        """The share of correct items."""
        return int(self.correct.sum()) / len(self)

    @cached_property
    def mean_loss(self) -> float:
        """The mean cross-entropy in nats, summed in float64."""
        return float(self.loss.astype(np.float64).mean())

    def packed(self) -> bytes:
        """Return the answers as bytes: their number, a bit each, a float32 each."""
        bits = np.packbits(self.correct).tobytes()
        return struct.pack("<I", len(self)) + bits + self.loss.astype("<f4").tobytes()


def unpacked(content: bytes) -> Answers:
    """Return what `Answers.packed` wrote."""
    (number,) = struct.unpack_from("<I", content)
    bits = np.frombuffer(content, np.uint8, (number + 7) // 8, 4)
    loss = np.frombuffer(content, "<f4", number, 4 + len(bits))
    return Answers(np.unpackbits(bits, count=number).astype(bool), loss.astype(np.float32))


def join(parts: Iterable[Answers]) -> Answers:
    """Return the answers of several chunks as one."""
    parts = list(parts)
    return Answers(
        np.concatenate([part.correct for part in parts]),
        np.concatenate([part.loss for part in parts]),
    )


@torch.inference_mode()
def answer(tower: Tower, head: Tensor, pictures: Pictures, chunk: int) -> Answers:
    """Return the answers on one chunk.

    Args:
        tower: the model.
        head: (classes, D) classifier.
        pictures: of one split of one task.
        chunk: from 0; `Pictures.chunks` of them.

    Raises:
        InvalidData: a logit is NaN, for which argmax would silently answer class 0.
    """
    normalized, labels = pictures.chunk(chunk)
    return _judged((tower.embed(normalized) @ head.to(tower.device).T).cpu(), labels)


def cross_entropy(
    tower: Tower, head: Tensor, pictures: Pictures, chunk: int
) -> tuple[Tensor, Answers]:
    """Return the mean cross-entropy of a chunk in nats, to be differentiated, and the answers."""
    normalized, labels = pictures.chunk(chunk)
    logits = tower.embed(normalized) @ head.to(tower.device).T
    loss = functional.cross_entropy(logits, labels.to(tower.device))
    return loss, _judged(logits.detach().cpu(), labels)


def entropy(tower: Tower, head: Tensor, pictures: Pictures, chunk: int) -> tuple[Tensor, Answers]:
    """Return the mean entropy of the predictions in nats, to be differentiated, and the answers.

    The labels have no part in the entropy (arXiv:2310.02575, eq. 5).
    """
    normalized, labels = pictures.chunk(chunk)
    logits = tower.embed(normalized) @ head.to(tower.device).T
    logarithms = functional.log_softmax(logits, dim=1)
    mean = -(logarithms.exp() * logarithms).sum(dim=1).mean()
    return mean, _judged(logits.detach().cpu(), labels)


def _judged(logits: Tensor, labels: Tensor) -> Answers:
    if torch.isnan(logits).any():
        raise InvalidData(NOT_A_NUMBER)
    loss = functional.cross_entropy(logits, labels, reduction="none")
    return Answers((logits.argmax(dim=1) == labels).numpy(), loss.float().numpy())
