"""Weight averaging: the mean of task vectors (Wortsman et al., arXiv:2203.05482, uniform soup)."""

from collections.abc import Mapping

import numpy as np

from taskvec.lazy import Array, Blockwise, Lazy, total


def average(vectors: Mapping[str, Lazy]) -> Lazy:
    """Return ``1/T * sum_t delta_t``: the sum in the order given, divided once by T."""
    number = np.float32(len(vectors))

    def divide(name: str, start: int, parts: list[Array]) -> Array:
        del name, start
        return parts[0] / number

    return Blockwise([total(vectors.values())], divide)
