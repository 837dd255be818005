"""What the strategies for a single coefficient share."""

from taskvec.errors import InvalidInput
from taskvec.params import Range
from taskvec.search import Problem


def only(strategy: str, problem: Problem) -> tuple[str, Range]:
    """Return the name and the range of the only coefficient.

    Raises:
        InvalidInput: there are several.
    """
    if len(problem.ranges) != 1:
        raise InvalidInput(
            f"the strategy {strategy} searches one coefficient, the edit has "
            f"{', '.join(sorted(problem.ranges))}; use guided, tpe, cma_es or gradient"
        )
    ((name, allowed),) = problem.ranges.items()
    return name, allowed


def origin(allowed: Range) -> float:
    """Return the value of the smallest edit in a range."""
    return min(max(0.0, allowed.low), allowed.high)


def sides(allowed: Range) -> list[tuple[float, float]]:
    """Return the parts of a range on both sides of the smallest edit, each from there outwards."""
    near = origin(allowed)
    return [(near, far) for far in (allowed.low, allowed.high) if far != near]
