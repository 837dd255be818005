"""Magnitude pruning: a sum of trimmed vectors (Yadav et al., arXiv:2306.01708, section 4.1)."""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Literal

import numpy as np

from taskvec.lazy import (
    Array,
    Blockwise,
    Lazy,
    absolute,
    order_statistics,
    tensor_order_statistics,
)
from taskvec.options import Fraction, checked


@checked
def magnitude(
    vectors: Mapping[str, Lazy],
    *,
    density: Fraction = 0.2,
    scope: Literal["flat", "tensor"] = "flat",
) -> Lazy:
    """Return ``sum_t trim(delta_t)``, where trim keeps the largest elements and makes others zero.

    Args:
        vectors: label -> delta.
        density: the fraction of the elements to keep, above 0 and at most 1. Of n elements the
            ``max(1, floor(density * n))`` largest are kept, and all that equal the least of them.
        scope: "flat" compares all elements of a vector, "tensor" those of each tensor.

    The authors' code keeps one element more, because it counts k-th values from 1.
    """
    operands = list(vectors.values())
    least = thresholds(operands, density, scope)

    def add(name: str, start: int, parts: list[Array]) -> Array:
        del start
        total = trim(parts[0], least[0][name])
        for part, threshold in zip(parts[1:], least[1:], strict=True):
            total += trim(part, threshold[name])
        return total

    return Blockwise(operands, add)


def trim(values: Array, threshold: np.float32) -> Array:
    """Return the values whose magnitude is at least the threshold, zero in place of the others."""
    result = np.abs(values)
    keep = result >= threshold
    return np.multiply(values, keep, out=result)


def thresholds(vectors: Sequence[Lazy], density: float, scope: str) -> list[dict[str, np.float32]]:
    """Return the least magnitude that each vector keeps in each tensor: vector -> name -> value."""
    return [_thresholds(vector, density, scope) for vector in vectors]


def kept(density: float, number: int) -> int:
    """Return how many of so many elements are kept: ``floor(density * number)``, at least 1."""
    return max(1, portion(density, number))


def portion(fraction: float, number: int) -> int:
    """Return ``floor(fraction * number)`` for the fraction as it is written.

    0.29 of 100 are 29, although 0.29 * 100 is less than 29 in binary arithmetic.
    """
    return int(Decimal(repr(float(fraction))) * number)


def _thresholds(vector: Lazy, density: float, scope: str) -> dict[str, np.float32]:
    least = dict.fromkeys(vector.shapes, np.float32(0))
    number = sum(vector.size(name) for name in vector.shapes)
    if density == 1 or not number:
        return least
    if scope == "flat":
        (value,) = order_statistics(absolute(vector), [number - kept(density, number)])
        return dict.fromkeys(least, np.float32(value))
    found = tensor_order_statistics(absolute(vector), lambda size: [size - kept(density, size)])
    return least | {name: np.float32(values[0]) for name, values in found.items() if values}
