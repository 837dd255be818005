"""Singular vectors and polar factors of matrices, by way of their Gram matrices.

The eigenvectors of ``A^T A`` are the right singular vectors of ``A``, at a fraction of the price of
a singular value decomposition, but with the square of its condition number. So the price depends
on the matrix: its Gram matrix is taken in float32; where that is not accurate enough, in float64,
for a few directions or for all; and where even that is not, the matrix is decomposed directly.
What decides is the spectrum that was found, so the choice is the same in every run.

Letters: a matrix is (m, n); r = min(m, n); k of its singular values are wanted. Those below `ZERO`
times the largest are rounding of the float32 input and count as zero. Nothing determines their
vectors, which therefore contribute nothing.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from taskvec.lazy import Array, Lazy, added, blocks, check_shapes

ACCURATE = 1e-5  # the largest relative error that a result may be expected to have
EPSILON = torch.finfo(torch.float32).eps
ZERO = 1e-7  # of the largest singular value
SMALL = 128  # rows or columns up to which float64 costs nothing that matters
PARTS = 4  # of a Gram matrix, in each direction

_lock = threading.Lock()
_thread = threading.local()
_inside = 0
_before = 0


@contextmanager
def single_threaded() -> Iterator[None]:
    """Let torch compute in the calling thread alone; several threads may be inside.

    Tensors are computed side by side already, and a sum that torch splits among threads has other
    bytes than one that it does not split.
    """
    global _inside, _before
    if getattr(_thread, "inside", False):
        yield
        return
    with _lock:
        # torch keeps a number for each thread, and one that a thread takes over when it first asks
        # for its own. So each has to ask before it sets, and what the first one finds while nobody
        # is inside is what all get back.
        found = torch.get_num_threads()
        if not _inside:
            _before = found
        _inside += 1
        torch.set_num_threads(1)
    _thread.inside = True
    try:
        yield
    finally:
        _thread.inside = False
        with _lock:
            _inside -= 1
            torch.set_num_threads(_before)


class Stack:
    """The matrices of several vectors under one name, read when they are asked for."""

    def __init__(self, vectors: Sequence[Lazy], name: str) -> None:
        self.shape = vectors[0].shapes[name]
        self._vectors = vectors
        self._name = name

    def __len__(self) -> int:
        return len(self._vectors)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the matrix of each vector, in float32."""
        for vector in self._vectors:
            yield self._sum([vector], torch.float32)

    def total(self) -> Tensor:
        """Return the sum in float64, because a polar factor magnifies what float32 rounds off."""
        return self._sum(self._vectors, torch.float64)

    def _sum(self, vectors: Sequence[Lazy], dtype: torch.dtype) -> Tensor:
        # Memory of torch's own is aligned, and the bytes of a product can depend on that.
        result = torch.empty(self.shape, dtype=dtype)
        flat = result.view(-1).numpy()
        for start, (first, *others) in blocks(vectors, self._name, 0, len(flat)):
            part = flat[start : start + len(first)]
            part[...] = first
            for other in others:
                np.add(part, other, out=part)
        return result


class Matrices(Lazy):
    """A function of the matrices of several vectors; other tensors are the mean of the vectors.

    Args:
        vectors: with equal names and shapes.
        function: takes a stack of T matrices (m, n) and returns one, float32.
        smallest: matrices with fewer rows or columns than this are the mean too.
        mean: and so are those with this in their name.
    """

    def __init__(
        self,
        vectors: Sequence[Lazy],
        function: Callable[[Stack], Tensor],
        *,
        smallest: int = 1,
        mean: str | None = None,
    ) -> None:
        check_shapes(vectors)
        super().__init__(vectors[0].shapes, vectors)
        self._function = function
        self._smallest = smallest
        self._mean = mean

    def grain(self, name: str) -> int:
        """Return the size of a matrix; of another tensor, what the vectors need."""
        own = math.prod(self.shapes[name]) if self._taken(name) else 1
        return max(own, super().grain(name))

    def block(self, name: str, start: int, stop: int) -> Array:
        """Compute a whole matrix, or a block of the mean."""
        if self._taken(name):
            with single_threaded():
                result = self._function(Stack(self.operands, name))
                return result.contiguous().numpy().reshape(-1)
        total = added([operand.block(name, start, stop) for operand in self.operands])
        return np.divide(total, np.float32(len(self.operands)), out=total)

    def _taken(self, name: str) -> bool:
        shape = self.shapes[name]
        if len(shape) != 2 or (self._mean is not None and self._mean in name):
            return False
        return min(shape) >= self._smallest


