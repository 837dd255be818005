"""Iso-CTS: Iso-C with task-specific subspaces (Marczak et al., arXiv:2502.04959)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from taskvec.errors import InvalidInput
from taskvec.lazy import Lazy
from taskvec.spectral import Matrices, Stack, joined, leading, product

ROUNDING = 1e-5  # of a matrix's norm: what float32 leaves of a matrix that lies in the common space


def iso_cts(vectors: Mapping[str, Lazy], *, common: float = 0.8) -> Lazy:
    """Return ``mean(s) polar(U) polar(V)^T`` for every matrix, the mean for other tensors.

    U, s and V hold the k largest singular values and vectors of the sum of the T matrices (m, n)
    and, for each task, the (r - k) / T largest of what its matrix has outside of the span of those
    left singular vectors; r = min(m, n). k is the common share of r, moved to the nearest number
    for which r - k is a multiple of T.

    Args:
        vectors: label -> vector.
        common: share of the r singular values that is common, a fraction from 0 to 1.

    What differs from the authors' code: singular vectors that nothing determines (of a singular
    value 0, or shared by several tasks) contribute nothing, where the authors' are arbitrary, and
    ``text_projection`` is a matrix like any other.
    """
    if not 0 <= common <= 1:
        raise InvalidInput(f"common {common}: expected a fraction from 0 to 1")
    tasks = len(vectors)

    def merge(stack: Stack) -> Tensor:
        rank = min(stack.shape)
        own = min(round((rank - int(rank * common)) / tasks), rank // tasks)
        shared = rank - own * tasks
        parts = [leading(stack.total(), shared)] if shared else []
        if own:
            parts += [_beside(parts[0][0] if shared else None, matrix, own) for matrix in stack]
        left, values, right = zip(*parts, strict=True)
        return joined(left, torch.cat(values).mean(), right)

    return Matrices(list(vectors.values()), merge)


def _beside(span: Tensor | None, matrix: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest singular values of what a matrix has outside of a span (m, k)."""
    rest = matrix
    if span is not None:
        rest = matrix - product(span, product(matrix.T, span.T))
    return leading(rest, number, ROUNDING * float(torch.linalg.vector_norm(matrix)))
