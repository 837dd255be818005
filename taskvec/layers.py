"""Which block of a network a parameter belongs to, read from its name.

Names are split at their dots and whole components are compared, so ``resblocks.7.ln.0.w`` is in
block 7. A *stack* is the list that holds the blocks, such as ``visual.transformer.resblocks``; the
two towers of CLIP are two stacks.
"""

from collections.abc import Iterable
from typing import NamedTuple

CONTAINERS = frozenset({"block", "blocks", "h", "layer", "layers", "resblocks"})


class Place(NamedTuple):
    """A block's place in its stack: ``layer`` counts from 0 and ``depth`` is their number."""

    layer: int
    depth: int


def layer_of(name: str) -> int | None:
    """Return the index of the block that a parameter belongs to, None for one outside all.

    The first container that is followed by a number decides: ``encoder.block.3.layer.1.wi`` is in
    block 3.
    """
    found = _block(name)
    return found[1] if found else None


def places(names: Iterable[str]) -> dict[str, Place]:
    """Return name -> place for the parameters in blocks; a stack has ``highest index + 1``."""
    found = {name: block for name in names if (block := _block(name))}
    depths: dict[str, int] = {}
    for stack, index in found.values():
        depths[stack] = max(depths.get(stack, 0), index + 1)
    return {name: Place(index, depths[stack]) for name, (stack, index) in found.items()}


def _block(name: str) -> tuple[str, int] | None:
    """Return a parameter's stack and the index of its block."""
    parts = name.split(".")
    for place, (container, index) in enumerate(zip(parts, parts[1:], strict=False)):
        if container in CONTAINERS and index.isascii() and index.isdigit():
            return ".".join(parts[: place + 1]), int(index)
    return None
