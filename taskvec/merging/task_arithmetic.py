"""Task arithmetic: a weighted sum of task vectors (Ilharco et al., arXiv:2212.04089, section 2)."""

from collections.abc import Mapping

from taskvec.vectors import TaskVector


def task_arithmetic(vectors: Mapping[str, TaskVector], weights: Mapping[str, float]) -> TaskVector:
    """Return ``sum_t weights[t] * vectors[t]``, summed in the order of the names.

    The order is fixed because float32 addition is not associative: another order would give other
    bytes for the same edit.

    Args:
        vectors: task name -> vector; one origin, equal shapes.
        weights: task name -> weight, no unit; at least one, all named in ``vectors``.
    """
    first, *rest = sorted(weights)
    total = weights[first] * vectors[first]
    for name in rest:
        total = total + weights[name] * vectors[name]
    return total
