"""DELLA: drop elements at random, small ones more often (Deep et al., arXiv:2406.11617).

This is the dropping (MAGPRUNE); the election of signs that may follow it is that of TIES:
``ties(della(a), della(b), density=1)``.
"""

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Literal

import numpy as np

from taskvec.errors import InvalidInput
from taskvec.lazy import Array, Blockwise, Lazy, row_length, total
from taskvec.merging.dare import same_l1_norms
from taskvec.options import Fraction, Share, checked
from taskvec.random_masks import RANGE, Lanes, bounds, lanes


@checked
def della(
    vectors: Mapping[str, Lazy],
    *,
    density: Fraction = 0.5,
    epsilon: Share = 0.15,
    seed: int = 0,
    rescale: Literal["unbiased", "l1", "none"] = "unbiased",
) -> Lazy:
    """Return ``sum_t m_t * delta_t / q_t``, each ``m_t`` 1 with probability ``q_t``, else 0.

    In a row of n elements the one of rank r by magnitude, from 0 for the smallest, has
    ``q = density - epsilon + 2 * epsilon * r / (n - 1)``; equal magnitudes rank by place. A row of
    one element has ``q = density``.

    Args:
        vectors: label -> delta.
        density: the mean probability to keep an element.
        epsilon: how far the probability goes below and above it, at least 0; both ends must lie
            between 0 and 1.
        seed: any whole number; the mask is drawn as in `dare`.
        rescale: "unbiased" divides each element by its own q; "l1" keeps the sum of magnitudes of
            each tensor, as mergekit does; "none".

    Rows are those of the last axis; mergekit ranks along the second axis, which is another one in
    tensors of more than two.
    """
    low, high = density - epsilon, density + epsilon
    if not (low > 0 and high < 1):
        raise InvalidInput(
            f"density {density} and epsilon {epsilon}: expected probabilities density - epsilon "
            f"above 0 and density + epsilon below 1, found {low:g} and {high:g}"
        )

    @lru_cache
    def below(length: int) -> Lanes:
        limits = bounds(np.linspace(low, high, length) if length > 1 else [density])
        return np.maximum(limits, 1)  # elements are divided by their probability

    def drop(vector: Lazy, label: str, name: str, start: int, parts: list[Array]) -> Array:
        (values,) = parts
        length = row_length(vector.shapes[name])
        limits = _by_rank(values.reshape(-1, length), below(length)).reshape(-1)
        keep = lanes(seed, label, name, start, start + values.size) < limits
        if rescale != "unbiased":
            return values * keep
        result = limits.astype(np.float32)
        result *= np.float32(1 / RANGE)
        np.divide(values, result, out=result)
        return np.multiply(result, keep, out=result)

    sparse = {
        label: Blockwise([vector], partial(drop, vector, label), "row")
        for label, vector in vectors.items()
    }
    if rescale == "l1":
        return total(same_l1_norms(vectors[label], sparse[label]) for label in vectors)
    return total(sparse.values())


def _by_rank(rows: Array, values: Lanes) -> Lanes:
    """Return for each element of (R, C) the value, of (C,), of its rank by magnitude in its row.

    A magnitude and its place are sorted as one whole number, because numpy sorts those several
    times faster than it computes a stable order.
    """
    keys = np.abs(rows).view(np.uint32).astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= np.arange(rows.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    keys &= np.uint64(0xFFFFFFFF)
    result: Lanes = np.empty(rows.shape, np.uint32)
    np.put_along_axis(result, keys.astype(np.intp), values[np.newaxis], axis=1)
    return result
