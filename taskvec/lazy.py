"""Vectors that are computed a block at a time, so that none of them is ever whole in memory.

A `Lazy` vector has names and shapes and can say what any range of its elements is; nothing is
computed before that. Files, differences of files, weighted sums and merging methods are such
vectors, so an expression of any depth is one fused pass: a block of every input is read, all the
arithmetic is done while it lies in the cache, and a block of the result comes out.

The result does not depend on the number of workers or on how a tensor is cut: an element follows
from the elements at its place (or in its row, or in its tensor: the *grain*), and sums over many
elements are taken over fixed units, each in float64, and added in the order of the names.
"""

import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from taskvec.errors import IncompatibleWeights, InvalidInput

Array = npt.NDArray[np.float32]
Shapes = Mapping[str, tuple[int, ...]]
Unit = tuple[str, int, int]  # a tensor's name, the first element and the one after the last
Function = Callable[[str, int, list[Array]], Array]

BLOCK = 1 << 16  # elements: 256 KiB, a handful of which fit into the cache of one core
UNIT = 1 << 20  # elements that a worker takes at a time
LARGEST = float(np.finfo(np.float32).max)
HELD = 1 << 23  # elements that a selection may hold at once: 32 MiB
SAMPLE = 256  # elements of each block that a selection looks at first
Item = TypeVar("Item")
Result = TypeVar("Result")
_workers = len(os.sched_getaffinity(0))


class Lazy(ABC):
    """Named float32 tensors whose elements are computed when they are asked for.

    Attributes:
        shapes: name -> shape, sorted by name.
        operands: the vectors it is computed from.
    """

    def __init__(self, shapes: Shapes, operands: Sequence["Lazy"] = ()) -> None:
        self.shapes: Shapes = MappingProxyType(
            {name: tuple(shapes[name]) for name in sorted(shapes)}
        )
        self.operands = tuple(operands)

    def grain(self, name: str) -> int:
        """Return what the bounds of a block must be multiples of (the end of the tensor apart)."""
        return max((operand.grain(name) for operand in self.operands), default=1)

    @abstractmethod
    def block(self, name: str, start: int, stop: int) -> Array:
        """Return the elements ``start`` to ``stop`` of the flattened tensor; read-only.

        The bounds are multiples of `grain`, or the end of the tensor.
        """

    def size(self, name: str) -> int:
        """Return the number of elements of a tensor."""
        return math.prod(self.shapes[name])

    @property
    def weight(self) -> float:
        """Return the factor of a scaled vector: 0.5 for ``0.5 * a`` and ``dare(0.5 * a)``.

        Methods that average with weights ask for it. A vector made of several has the weight 1.
        """
        return self.operands[0].weight if len(self.operands) == 1 else 1.0

    @property
    def leaves(self) -> tuple["Lazy", ...]:
        """The different vectors at the bottom, in the order of their first use."""
        found = [leaf for operand in self.operands for leaf in operand.leaves]
        return tuple(dict.fromkeys(found)) if self.operands else (self,)


class Held(Lazy):
    """A vector whose tensors are in memory."""

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        super().__init__({name: value.shape for name, value in tensors.items()})
        self._flat = {
            name: np.ascontiguousarray(value).reshape(-1) for name, value in tensors.items()
        }

    def block(self, name: str, start: int, stop: int) -> Array:
        """Return a view."""
        return self._flat[name][start:stop]


class Blockwise(Lazy):
    """A vector that a function computes from the same block of every operand.

    Args:
        operands: vectors with equal names and shapes.
        function: takes the name, the place of the block's first element and the operands' blocks,
            which it must not change; returns the new block.
        grain: "element"; "row", if an element follows from the whole row of the last axis; or
            "tensor". The function then gets whole rows or whole tensors, flattened.
    """

    def __init__(
        self, operands: Sequence[Lazy], function: Function, grain: str = "element"
    ) -> None:
        check_shapes(operands)
        super().__init__(operands[0].shapes, operands)
        self._function = function
        self._grain = grain

    def grain(self, name: str) -> int:
        """Return the larger of what the operands need and what the function needs."""
        own = {"element": 1, "row": row_length(self.shapes[name]), "tensor": self.size(name)}
        return max(own[self._grain], super().grain(name))

    def block(self, name: str, start: int, stop: int) -> Array:
        """Compute a block."""
        parts = [operand.block(name, start, stop) for operand in self.operands]
        return self._function(name, start, parts)


