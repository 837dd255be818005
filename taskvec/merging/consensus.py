"""Consensus: what of a merged vector matters for several tasks (Wang et al., arXiv:2405.07813)."""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from taskvec.lazy import Array, Blockwise, Lazy, added
from taskvec.merging.tall_mask import mask
from taskvec.merging.ties import rule
from taskvec.options import Natural, Positive, checked


@checked
def consensus(
    vectors: Mapping[str, Lazy],
    *,
    k: Natural = 2,
    threshold: Positive = 0.4,
    variant: Literal["ta", "ties"] = "ta",
) -> Lazy:
    """Return the merged vector ``tau``, zero where fewer than k of the TALL masks are set.

    ``m_t = |delta_t| > threshold * |tau - delta_t|``. k=1 removes what matters for no task, k=2
    also what matters for one alone, k=0 nothing, and k > T all.

    Args:
        vectors: label -> delta.
        k: how many tasks an element must matter for, at least 0.
        threshold: as in `tall_mask`, here the same for all tasks.
        variant: "ta" for the sum of the vectors; "ties" for their TIES merging, trimmed to 20 % and
            added.
    """
    merge = rule(vectors, 0.2, "sum", "flat") if variant == "ties" else None
    limit = np.float32(threshold)

    def agreed(name: str, start: int, parts: list[Array]) -> Array:
        tau = merge(name, start, parts) if merge else added(parts)
        count = np.zeros(tau.shape, np.min_scalar_type(len(parts)))
        for part in parts:
            count += mask(part, tau, limit)
        tau *= count >= k
        return tau

    return Blockwise(list(vectors.values()), agreed)
