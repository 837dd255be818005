"""Layers: a range of blocks, for coefficients by layer (Yang et al., arXiv:2310.02575)."""

from collections.abc import Mapping

from taskvec.errors import InvalidInput
from taskvec.layers import places
from taskvec.lazy import Lazy, only, scaled
from taskvec.options import Index, Natural, checked

OPERANDS = 1


@checked
def layers(vectors: Mapping[str, Lazy], *, first: Natural = 0, last: Index = -1) -> Lazy:
    """Return a vector with its blocks ``first`` to ``last``, and zeros elsewhere.

    Args:
        vectors: one vector.
        first: the first block to keep, counted from 0 in each stack; see `taskvec.layers`.
        last: the last block to keep; -1 for the last one of each stack.
    """
    vector = only("layers", vectors)
    found = places(vector.shapes)
    kept = {
        name: float(first <= place.layer and (last == -1 or place.layer <= last))
        for name, place in found.items()
    }
    if not any(kept.values()):
        depth = max((place.depth for place in found.values()), default=0)
        raise InvalidInput(
            f"layers first={first} last={last}: no parameter is in these blocks; "
            f"the vector has {depth or 'no'} blocks"
        )
    return scaled(vector, {name: kept.get(name, 0.0) for name in vector.shapes})
