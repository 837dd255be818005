"""Iso-C."""

from collections.abc import Mapping

from torch import Tensor

from taskvec.lazy import Lazy
from taskvec.spectral import Matrices, Stack, polar


def iso_c(vectors: Mapping[str, Lazy]) -> Lazy:
    """x"""

    def merge(stack: Stack) -> Tensor:
        factor, mean = polar(stack.total())
        return factor * mean

    return Matrices(list(vectors.values()), merge)