def combination(terms: Iterable[tuple[Lazy, float]]) -> Lazy:
    """Return ``sum_t weight_t * vector_t``, added in the order given.

    The order is the caller's to fix: addition of float32 is not associative, so another order
    gives other bytes. A product and a sum are rounded one after the other, never fused, so that
    every processor gives the same bytes.

    Raises:
        InvalidInput: a weight is not finite in float32.
    """
    pairs = list(terms)
    for _, weight in pairs:
        if not abs(weight) <= LARGEST:
            raise InvalidInput(f"the weight {weight:g} of a vector is no finite float32")
    return _Combination([vector for vector, _ in pairs], [weight for _, weight in pairs])


class _Combination(Lazy):
    """A weighted sum, which knows its weights."""

    def __init__(self, operands: Sequence[Lazy], weights: Sequence[float]) -> None:
        check_shapes(operands)
        super().__init__(operands[0].shapes, operands)
        self._weights = tuple(weights)
        self._factors = [np.float32(weight) for weight in weights]

    def block(self, name: str, start: int, stop: int) -> Array:
        """Add one operand after the other, each while it lies in the cache."""
        total = self.operands[0].block(name, start, stop) * self._factors[0]
        product = np.empty_like(total)
        for operand, factor in zip(self.operands[1:], self._factors[1:], strict=True):
            part = operand.block(name, start, stop)
            np.add(total, np.multiply(part, factor, out=product), out=total)
        return total

    @property
    def weight(self) -> float:
        """Return the product of the factors of a sum of one vector."""
        return self._weights[0] * super().weight if len(self._weights) == 1 else 1.0


def total(vectors: Iterable[Lazy]) -> Lazy:
    """Return the sum of vectors, added in the order given."""
    return combination((vector, 1.0) for vector in vectors)


def added(parts: Sequence[Array]) -> Array:
    """Return the sum of blocks, added in the order given, in a new array."""
    result = parts[0].copy()
    for part in parts[1:]:
        result += part
    return result


def scaled(vector: Lazy, factors: Mapping[str, float]) -> Lazy:
    """Return a vector with every tensor multiplied by its own factor."""
    return Blockwise([vector], lambda name, start, parts: parts[0] * np.float32(factors[name]))


def absolute(vector: Lazy) -> Lazy:
    """Return ``|vector|``."""
    return Blockwise([vector], lambda name, start, parts: np.abs(parts[0]))


def check_shapes(vectors: Sequence[Lazy]) -> None:
    """Raise IncompatibleWeights unless all vectors have the same names and shapes."""
    first = vectors[0]
    for other in vectors[1:]:
        if other.shapes == first.shapes:
            continue
        only = sorted(first.shapes.keys() ^ other.shapes.keys())
        if only:
            raise IncompatibleWeights(
                f"the vectors do not have the same parameters: {len(only)} only in some of them "
                f"(first: {only[0]!r}); use checkpoints of one architecture"
            )
        name = next(name for name in first.shapes if first.shapes[name] != other.shapes[name])
        raise IncompatibleWeights(
            f"{name!r} has the shape {first.shapes[name]} in one vector and {other.shapes[name]} "
            "in another; use checkpoints of one architecture"
        )


def only(method: str, vectors: Mapping[str, Lazy]) -> Lazy:
    """Return the operand of a method that takes one; raise InvalidInput if it got several."""
    if len(vectors) != 1:
        labels = ", ".join(vectors)
        raise InvalidInput(
            f"{method} takes one operand, found {len(vectors)} ({labels}); merge them first, "
            f"as in {method}(ties({labels}))"
        )
    return next(iter(vectors.values()))


def row_length(shape: Sequence[int]) -> int:
    """Return the number of elements of a row of the last axis, at least 1."""
    return max(1, shape[-1]) if shape else 1


