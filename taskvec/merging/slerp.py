"""SLERP: interpolation along an arc (Shoemake, Animating rotation with quaternion curves, 1985)."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from taskvec.errors import InvalidInput
from taskvec.lazy import Array, Blockwise, Lazy, gram
from taskvec.options import Unit, checked

OPERANDS = 2
ORDERED = True  # slerp(a, b) is not slerp(b, a), unless t is 0.5
PARALLEL = 0.9995


@checked
def slerp(vectors: Mapping[str, Lazy], *, t: Unit = 0.5) -> Lazy:
    """Return ``(sin((1 - t) * w) * a + sin(t * w) * b) / sin(w)``, w the angle between a and b.

    The angle is that of the tensors, flattened; their lengths are left as they are. Where
    ``|cos w| > 0.9995`` the result is ``(1 - t) * a + t * b``; a tensor of zeros is at a right
    angle to every other, as in mergekit.

    Args:
        vectors: two vectors, a and b.
        t: the fraction of the way from a to b, 0 to 1.
    """
    if len(vectors) != 2:
        raise InvalidInput(f"slerp takes two operands, found {len(vectors)} ({', '.join(vectors)})")
    operands = list(vectors.values())
    factors = {name: _factors(product, t) for name, product in gram(operands).items()}

    def interpolate(name: str, start: int, parts: list[Array]) -> Array:
        del start
        of_a, of_b = factors[name]
        result = parts[0] * of_a
        result += parts[1] * of_b
        return result

    return Blockwise(operands, interpolate)


def _factors(gram: npt.NDArray[np.float64], t: float) -> tuple[np.float32, np.float32]:
    """Return the factors of a and b from their inner products (2, 2)."""
    lengths = np.sqrt(gram[0, 0]) * np.sqrt(gram[1, 1])
    cosine = float(np.clip(gram[0, 1] / lengths, -1, 1)) if lengths else 0.0
    if abs(cosine) > PARALLEL:
        return np.float32(1 - t), np.float32(t)
    angle = np.arccos(cosine)
    of_a, of_b = np.sin((1 - t) * angle), np.sin(t * angle)
    return np.float32(of_a / np.sin(angle)), np.float32(of_b / np.sin(angle))
