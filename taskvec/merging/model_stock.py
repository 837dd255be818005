"""Model Stock: the mean, shorter where the vectors disagree (Jang et al., arXiv:2403.19522)."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from taskvec.lazy import Lazy, gram, scaled, total

SINGULAR = 1e-6


def model_stock(vectors: Mapping[str, Lazy]) -> Lazy:
    """Return ``t * mean_i(delta_i)``, t by tensor, ``t = T * cos / (1 + (T - 1) * cos)``.

    cos is the mean cosine of all pairs of the T vectors in this tensor, 0 for a pair with a vector
    of zeros; a single vector has t = 1. As in mergekit, t is 0 where the denominator is below 1e-6,
    that is where the vectors cancel, and it is negative where they point away from one another.
    """
    number = len(vectors)
    products = gram(list(vectors.values()))
    factors = {name: _ratio(product) / number for name, product in products.items()}
    return scaled(total(vectors.values()), factors)


def _ratio(gram: npt.NDArray[np.float64]) -> float:
    """Return t from the inner products (T, T)."""
    number = len(gram)
    if number == 1:
        return 1.0
    norms = np.sqrt(np.diag(gram))
    lengths = np.outer(norms, norms)
    cosines = np.divide(gram, lengths, out=np.zeros_like(gram), where=lengths > 0).clip(-1, 1)
    mean = cosines[np.triu_indices(number, 1)].mean()
    denominator = 1 + (number - 1) * mean
    return float(number * mean / denominator) if denominator > SINGULAR else 0.0
