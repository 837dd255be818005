"""TALL masks: what of a sum of vectors matters for one task (Wang et al., arXiv:2405.07813)."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from taskvec.errors import InvalidInput, nearest
from taskvec.lazy import Array, Blockwise, Lazy, added
from taskvec.options import Positive, checked


@checked
def tall_mask(vectors: Mapping[str, Lazy], *, task: str, threshold: Positive = 0.4) -> Lazy:
    """Return ``m_t * tau`` with ``tau = sum_i delta_i``, ``m_t = |delta_t| > c * |tau - delta_t|``.

    Args:
        vectors: label -> delta.
        task: t, the label of one of the vectors.
        threshold: c, above 0; the authors take for each task the best of 0.2, 0.3 .. 0.6 on
            validation data.
    """
    labels = list(vectors)
    if task not in labels:
        raise InvalidInput(f"task {task!r}: no such operand; {nearest(task, labels)}")
    place, limit = labels.index(task), np.float32(threshold)

    def masked(name: str, start: int, parts: list[Array]) -> Array:
        del name, start
        tau = added(parts)
        tau *= mask(parts[place], tau, limit)
        return tau

    return Blockwise(list(vectors.values()), masked)


def mask(delta: Array, merged: Array, threshold: np.float32) -> npt.NDArray[np.bool_]:
    """Return where ``|delta| > threshold * |merged - delta|``."""
    rest = merged - delta
    np.abs(rest, out=rest)
    rest *= threshold
    return np.abs(delta) > rest
