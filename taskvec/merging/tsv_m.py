"""TSV-M: task singular vectors made orthogonal (Gargiulo et al., arXiv:2412.00081)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from taskvec.lazy import Lazy
from taskvec.spectral import Matrices, Stack, joined, leading


def tsv_m(vectors: Mapping[str, Lazy]) -> Lazy:
    """Return ``polar(U) diag(s) polar(V)^T`` for every matrix and the mean for other tensors.

    Of each of the T matrices (m, n) the k = min(m, n) // T largest singular values and their
    vectors are kept; side by side they are U (m, T k), s and V (n, T k). The polar factor of a
    matrix is the nearest one with orthonormal columns.

    As in the authors' code, tensors with ``text_projection`` in their name take the mean. What
    differs: a matrix with min(m, n) < T takes the mean as well, instead of vanishing, and singular
    vectors that nothing determines contribute nothing, where the authors' are arbitrary: those of
    a singular value 0, and of U and V the part that the vectors of different tasks share (the
    polar factor is taken over the singular values above 0).
    """
    tasks = len(vectors)

    def merge(stack: Stack) -> Tensor:
        parts = [leading(matrix, min(stack.shape) // tasks) for matrix in stack]
        left, values, right = zip(*parts, strict=True)
        return joined(left, torch.cat(values), right)

    return Matrices(list(vectors.values()), merge, smallest=tasks, mean="text_projection")
