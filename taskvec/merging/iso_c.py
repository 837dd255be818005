"""Iso-C: isotropic merging in the common subspace (Marczak et al., arXiv:2502.04959)."""

from collections.abc import Mapping

from torch import Tensor

from taskvec.lazy import Lazy
from taskvec.spectral import Matrices, Stack, polar


def iso_c(vectors: Mapping[str, Lazy]) -> Lazy:
    """Return ``mean(s) U V^T`` for every matrix and the mean of the vectors for other tensors.

    ``U diag(s) V^T`` is the sum of the T matrices (m, n), and mean(s) is taken over all min(m, n)
    singular values; so a sum of full rank comes out with equal singular values.

    What differs from the authors' code: the singular values that are 0 stay 0, because their
    vectors are arbitrary, and ``text_projection`` is a matrix like any other.
    """

    def merge(stack: Stack) -> Tensor:
        factor, mean = polar(stack.total())
        return factor.mul_(mean)

    return Matrices(list(vectors.values()), merge)
