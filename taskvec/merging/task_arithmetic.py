"""Task arithmetic: the sum of task vectors (Ilharco et al., arXiv:2212.04089, section 2)."""

from collections.abc import Mapping

from taskvec.lazy import Lazy, total


def task_arithmetic(vectors: Mapping[str, Lazy]) -> Lazy:
    """Return ``sum_t delta_t``, added in the order given."""
    return total(vectors.values())