def leading(matrix: Tensor, number: int, zero: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, k), s (k,) and V (n, k) of the ``number`` largest singular values, descending.

    In float32. The columns of singular values that count as zero are zero.

    Args:
        matrix: float32 or float64.
        number: k, from 1 to r.
        zero: singular values up to this count as zero, too.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = leading(matrix.T.contiguous(), number, zero)
        return left, values, right
    scale = _scale(matrix)
    if not scale:
        rows, columns = matrix.shape
        return torch.zeros(rows, number), torch.zeros(number), torch.zeros(columns, number)
    for dtype in _precisions(matrix):
        tall = _scaled(matrix, scale, dtype)
        squares, vectors = _eigen(gram(tall.T))
        if _accurate(squares, number):
            right = vectors[:, -number:].flip(1)
            left = product(tall, right.T)
            values = torch.linalg.vector_norm(left, dim=0)
            left = left / values.clamp(min=torch.finfo(dtype).tiny)
            break
    else:
        left, values, right = torch.linalg.svd(tall, full_matrices=False)
        left, values, right = left[:, :number], values[:number], right[:number].T
    kept = values > max(ZERO * float(values[0]), zero * scale)
    return (left * kept).float(), (values * kept).float() / scale, (right * kept).float()


def polar(matrix: Tensor, zero: float = 0.0) -> tuple[Tensor, float]:
    """Return the polar factor (m, n), in float32, and the mean of all r singular values.

    The factor is ``U V^T`` of ``A = U S V^T`` over the singular values that do not count as zero:
    of full rank, the nearest matrix with equal singular values 1; of a lower rank, a matrix with
    that many of them, the others zero.

    Args:
        matrix: float32 or float64.
        zero: singular values up to this count as zero, too.
    """
    if matrix.shape[0] < matrix.shape[1]:
        factor, mean = polar(matrix.T.contiguous(), zero)
        return factor.T, mean
    scale = _scale(matrix)
    if not scale:
        return torch.zeros(matrix.shape), 0.0
    for dtype in _precisions(matrix):
        tall = _scaled(matrix, scale, dtype)
        squares, vectors = _eigen(gram(tall.T))
        few = _doubtful(squares)
        if few > (SMALL if dtype == torch.float32 else 0):
            continue
        limit = max(ZERO * float(squares[-1]) ** 0.5, zero * scale)
        squares, rest, vectors = squares[few:], vectors[:, :few], vectors[:, few:]
        values = squares.clamp(min=0).sqrt()
        values = values * (values > limit)
        inverse = 1 / torch.where(values > 0, values, torch.inf)
        # What rounding A to float32 does to the vectors, as root mean square.
        if EPSILON * float((values[-1] * inverse).square().mean().sqrt()) <= ACCURATE:
            # A (A^T A)^(-1/2), the root being the product of a matrix and its transpose.
            factor = product(tall.float(), gram(vectors * inverse.sqrt()).float())
        else:
            factor = product((product(tall, vectors.T) * inverse).float(), vectors.float())
        total = float(values.sum())
        if few:
            exact = _scaled(matrix, scale, torch.float64)
            part, mean = _beside(exact, rest.double(), vectors, squares, limit)
            factor, total = factor + part, total + few * mean
        break
    else:
        left, values, right = torch.linalg.svd(tall, full_matrices=False)
        values = values * (values > max(ZERO * float(values[0]), zero * scale))
        factor, total = (left * (values > 0)) @ right, float(values.sum())
    return factor.float(), total / min(matrix.shape) / scale


def _beside(
    tall: Tensor, rest: Tensor, vectors: Tensor, squares: Tensor, zero: float
) -> tuple[Tensor, float]:
    """Return the polar factor of A on a few directions, and the mean of its singular values there.

    Args:
        tall: A (m, n), float64.
        rest: the directions (n, few), float64.
        vectors: the eigenvectors of ``A^T A`` for all the others (n, n - few), float32.
        squares: their eigenvalues.
        zero: singular values up to this count as zero.
    """
    # What A makes of the few directions must be orthogonal to what it makes of the others.
    image = product(product(tall, rest.T).T, tall.T).float()
    rest = rest - (vectors @ (product(vectors.T, image) / squares[:, None])).double()
    factor, mean = polar(product(tall, rest.T), zero)
    return product(factor, rest.float()), mean


