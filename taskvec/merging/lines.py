"""LiNeS: scale the blocks of a network by their depth (Wang et al., arXiv:2410.17146)."""

from collections.abc import Mapping

import numpy as np

from taskvec.layers import places
from taskvec.lazy import Lazy, l1_norms, only, scaled, total
from taskvec.options import checked

OPERANDS = 1
LARGEST = float(np.finfo(np.float32).max)


@checked
def lines(vectors: Mapping[str, Lazy], *, alpha: float = -1.0, beta: float = 0.0) -> Lazy:
    """Return a vector whose block l of L is multiplied by ``alpha + beta * l / (L - 1)``.

    Tensors outside all blocks are multiplied by alpha, and so is the block of a stack of one.

    Args:
        vectors: one vector, merged or of one task.
        alpha: the factor of the first block; negative for the published rule for a merged vector,
            ``alpha = ||sum_t delta_t||_1 / ||merged||_1 / T`` over the T vectors that it is merged
            from, which is 1 for the vector of one task.
        beta: what the factor grows by from the first block to the last.

    The authors' code looks for ``.0.``, ``.1.`` .. anywhere in a name; see `layers` for the rule
    here.
    """
    vector = only("lines", vectors)
    first = alpha if alpha >= 0 else _published_alpha(vector)
    factors = dict.fromkeys(vector.shapes, first)
    for name, place in places(vector.shapes).items():
        factors[name] += beta * place.layer / max(1, place.depth - 1)
    return scaled(vector, factors)


def _published_alpha(merged: Lazy) -> float:
    """Return ``||sum of leaves||_1 / ||merged||_1 / T``, 1/T for a vector of zeros."""
    leaves = merged.leaves
    norms = l1_norms([total(leaves), merged])
    whole, own = np.sum(list(norms.values()), axis=0)
    # The limit is for a merged vector that is next to nothing: a factor must be a float32.
    return min(float(whole / own / len(leaves)), LARGEST) if own else 1 / len(leaves)
