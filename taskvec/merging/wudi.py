"""WUDI: the vector that interferes least with each task (Cheng et al., arXiv:2503.08099)."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from taskvec.errors import InvalidInput
from taskvec.lazy import Lazy
from taskvec.spectral import SMALL, Matrices, Stack, gram, product, times

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def wudi(vectors: Mapping[str, Lazy], *, steps: int = 300, learning_rate: float = 1e-5) -> Lazy:
    """Return the merged matrix that Adam finds, and the mean of the vectors for other tensors.

    It minimises ``sum_t ||(tau - delta_t) delta_t^T||^2 / ||delta_t||^2`` (Frobenius norms) for
    every matrix (m, n), starting at ``tau = sum_t delta_t``. Vectors that are 0 have no term.

    Args:
        vectors: label -> vector.
        steps: of Adam; the authors take 300.
        learning_rate: of Adam, with torch's other defaults; the most that an element moves in a
            step, in units of the weights, so it does not follow the scale of the vectors.

    What differs from the authors' code: the gradient is ``2 (rho C + B)`` in ``rho = tau - sum_t
    delta_t``, with C and B computed once, not by automatic differentiation. So one vector alone
    comes out as it is.
    """
    if steps < 0:
        raise InvalidInput(f"steps {steps}: expected 0 or more")
    if not 0 < learning_rate < math.inf:
        raise InvalidInput(f"learning_rate {learning_rate}: expected a finite number above 0")

    def merge(stack: Stack) -> Tensor:
        dtype = torch.float64 if min(stack.shape) <= SMALL else torch.float32
        start = stack.total()
        way = _adam(_gradient(stack, start, dtype), start.shape, dtype, steps, learning_rate)
        return (start + way).float()

    return Matrices(list(vectors.values()), merge)


def _gradient(stack: Stack, start: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return the gradient as a function of rho, the way from the start.

    With ``N_t = delta_t / ||delta_t||`` it is ``2 sum_t (rho + start - delta_t) N_t^T N_t``. The
    sum of the ``N_t^T N_t`` is computed, unless it is cheaper to multiply by all N_t and back.
    """
    rows, columns = stack.shape
    wide = columns > 2 * len(stack) * rows
    slope = torch.zeros(rows, columns, dtype=dtype)
    square = torch.zeros(0 if wide else columns, columns, dtype=dtype)
    units = []
    for matrix in stack:
        others = (start - matrix).to(dtype)
        unit = matrix.to(dtype) / (float(torch.linalg.vector_norm(matrix, dtype=start.dtype)) or 1)
        if wide:
            units.append(unit)
            slope += product(product(others, unit), unit.T)
        else:
            own = gram(unit.T)
            square += own
            slope += product(others, own)
    if not wide:
        turned = times(square)
        return lambda rho: (turned(rho) + slope) * 2
    down = torch.cat(units)
    inward, outward = times(down), times(down.T.contiguous())
    return lambda rho: (outward(inward(rho)) + slope) * 2


def _adam(
    gradient: Callable[[Tensor], Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
    steps: int,
    learning_rate: float,
) -> Tensor:
    """Return where some steps of Adam lead from 0 (Kingma and Ba, arXiv:1412.6980, algorithm 1)."""
    result = torch.zeros(*shape, dtype=dtype)
    first, second = BETAS
    mean = torch.zeros_like(result)
    square = torch.zeros_like(result)
    for step in range(1, steps + 1):
        slope = gradient(result)
        mean.lerp_(slope, 1 - first)
        square.mul_(second).addcmul_(slope, slope, value=1 - second)
        root = square.sqrt().div_((1 - second**step) ** 0.5).add_(EPSILON)
        result.addcdiv_(mean, root, value=-learning_rate / (1 - first**step))
    return result
