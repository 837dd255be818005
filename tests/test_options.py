"""Kinds of options: what an annotation admits, before and when a method is called."""

import math
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvec import options
from taskvec.errors import InvalidInput
from taskvec.options import Bounds, checked, problem

Choice = Literal["mean", "sum"]
NUMBERS = st.floats() | st.integers(-10, 10)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (options.Fraction, [1e-9, 0.2, 1, 1.0], [0, 0.0, -0.1, 1.0001, 2]),
        (options.Share, [0, 0.0, 0.5, 0.999], [1, 1.0, -0.1]),
        (options.Unit, [0, 1, 0.0, 1.0, 0.5], [-1e-9, 1.0001, 2]),
        (options.Positive, [1e-300, 1, 1e300], [0, 0.0, -1]),
        (options.Natural, [0, 1, 10**9], [-1, 0.0, 1.0]),
        (options.Count, [1, 2], [0, -1, 1.0]),
        (options.Index, [-1, 0, 5], [-2, -1.0]),
        (float, [0, -1, 1.5, np.float64(0.5)], ["1", None, [1.0], 1j]),
        (int, [0, -1], [0.0, "1", None]),
        (str, ["", "x"], [1, None, ["x"]]),
        (bool, [True, False], [0, 1, 0.0, "true", None]),
        (list, [[], [1]], [(), "x", {}]),
        (Choice, ["mean", "sum"], ["avg", "", None, 1, ["mean"], "MEAN"]),
    ],
)
def test_a_kind_admits_these_values_and_no_others(
    kind: Any, good: list[Any], bad: list[Any]
) -> None:
    assert [problem(kind, value) for value in good] == [""] * len(good)
    for value in bad:
        assert f"found {value!r}" in problem(kind, value)


@pytest.mark.parametrize("kind", [float, int, options.Unit, options.Natural, str, list, Choice])
def test_true_and_false_are_no_numbers_and_no_texts(kind: Any) -> None:
    assert "found True" in problem(kind, True)
    assert "found False" in problem(kind, False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "kind",
    [float, options.Fraction, options.Share, options.Unit, options.Positive],
    ids=["float", "Fraction", "Share", "Unit", "Positive"],
)
def test_numbers_are_finite(kind: Any, value: float) -> None:
    assert f"found {value}" in problem(kind, value)


@given(
    st.floats(allow_nan=False), st.floats(allow_nan=False), NUMBERS, st.booleans(), st.booleans()
)
def test_bounds_are_those_that_they_say(
    low: float, high: float, value: float, open_low: bool, open_high: bool
) -> None:
    ends = "low" * open_low + " high" * open_high
    bounds = Bounds(low, high, open_ends=ends)
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    assert (value in bounds) == (above and below)


def test_bounds_say_what_they_admit() -> None:
    assert str(Bounds(0, 1, open_ends="low")) == "above 0 and at most 1"
    assert str(Bounds(0, 1, open_ends="high")) == "at least 0 and below 1"
    assert str(Bounds(-1, 0.5)) == "at least -1 and at most 0.5"
    assert str(Bounds(0, open_ends="low")) == "above 0"
    assert str(Bounds(1)) == "at least 1"
    assert problem(options.Fraction, 2) == "expected a number above 0 and at most 1, found 2"
    assert problem(options.Count, 1.5) == "expected int, found 1.5"
    assert problem(Choice, "avg") == "expected one of 'mean', 'sum', found 'avg'"


def test_every_kind_has_its_own_name() -> None:
    for name, kind in options.NAMED.items():
        assert getattr(options, name, kind) is kind


@checked
def method(
    vectors: list[int], *, density: options.Fraction = 0.2, how: Choice = "mean", seed: int = 0
) -> Any:
    """Say something."""
    return vectors, density, how, seed


def test_a_checked_function_is_called_with_what_its_annotations_admit() -> None:
    assert method([1]) == ([1], 0.2, "mean", 0)
    assert method([1], density=1, how="sum", seed=-3) == ([1], 1, "sum", -3)
    assert (method.__name__, method.__doc__) == ("method", "Say something.")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"density": 0}, "method: density: expected a number above 0 and at most 1, found 0"),
        ({"how": "avg"}, "method: how: expected one of 'mean', 'sum', found 'avg'"),
        ({"seed": 1.0}, "method: seed: expected int, found 1.0"),
        ({"density": 0.1, "seed": None}, "method: seed: expected int, found None"),
    ],
)
def test_a_checked_function_refuses_the_rest(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        method([1], **wrong)
    assert str(caught.value) == message
    assert caught.value.exit_code == 3


def test_unknown_options_are_errors_of_the_caller() -> None:
    with pytest.raises(TypeError, match="densty"):
        method([1], densty=1)
