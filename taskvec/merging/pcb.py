"""PCB: parameter competition balancing (Du et al., arXiv:2410.02396)."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from taskvec import lazy
from taskvec.errors import InvalidInput
from taskvec.lazy import Array, Blockwise, Function, Lazy

CUT = {"flat": 1e-4, "vision": 0.01}  # the share of |delta| clipped at each end
NOTHING = np.float32(1e-12)  # the least divisor


def pcb(vectors: Mapping[str, Lazy], *, ratio: float = 0.1, variant: str = "flat") -> Lazy:
    """Return ``sum_t s_t sign(delta_t) a_t / max(sum_t s_t, 1e-12)``, over all tensors together.

    a_t is ``|delta_t|`` clipped to its quantiles, c and 1 - c, and n_t is a_t moved to [0, 1]. The
    score of an element is ``exp(T n_t^2) tanh(delta_t sum_i delta_i)`` in the variant "flat", with
    c = 0.0001, and ``exp(T n_t^2) sum_i tanh(sign(delta_t delta_i) n_t n_i)`` in the variant
    "vision", with c = 0.01. s_t is the score clipped from below, so that a share ``ratio`` of the
    elements keeps it, and moved to [0, 1].

    Args:
        vectors: label -> vector.
        ratio: share of the elements with a score of their own, above 0 and at most 1. The authors
            take 0.1 in the function (``pcb-merging.py``) and 0.05 in the runs on pictures.
        variant: "flat" is the authors' ``pcb-merging.py``, "vision" their ``pcb_ES.py``. Both then
            take 1.2 times the result, or search a factor for each a_t; here that is the caller's.

    What differs from the authors' code: nothing is sorted; and a range of one value (when the
    vectors have few elements, or only 0 and one magnitude) is not divided by 0 but moved to 1, or
    to 0 if it is not above 0.
    """
    if not 0 < ratio <= 1:
        raise InvalidInput(f"ratio {ratio}: expected a fraction above 0 and at most 1")
    if variant not in CUT:
        raise InvalidInput(f"variant {variant!r}: expected one of {', '.join(map(repr, CUT))}")
    deltas = list(vectors.values())
    lazy.check_shapes(deltas)
    size = sum(deltas[0].size(name) for name in deltas[0].shapes)
    if not size:
        return lazy.total(deltas)
    cut = CUT[variant]
    places = [int(size * cut), int(size * (1 - cut) - 1)]
    bounds = [lazy.order_statistics(lazy.absolute(delta), places) for delta in deltas]
    score = _flat if variant == "flat" else _vision
    spans = [_Span(low, high) for low, high in bounds]
    scores = [Blockwise(deltas, _score(score, spans, task)) for task in range(len(deltas))]
    place = min(int(size * (1 - ratio)), size - 1)
    floors = [lazy.order_statistics(vector, [place])[0] for vector in scores]
    kept = [_Span(floor, top) for floor, top in zip(floors, _largest(scores), strict=True)]

    def merge(name: str, start: int, parts: list[Array]) -> Array:
        del name, start
        total, weights = np.zeros_like(parts[0]), np.zeros_like(parts[0])
        for task, part in enumerate(parts):
            weight = kept[task].unit(score(parts, spans, task))
            np.add(weights, weight, out=weights)
            np.multiply(weight, np.sign(part), out=weight)
            np.multiply(weight, spans[task].clipped(np.abs(part)), out=weight)
            np.add(total, weight, out=total)
        return np.divide(total, np.maximum(weights, NOTHING, out=weights), out=total)

    return Blockwise(deltas, merge)


class _Span:
    """A closed range of values, which are clipped to it and moved to [0, 1].

    A range of one value above 0 is moved to 1, for the values that reach it.
    """

    def __init__(self, low: float, high: float) -> None:
        self._low, self._high = np.float32(low), np.float32(high)

    def clipped(self, values: Array) -> Array:
        return np.clip(values, self._low, self._high)

    def unit(self, values: Array) -> Array:
        width = self._high - self._low
        if not width:
            return np.float32(self._high > 0) * (values >= self._high)
        result = self.clipped(values)
        np.subtract(result, self._low, out=result)
        return np.divide(result, width, out=result)


Score = Callable[[list[Array], Sequence[_Span], int], Array]


def _flat(parts: list[Array], spans: Sequence[_Span], task: int) -> Array:
    total = lazy.added(parts)
    np.multiply(total, parts[task], out=total)
    return _weighed(np.tanh(total, out=total), parts, spans, task)


def _vision(parts: list[Array], spans: Sequence[_Span], task: int) -> Array:
    own = _signed(parts[task], spans[task])
    total = np.zeros_like(own)
    for part, span in zip(parts, spans, strict=True):
        other = _signed(part, span)
        np.multiply(other, own, out=other)
        np.add(total, np.tanh(other, out=other), out=total)
    return _weighed(total, parts, spans, task)


def _signed(part: Array, span: _Span) -> Array:
    result = span.unit(np.abs(part))
    return np.multiply(result, np.sign(part), out=result)


def _weighed(balance: Array, parts: list[Array], spans: Sequence[_Span], task: int) -> Array:
    """Return ``balance * exp(T (n^2 - 1))``: only ratios of scores matter, and e^T may be large."""
    weight = spans[task].unit(np.abs(parts[task]))
    np.multiply(weight, weight, out=weight)
    np.subtract(weight, np.float32(1), out=weight)
    np.multiply(weight, np.float32(len(parts)), out=weight)
    np.exp(weight, out=weight)
    return np.multiply(weight, balance, out=weight)


def _score(score: Score, spans: Sequence[_Span], task: int) -> Function:
    return lambda name, start, parts: score(parts, spans, task)


def _largest(vectors: Sequence[Lazy]) -> list[float]:
    """Return the largest element of each vector."""

    def largest(unit: lazy.Unit) -> Array:
        blocks = lazy.blocks(vectors, *unit)
        return np.max([[part.max() for part in parts] for _, parts in blocks], axis=0)

    found = list(lazy.parallel(largest, lazy.all_units(vectors)))
    return [float(value) for value in np.max(found, axis=0)]
