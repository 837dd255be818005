"""Where task vectors pull in opposite directions: sign conflicts, and how large the vectors are."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pandas as pd

from taskvec.lazy import Array, Lazy, absolute, order_statistics, sums

LARGEST = 0.2  # share of a vector's elements that TIES keeps


def sign_conflicts(vectors: Mapping[str, Lazy], largest: float = LARGEST) -> pd.DataFrame:
    """Return, of every two vectors, the share of common large elements with opposite signs.

    Args:
        vectors: with equal names and shapes.
        largest: share of the elements, by magnitude over the whole vector, that count as large;
            an element is common if it is large in both vectors. A zero is never large.

    Returns:
        names as index and columns, fractions; 0.5 is chance, 0 where nothing is common.

    Source: interference of signs after Yadav et al., NeurIPS 2023, arXiv:2306.01708, section 3.
    """
    thresholds = [_threshold(vector, largest) for vector in vectors.values()]

    def count(parts: list[Array]) -> npt.NDArray[np.float64]:
        signs = np.stack(
            [
                np.sign(part) * (np.abs(part) >= threshold)
                for part, threshold in zip(parts, thresholds, strict=True)
            ]
        ).astype(np.float64)  # (T, n)
        common = np.abs(signs) @ np.abs(signs).T
        return np.stack([common, (common - signs @ signs.T) / 2])

    zero = np.zeros((2, len(vectors), len(vectors)))
    common, opposite = sum(sums(list(vectors.values()), count).values(), start=zero)
    share = np.divide(opposite, common, out=np.zeros_like(common), where=common > 0)
    return pd.DataFrame(share, index=list(vectors), columns=list(vectors))


def norms(vectors: Mapping[str, Lazy]) -> dict[str, float]:
    """Return the Euclidean norm of each vector."""
    squares = sums(
        list(vectors.values()),
        lambda parts: [np.square(part, dtype=np.float64).sum() for part in parts],
    )
    total = sum(squares.values(), start=np.zeros(len(vectors)))
    return dict(zip(vectors, map(float, np.sqrt(total)), strict=True))


def _threshold(vector: Lazy, largest: float) -> float:
    """Return the smallest magnitude that is large."""
    number = sum(map(vector.size, vector.shapes))
    return order_statistics(absolute(vector), [number - max(1, round(largest * number))])[0]
