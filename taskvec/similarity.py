"""How alike task vectors are: cosines of all pairs, of the whole vectors and layer by layer.

Computed in one pass over all vectors, tensor by tensor (arXiv:2212.04089, section 6, figure 5).
"""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from taskvec.layers import layer_of
from taskvec.lazy import Lazy, gram

OUTSIDE = "outside blocks"
Matrix = npt.NDArray[np.float64]


def cosines(vectors: Mapping[str, Lazy]) -> pd.DataFrame:
    """Return the cosine of every two vectors, names in the given order; 0 where one is zero."""
    products = gram(list(vectors.values()))
    names = list(vectors)
    whole = sum(products.values(), start=np.zeros((len(names), len(names))))
    return pd.DataFrame(_normalized(whole), index=names, columns=names)


def cosines_by_layer(vectors: Mapping[str, Lazy]) -> pd.DataFrame:
    """Return the cosine of every pair in every layer.

    Returns:
        index: "layer 0", "layer 1", ..., then what lies outside blocks; blocks of several stacks
        with one number count together. Columns: "a, b" for each pair, in the given order.
    """
    products = gram(list(vectors.values()))
    sums: dict[int, Matrix] = {}
    for name, matrix in products.items():
        found = layer_of(name)
        layer = -1 if found is None else found
        sums[layer] = sums.get(layer, np.zeros_like(matrix)) + matrix
    pairs = list(combinations(range(len(vectors)), 2))
    names = list(vectors)
    rows: dict[str, list[Any]] = {}
    for layer in sorted(sums, key=lambda layer: (layer < 0, layer)):
        matrix = _normalized(sums[layer])
        rows[OUTSIDE if layer < 0 else f"layer {layer}"] = [matrix[pair] for pair in pairs]
    columns = [f"{names[i]}, {names[j]}" for i, j in pairs]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def _normalized(products: Matrix) -> Matrix:
    norms = np.sqrt(np.diag(products))
    scale = np.outer(norms, norms)
    cosine = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    np.fill_diagonal(cosine, 1.0)
    return np.clip(cosine, -1.0, 1.0)
