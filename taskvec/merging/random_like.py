"""A random vector as long as another: a baseline (Ilharco et al., arXiv:2212.04089, section 3)."""

from collections.abc import Mapping
from math import sqrt

import numpy as np
import numpy.typing as npt

from taskvec.lazy import Array, Lazy, only, scaled, sums
from taskvec.options import checked
from taskvec.random_masks import RANGE, lanes

OPERANDS = 1


@checked
def random_like(vectors: Mapping[str, Lazy], *, seed: int = 0) -> Lazy:
    """Return a vector of random direction, each tensor with the norm that it has in the operand.

    The entries are Gaussian, scaled tensor by tensor, so that every direction is equally likely.
    They follow from the seed, the operand's label, the tensor's name and the element's place; see
    `random_masks`. Of the operand only shapes and norms matter; a tensor of zeros stays zero.

    Args:
        vectors: one vector.
        seed: any whole number.
    """
    vector = only("random_like", vectors)
    noise = _Gaussian(vector, seed, next(iter(vectors)))
    squares = sums(
        [vector, noise],
        lambda parts: [np.square(part, dtype=np.float64).sum() for part in parts],
    )
    return scaled(
        noise,
        {name: sqrt(wanted / found) if found else 0.0 for name, (wanted, found) in squares.items()},
    )


class _Gaussian(Lazy):
    """Independent standard normal elements, in the shapes of another vector."""

    def __init__(self, like: Lazy, seed: int, label: str) -> None:
        super().__init__(like.shapes, [like])  # an operand, so that its origin is not forgotten
        self._seed, self._label = seed, label

    def grain(self, name: str) -> int:
        """Return 1: nothing of the operand is read."""
        del name
        return 1

    def block(self, name: str, start: int, stop: int) -> Array:
        """Draw a block: elements 2k and 2k + 1 follow from the lanes 2k and 2k + 1."""
        first, last = start // 2 * 2, (stop + 1) // 2 * 2
        drawn = _normal(lanes(self._seed, self._label, name, first, last).reshape(-1, 2))
        return drawn[start - first : stop - first].astype(np.float32)


def _normal(pairs: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
    """Return two normal numbers for each pair (n, 2) of uniform ones: (2n,).

    Source: Box and Muller, A note on the generation of random normal deviates, 1958.
    """
    uniform = (np.ascontiguousarray(pairs.T) + 0.5) / RANGE  # (2, n), above 0 and below 1
    radius = np.sqrt(-2 * np.log(uniform[0]))
    angle = 2 * np.pi * uniform[1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
