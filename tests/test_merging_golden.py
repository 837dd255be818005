"""Every merging method against stored figures of a slow and plain implementation."""

import json
from typing import Any

import numpy as np
import pytest

from taskvec import plugins
from taskvec.lazy import Held
from tests import reference_merging
from tests.reference_merging import GOLDEN, SHAPES, operands
from tests.test_lazy import values

FIGURES = json.loads(GOLDEN.read_text())
CASES = FIGURES["cases"]
NAMES = [
    " ".join(
        [case["method"], *map(str, case["options"].values()), case["input"], *case["operands"]]
    )
    for case in CASES
]


def close(found: dict[str, Any], case: dict[str, Any], relative: float, absolute: float) -> None:
    assert found.keys() == SHAPES.keys()
    for name, expected in case["expected"].items():
        assert found[name].shape == SHAPES[name]
        np.testing.assert_allclose(
            found[name].ravel(), expected, relative, absolute, err_msg=f"{case['method']} {name}"
        )


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_method_gives_the_stored_figures(case: dict[str, Any]) -> None:
    inputs = operands(FIGURES["inputs"][case["input"]], case["operands"])
    vectors = {
        label: Held({name: part.astype(np.float32) for name, part in tensors.items()})
        for label, tensors in inputs.items()
    }
    method = getattr(plugins.load("merging", case["method"]), case["method"])
    close(values(method(vectors, **case["options"])), case, relative=2e-6, absolute=5e-6)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_the_reference_gives_the_stored_figures(case: dict[str, Any]) -> None:
    inputs = operands(FIGURES["inputs"][case["input"]], case["operands"])
    found = getattr(reference_merging, case["method"])(inputs, **case["options"])
    close(found, case, relative=1e-8, absolute=1e-9)


def test_the_stored_inputs_are_exact_in_float32_and_no_two_magnitudes_are_equal() -> None:
    for model, labels in FIGURES["inputs"].items():
        whole = [n for tensors in labels.values() for part in tensors.values() for n in part]
        assert all(isinstance(n, int) and float(np.float32(n)) == n for n in whole)
        assert (len(set(map(abs, whole))) == len(whole)) == (model == "distinct")


def test_every_stored_figure_names_the_source_of_its_formula() -> None:
    assert {case["method"] for case in CASES} == FIGURES["sources"].keys()
    assert FIGURES["sources"] == reference_merging.SOURCES
    assert FIGURES["shapes"] == {name: list(shape) for name, shape in SHAPES.items()}
