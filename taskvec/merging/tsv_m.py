"""TSV-M: task singular vectors, decorrelated (Gargiulo et al., arXiv:2412.00081)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from taskvec.lazy import Lazy
from taskvec.spectral import Matrices, Stack, joined, leading


def tsv_m(vectors: Mapping[str, Lazy]) -> Lazy:
    """x"""
    tasks = len(vectors)

    def merge(stack: Stack) -> Tensor:
        parts = [leading(matrix, min(stack.shape) // tasks) for matrix in stack]
        left, values, right = zip(*parts, strict=True)
        return joined(left, torch.cat(values), right)

    return Matrices(list(vectors.values()), merge, smallest=tasks, mean="text_projection")