def blocks(
    vectors: Sequence[Lazy], name: str, start: int, stop: int, block: int = BLOCK
) -> Iterator[tuple[int, list[Array]]]:
    """Yield (place, elements of each vector) of blocks that cover ``start`` to ``stop`` exactly.

    All vectors are cut in the same places. A block holds about ``block`` elements, more where the
    grain wants it.
    """
    size = vectors[0].size(name)
    grain = max(vector.grain(name) for vector in vectors)
    step = max(1, block // grain) * grain
    for low in range(start // grain * grain, stop, step):
        high = min(low + step, size)
        parts = [vector.block(name, low, high) for vector in vectors]
        first, last = max(start, low), min(stop, high)
        yield first, [part[first - low : last - low] for part in parts]


def units(vectors: Sequence[Lazy], name: str, length: int = UNIT) -> list[Unit]:
    """Return what workers take at a time: ranges of a tensor, or all of it if the grain is."""
    size = vectors[0].size(name)
    if size and max(vector.grain(name) for vector in vectors) >= size:
        return [(name, 0, size)]
    return [(name, start, min(start + length, size)) for start in range(0, size, length)]


def all_units(vectors: Sequence[Lazy]) -> list[Unit]:
    """Return the units of all tensors, in the order of the names."""
    return [unit for name in vectors[0].shapes for unit in units(vectors, name)]


def sums(
    vectors: Sequence[Lazy], function: Callable[[list[Array]], npt.ArrayLike]
) -> dict[str, npt.NDArray[np.float64]]:
    """Return a function of the vectors' blocks, added up over each tensor in float64.

    Args:
        vectors: with equal names and shapes.
        function: takes the vectors' blocks and returns a number or an array of fixed shape, in
            float64. Empty tensors count as zero.
    """
    check_shapes(vectors)
    nothing = [np.zeros(0, np.float32) for _ in vectors]
    zero = np.zeros_like(np.asarray(function(nothing), np.float64))

    def add(unit: Unit) -> npt.NDArray[np.float64]:
        result = zero.copy()
        for _, parts in blocks(vectors, *unit):
            result += np.asarray(function(parts), np.float64)
        return result

    work = all_units(vectors)
    totals = {name: zero.copy() for name in vectors[0].shapes}
    for (name, _, _), part in zip(work, parallel(add, work), strict=True):
        totals[name] += part
    return totals


def l1_norms(vectors: Sequence[Lazy]) -> dict[str, npt.NDArray[np.float64]]:
    """Return the sums of magnitudes of T vectors, tensor by tensor: name -> (T,), in float64."""
    return sums(vectors, lambda parts: [np.abs(part).sum(dtype=np.float64) for part in parts])


def gram(vectors: Sequence[Lazy]) -> dict[str, npt.NDArray[np.float64]]:
    """Return the inner products of T vectors, tensor by tensor: name -> (T, T), in float64."""
    number = len(vectors)

    def products(parts: list[Array]) -> npt.NDArray[np.float64]:
        result = np.zeros((number, number))
        for i in range(number):
            for j in range(i + 1):
                result[i, j] = np.multiply(parts[i], parts[j], dtype=np.float64).sum()
        return result

    lower = sums(vectors, products)
    return {name: part + np.tril(part, -1).T for name, part in lower.items()}


def order_statistics(vector: Lazy, positions: Sequence[int]) -> list[float]:
    """Return the elements that would stand at ``positions`` if all of them were sorted ascending.

    Exact, with bounded memory; nothing is sorted and nothing is copied whole. A sample says between
    which two values an element is; one pass counts what lies below and keeps what lies between.
    If the sample misleads, or too much lies between, two passes count elements by the upper half
    of their bits (in an order-preserving form), then by the lower half of those that share the
    upper half wanted.
    """
    work = all_units([vector])
    return [_selected(vector, work, position) for position in positions]


def tensor_order_statistics(
    vector: Lazy, positions: Callable[[int], Sequence[int]]
) -> dict[str, list[float]]:
    """Return the elements at ``positions(size)`` of each tensor, sorted by itself, ascending.

    Empty tensors have none. Each tensor is the work of one worker.
    """

    def select(name: str) -> list[float]:
        size = vector.size(name)
        wanted = list(positions(size)) if size else []
        if size > HELD and vector.grain(name) < size:
            return [_radix(vector, units([vector], name), place, workers=1) for place in wanted]
        if not wanted:
            return []
        values = np.concatenate([part for _, (part,) in blocks([vector], name, 0, size)])
        done = 0
        for place in sorted(set(wanted)):  # one at a time: numpy has a fast way for a single place
            values[done:].partition(place - done)
            done = place + 1
        return [float(values[place]) for place in wanted]

    names = list(vector.shapes)
    return dict(zip(names, parallel(select, names), strict=True))


def row_order_statistics(values: npt.NDArray[np.float32], position: int) -> Array:
    """Return the element at ``position`` of every row (R, C), sorted ascending: (R, 1)."""
    return np.partition(values, position, axis=1)[:, position : position + 1]


def _selected(vector: Lazy, work: Sequence[Unit], position: int) -> float:
    number = sum(stop - start for _, start, stop in work)
    if number > HELD and all(vector.grain(name) == 1 for name in vector.shapes):
        found = _between(vector, work, position, *_bracket(vector, work, position / number))
        if found is not None:
            return found
    return _radix(vector, work, position)


def _bracket(vector: Lazy, work: Sequence[Unit], share: float) -> tuple[np.float32, np.float32]:
    """Return two values between which the quantile ``share`` is likely to lie, by a sample."""

    def sample(unit: Unit) -> Array:
        name, start, stop = unit
        places = range(start, stop, BLOCK)
        parts = [vector.block(name, low, min(low + SAMPLE, stop)) for low in places]
        return np.concatenate(parts)

    values = np.sort(np.concatenate(list(parallel(sample, work))))
    number = sum(stop - start for _, start, stop in work)
    slip = min(max(0.01, 4 * len(values) ** -0.5), HELD / 4 / number)
    low, high = (int((share + side * slip) * len(values)) for side in (-1, 1))
    least = values[low] if low > 0 else np.float32(-np.inf)
    return least, values[high] if high < len(values) else np.float32(np.inf)


def _between(
    vector: Lazy, work: Sequence[Unit], position: int, low: np.float32, high: np.float32
) -> float | None:
    """Return the element at a position if it lies between two values, as at most HELD do."""
    kept: list[int] = []  # how many, unit by unit

    def look(unit: Unit) -> tuple[int, Array]:
        below, parts = 0, [np.zeros(0, np.float32)]
        for _, (values,) in blocks([vector], *unit):
            less = values < low
            below += int(np.count_nonzero(less))
            if sum(kept) <= HELD:
                parts.append(values[(values <= high) & ~less])
        kept.append(sum(map(len, parts)))
        return below, np.concatenate(parts)

    found = list(parallel(look, work))
    place = position - sum(count for count, _ in found)
    inside = np.concatenate([values for _, values in found])
    if sum(kept) > HELD or not 0 <= place < len(inside):
        return None
    inside.partition(place)
    return float(inside[place])


def _radix(vector: Lazy, work: Sequence[Unit], position: int, workers: int | None = None) -> float:
    upper, below = _place(_histogram(vector, work, None, workers), position)
    lower, _ = _place(_histogram(vector, work, upper, workers), position - below)
    key = np.uint32(upper << 16 | lower)
    bits = key ^ np.uint32(0x80000000) if key >> 31 else ~key
    return float(np.array(bits, np.uint32).view(np.float32))


def _histogram(
    vector: Lazy,
    work: Sequence[Unit],
    upper: int | None,
    workers: int | None,
) -> npt.NDArray[np.int64]:
    """Return how many elements have each upper half, or each lower half below a given upper one.

    Whole numbers, so the order in which the workers add them does not matter.
    """
    counts = np.zeros(1 << 16, np.int64)
    lock = threading.Lock()

    def add(unit: Unit) -> None:
        own = np.zeros(1 << 16, np.int64)
        for _, (values,) in blocks([vector], *unit):
            keys = _keys(values)
            if upper is None:
                own += np.bincount(keys >> 16, minlength=1 << 16)
            else:
                near = keys[keys >> 16 == upper]
                own += np.bincount(near & 0xFFFF, minlength=1 << 16)
        with lock:
            np.add(counts, own, out=counts)

    for _ in parallel(add, work, workers):
        pass
    return counts


def _place(counts: npt.NDArray[np.int64], position: int) -> tuple[int, int]:
    """Return the bin that holds a position, and how many elements lie below that bin."""
    upto = np.cumsum(counts)
    place = int(np.searchsorted(upto, position, side="right"))
    return place, int(upto[place] - counts[place])


def _keys(values: Array) -> npt.NDArray[np.uint32]:
    """Return whole numbers in the order of the floats: 0.0 and -0.0 are neighbours."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return bits ^ ((bits.view(np.int32) >> 31).view(np.uint32) | np.uint32(0x80000000))


@contextmanager
def workers(number: int) -> Iterator[None]:
    """Compute with so many threads inside; the result is the same for any number."""
    global _workers
    before, _workers = _workers, number
    try:
        yield
    finally:
        _workers = before


def set_workers(number: int) -> None:
    """Compute with so many threads from now on."""
    global _workers
    _workers = number


def parallel(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int | None = None
) -> Iterator[Result]:
    """Yield ``function(item)`` in the order of the items, computed by several threads."""
    threads = min(workers or _workers, len(items))
    if threads <= 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield from pool.map(function, items)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def materialize(vector: Lazy) -> dict[str, Array]:
    """Return all tensors of a vector, computed and in memory."""
    result = {name: np.empty(vector.size(name), np.float32) for name in vector.shapes}

    def fill(unit: Unit) -> None:
        name, start, stop = unit
        with np.errstate(over="ignore", invalid="ignore"):  # the caller looks at the result
            for place, (values,) in blocks([vector], name, start, stop):
                result[name][place : place + len(values)] = values

    for _ in parallel(fill, all_units([vector])):
        pass
    return {name: result[name].reshape(shape) for name, shape in vector.shapes.items()}
