"""MagMax: the element of largest magnitude (Marczak et al., arXiv:2407.06322, section 4)."""

from collections.abc import Mapping

import numpy as np

from taskvec.lazy import Array, Blockwise, Lazy


def magmax(vectors: Mapping[str, Lazy]) -> Lazy:
    """Return in each place the ``delta_t`` with the largest ``|delta_t|``.

    Of equal magnitudes with opposite signs the operand that comes first is taken.
    """
    return Blockwise(list(vectors.values()), _largest)


def _largest(name: str, start: int, parts: list[Array]) -> Array:
    del name, start
    best, largest = parts[0], np.abs(parts[0])
    for part in parts[1:]:
        size = np.abs(part)
        best = np.where(size > largest, part, best)
        np.maximum(size, largest, out=largest)
    return best