def joined(left: Sequence[Tensor], values: Tensor, right: Sequence[Tensor]) -> Tensor:
    """Return ``polar(U) diag(s) polar(V)^T`` (m, n), with the columns of several decompositions.

    Args:
        left: the parts of U, each (m, k_t).
        values: s (sum of k_t,), or one value for all.
        right: the parts of V, each (n, k_t).
    """
    first, second = torch.cat(list(left), dim=1), torch.cat(list(right), dim=1)
    kept = first.any(dim=0)
    if not kept.any():
        return torch.zeros(len(first), len(second))
    values = values.expand(len(kept))[kept]
    return product(polar(first[:, kept])[0] * values, polar(second[:, kept])[0])


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``A B^T`` (m, p) of A (m, n) and B (p, n), computed in their dtype."""
    return times(right)(left)


def times(right: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function ``A -> A B^T``, for a B that many matrices are multiplied by."""
    if right.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # MKL leaves half the speed of an AMD processor unused, oneDNN does not.
        weight = right.contiguous().to_mkldnn()
        return lambda left: linear(left.contiguous().to_mkldnn(), weight).to_dense()
    return lambda left: left @ right.T


def gram(matrix: Tensor) -> Tensor:
    """Return ``A A^T`` (m, m), computing little more than the lower half."""
    matrix = matrix.contiguous()
    size = len(matrix)
    step = -(-size // PARTS)
    result = matrix.new_empty(size, size)
    for low in range(0, size, step):
        high = min(low + step, size)
        result[low:high, :high] = product(matrix[low:high], matrix[:high])
        result[:low, low:high] = result[low:high, :low].T
    return result


def _precisions(matrix: Tensor) -> tuple[torch.dtype, ...]:
    """Return the dtypes to try for the Gram matrix of a matrix."""
    return (torch.float64,) if min(matrix.shape) <= SMALL else (torch.float32, torch.float64)


def _scale(matrix: Tensor) -> float:
    """Return a power of two that brings the largest element near 1, or 0 if all elements are 0.

    So that no square of a small element is lost.
    """
    largest = max(abs(float(end)) for end in torch.aminmax(matrix))
    _, exponent = np.frexp(largest)
    return 2.0 ** -int(np.clip(exponent, -126, 126)) if largest else 0.0


def _scaled(matrix: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return ``scale * A`` in a dtype."""
    return torch.empty(matrix.shape, dtype=dtype).copy_(matrix).mul_(scale)


def _eigen(square: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, ascending, and eigenvectors (r, r); zeros where they are not found.

    MKL's float32 routine fails or returns NaN for some matrices of low rank.
    """
    try:
        values, vectors = torch.linalg.eigh(square)
    except torch.linalg.LinAlgError:
        values = vectors = torch.full_like(square, torch.nan)
    if bool(torch.isfinite(vectors).all()):
        return values, vectors
    return square.new_zeros(len(square)), torch.zeros_like(square)


def _doubtful(squares: Tensor) -> int:
    """Return how many of the smallest eigenvalues to set aside for the others to be accurate.

    Args:
        squares: eigenvalues of a Gram matrix, with the largest, ascending. Those that count as
            zero in float64 do no harm.
    """
    kind = torch.finfo(squares.dtype)
    if not squares[-1] > 0:
        return len(squares)
    ratios = squares[-1] / squares.double().clamp(min=kind.tiny)
    if squares.dtype == torch.float64:
        ratios = ratios * (squares > ZERO**2 * squares[-1])
    errors = kind.eps * (ratios.square().flip(0).cumsum(0) / len(squares)).sqrt()
    return int((errors > ACCURATE).sum())


def _accurate(squares: Tensor, number: int) -> bool:
    """Say whether the vectors of the largest eigenvalues of a Gram matrix are accurate.

    Args:
        squares: all r eigenvalues, ascending.
        number: how many of the largest are wanted.
    """
    if _doubtful(squares[-number:]):
        return False
    if number == len(squares) or squares.dtype == torch.float64:
        return True
    # The last vector wanted and the first one unwanted mix by about this angle. It is one of k.
    gap = max(float(squares[-number] - squares[-number - 1]), torch.finfo(squares.dtype).tiny)
    angle = EPSILON * float(squares[-1]) / gap / len(squares) ** 0.5
    return angle <= ACCURATE * number**0.5
