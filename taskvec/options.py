"""Kinds of option values: what an annotation such as ``density: Fraction`` admits.

The annotations of a method are read from its source, so a mistake is reported before anything is
imported, and checked again when it is called, for those who call it from Python.
"""

import inspect
import math
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from taskvec.errors import InvalidInput


class Bounds:
    """The numbers that an option admits: ``low <= x <= high``, an open end excluded."""

    def __init__(self, low: float, high: float = math.inf, *, open_ends: str = "") -> None:
        self.low, self.high, self.open_ends = low, high, open_ends

    def __contains__(self, value: float) -> bool:
        above = value > self.low if "low" in self.open_ends else value >= self.low
        below = value < self.high if "high" in self.open_ends else value <= self.high
        return above and below

    def __str__(self) -> str:
        low = f"above {self.low:g}" if "low" in self.open_ends else f"at least {self.low:g}"
        if self.high == math.inf:
            return low
        high = f"below {self.high:g}" if "high" in self.open_ends else f"at most {self.high:g}"
        return f"{low} and {high}"


Fraction = Annotated[float, Bounds(0, 1, open_ends="low")]
Share = Annotated[float, Bounds(0, 1, open_ends="high")]
Unit = Annotated[float, Bounds(0, 1)]
Positive = Annotated[float, Bounds(0, open_ends="low")]
Natural = Annotated[int, Bounds(0)]
Count = Annotated[int, Bounds(1)]
Index = Annotated[int, Bounds(-1)]

NAMED: dict[str, Any] = {
    "str": str, "int": int, "float": float, "bool": bool, "list": list, "Fraction": Fraction,
    "Share": Share, "Unit": Unit, "Positive": Positive, "Natural": Natural, "Count": Count,
    "Index": Index,
}  # fmt: skip

Function = TypeVar("Function", bound=Callable[..., Any])


def problem(kind: Any, value: Any) -> str:
    """Return what is wrong with a value, or an empty text.

    Args:
        kind: str, int, float, bool, list, a Literal of texts or an Annotated number.
        value: any.
    """
    if get_origin(kind) is Literal:
        known = get_args(kind)
        words = ", ".join(map(repr, known))
        return "" if value in known else f"expected one of {words}, found {value!r}"
    plain, *bounds = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    allowed = (int, float) if plain is float else plain
    if not isinstance(value, allowed) or (isinstance(value, bool) and plain is not bool):
        return f"expected {plain.__name__}, found {value!r}"
    if plain is float and not math.isfinite(value):
        return f"expected a finite number, found {value!r}"
    if bounds and value not in bounds[0]:
        return f"expected a number {bounds[0]}, found {value!r}"
    return ""


def checked(function: Function) -> Function:
    """Let a function refuse options that its annotations do not admit, with InvalidInput."""
    names = inspect.getfullargspec(function).kwonlyargs

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        hints = get_type_hints(function, include_extras=True)
        for name in names:
            wrong = problem(hints[name], options[name]) if name in options else ""
            if wrong:
                raise InvalidInput(f"{function.__name__}: {name}: {wrong}")
        return function(*args, **options)

    return call  # type: ignore[return-value]
