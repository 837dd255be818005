"""DARE: drop elements at random and rescale the rest (Yu et al., arXiv:2311.03099, section 3)."""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import numpy as np

from taskvec.lazy import Array, Blockwise, Lazy, l1_norms, scaled, total
from taskvec.options import Share, checked
from taskvec.random_masks import bounds, lanes

LARGEST = float(np.finfo(np.float32).max)


@checked
def dare(
    vectors: Mapping[str, Lazy],
    *,
    p: Share = 0.5,
    seed: int = 0,
    rescale: Literal["unbiased", "l1", "none"] = "unbiased",
) -> Lazy:
    """Return ``sum_t m_t * delta_t / (1 - p)``, each ``m_t`` 1 with probability ``1 - p``, else 0.

    The mask follows from the seed, the vector's label, the tensor's name and the element's place;
    see `random_masks`.

    Args:
        vectors: label -> delta.
        p: the probability to drop an element, at least 0 and below 1. The paper goes up to 0.99.
        seed: any whole number.
        rescale: "unbiased" divides by ``1 - p``, so that the mean over seeds is the delta; "l1"
            multiplies each tensor so that its sum of magnitudes stays, as mergekit does; "none".
    """
    if p == 0:
        return total(vectors.values())
    below = bounds(1 - p)
    divisor = np.float32(1 - p if rescale == "unbiased" else 1)

    def drop(label: str, name: str, start: int, parts: list[Array]) -> Array:
        (values,) = parts
        keep = lanes(seed, label, name, start, start + values.size) < below
        result = values / divisor
        return np.multiply(result, keep, out=result)

    sparse = {label: Blockwise([vector], partial(drop, label)) for label, vector in vectors.items()}
    if rescale == "l1":
        return total(same_l1_norms(vectors[label], sparse[label]) for label in vectors)
    return total(sparse.values())


def same_l1_norms(vector: Lazy, sparse: Lazy) -> Lazy:
    """Return ``sparse``, each tensor scaled to the L1 norm that it has in ``vector``.

    Tensors of which nothing is left stay zero.
    """
    norms = l1_norms([vector, sparse])
    return scaled(sparse, {name: _ratio(before, after) for name, (before, after) in norms.items()})


def _ratio(before: float, after: float) -> float:
    """Return ``before / after``, 1 where that is no float32."""
    return float(before / after) if after > before / LARGEST else 1.0
