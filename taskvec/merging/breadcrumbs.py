"""Model Breadcrumbs: drop the largest and the small (Davari & Belilovsky, arXiv:2312.06795)."""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from taskvec.lazy import (
    Array,
    Blockwise,
    Lazy,
    absolute,
    row_length,
    tensor_order_statistics,
    total,
)
from taskvec.merging.magnitude import kept, portion
from taskvec.options import Fraction, Share, checked


@checked
def breadcrumbs(
    vectors: Mapping[str, Lazy],
    *,
    density: Fraction = 0.2,
    gamma: Share = 0.1,
    scope: Literal["row", "tensor"] = "row",
) -> Lazy:
    """Return ``sum_t m_t * delta_t``, where ``m_t`` keeps elements of a middling magnitude.

    Of n elements the ``floor(gamma * n)`` largest are dropped, which is none where
    ``gamma * n < 1``; of the rest the ``max(1, floor(density * n))`` largest are kept, and all that
    equal the least or the largest of them. ``gamma=0`` is `magnitude` in the same scope.

    Args:
        vectors: label -> delta.
        density: the fraction of all elements to keep, above 0 and at most 1.
        gamma: the fraction of all elements to drop as too large, at least 0 and below 1.
        scope: "row" compares the elements of each row of the last axis, as the authors' code
            does; "tensor" those of each tensor, as mergekit does. If density and gamma together
            exceed 1, "row" keeps all but the dropped, and "tensor" drops less.

    The authors' code and mergekit lose short rows or tensors whole, where ``density * n < 1``; here
    one element is kept.
    """
    if scope == "row":
        return total(_by_row(vector, density, gamma) for vector in vectors.values())
    return total(_by_tensor(vector, density, gamma) for vector in vectors.values())


def _by_row(vector: Lazy, density: float, gamma: float) -> Lazy:
    def middle(name: str, start: int, parts: list[Array]) -> Array:
        del start
        length = row_length(vector.shapes[name])
        rows = parts[0].reshape(-1, length)
        last = length - portion(gamma, length)
        first = max(0, last - kept(density, length))
        magnitudes = np.abs(rows)
        ordered = np.sort(magnitudes, axis=1)
        low, high = ordered[:, first : first + 1], ordered[:, last - 1 : last]
        return _between(rows, magnitudes, low, high).reshape(-1)

    return Blockwise([vector], middle, "row")


def _by_tensor(vector: Lazy, density: float, gamma: float) -> Lazy:
    def ends(size: int) -> tuple[int, int]:
        number = kept(density, size)
        last = max(number, size - portion(gamma, size))
        return last - number, last - 1

    found = tensor_order_statistics(absolute(vector), ends)

    def middle(name: str, start: int, parts: list[Array]) -> Array:
        del start
        low, high = (np.float32(value) for value in found[name])
        return _between(parts[0], np.abs(parts[0]), low, high)

    return Blockwise([vector], middle)


def _between(
    values: Array, magnitudes: Array, low: np.float32 | Array, high: np.float32 | Array
) -> Array:
    """Return the values whose magnitudes lie between both ends; overwrites the magnitudes."""
    keep = magnitudes >= low
    keep &= magnitudes <= high
    return np.multiply(values, keep, out=magnitudes)
