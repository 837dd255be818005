"""TIES: trim, elect signs, merge what agrees (Yadav et al., arXiv:2306.01708, algorithm 1)."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from taskvec.lazy import Array, Blockwise, Function, Lazy, added, sums
from taskvec.merging.magnitude import thresholds, trim
from taskvec.options import Fraction, checked


@checked
def ties(
    vectors: Mapping[str, Lazy],
    *,
    density: Fraction = 0.2,
    variant: Literal["mean", "sum", "normalized"] = "mean",
    scope: Literal["flat", "tensor"] = "flat",
) -> Lazy:
    """Return the mean, in each place, of the trimmed deltas that have the elected sign.

    With ``d_t = trim(delta_t)`` the elected sign is ``s = sign(sum_t d_t)``, and the result is
    ``sum_{t: s * d_t > 0} d_t`` divided by the number of its terms. Where the sum is zero, s is the
    sign that most places have, over the whole model. It matters where opposite elements cancel.

    Args:
        vectors: label -> delta.
        density: the fraction of the elements to keep, above 0 and at most 1; see `magnitude`.
        variant: "mean" as in the paper; "sum" does not divide (the authors' ``dis-sum``);
            "normalized" divides by the sum of the weights of the vectors that agree, as mergekit
            does: 0.5 for the operand ``0.5 * a``, by magnitude if it is negative.
        scope: "flat" trims over all elements of a vector as the paper does, "tensor" over those of
            each tensor.

    The authors' code takes the negative sign where the sum is zero and as many places are
    positive as negative; here the result is zero there, so that ``ties(-a, -b) = -ties(a, b)``.
    """
    return Blockwise(list(vectors.values()), rule(vectors, density, variant, scope))


def rule(vectors: Mapping[str, Lazy], density: float, variant: str, scope: str) -> Function:
    """Return the function that merges blocks of these vectors; see `ties`."""
    operands = list(vectors.values())
    least = thresholds(operands, density, scope)
    one = np.min_scalar_type(len(operands)).type(1)  # counts in the smallest type that holds T
    shares = {
        "mean": [one for _ in operands],
        "sum": None,
        "normalized": [np.float32(abs(operand.weight)) for operand in operands],
    }[variant]

    def trimmed(name: str, parts: list[Array]) -> list[Array]:
        return [trim(part, low[name]) for part, low in zip(parts, least, strict=True)]

    def signs(name: str, start: int, parts: list[Array]) -> Array:
        del start
        return _sign(trimmed(name, parts))

    majority = np.float32(0)
    if len(operands) > 1:  # in a single vector nothing cancels
        balance = sums([Blockwise(operands, signs)], lambda parts: parts[0].sum(dtype=np.float64))
        majority = np.float32(np.sign(sum(balance.values())))

    def merge(name: str, start: int, parts: list[Array]) -> Array:
        del start
        own = trimmed(name, parts)
        sign = _sign(own)
        if majority:
            sign += majority * (sign == 0)
        return _agreeing(own, sign, shares)

    return merge


def _sign(trimmed: list[Array]) -> Array:
    """Return the sign of the sum, added in the order given: 1, 0 or -1."""
    total = added(trimmed)
    sign = (total > 0).view(np.int8)
    sign -= (total < 0).view(np.int8)  # two comparisons are four times as fast as np.sign
    return np.add(sign, np.float32(0), out=total)


def _agreeing(trimmed: list[Array], sign: Array, shares: Sequence[np.number] | None) -> Array:
    """Return the sum of the values of a sign over the sum of their shares; changes ``trimmed``."""
    total = np.zeros_like(sign)
    divisor = np.zeros(sign.shape, shares[0].dtype) if shares else None
    for place, values in enumerate(trimmed):
        values *= sign
        agree = values > 0
        values *= agree
        total += values
        if shares and divisor is not None:
            divisor += agree * shares[place]
    if divisor is not None:
        divisor += divisor == 0
        total /= divisor
    total *= sign
    return total
