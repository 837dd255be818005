"""What the other tests of a module let pass, found by changing the code; see docs/mutation.md."""

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch

from taskvec.errors import IncompatibleWeights
from taskvec.layers import places
from taskvec.random_masks import bounds
from taskvec.vectors import TaskVector

# --------------------------------------------------------------------------------------------
# layers


@pytest.mark.parametrize("names", list(permutations(["h.0.w", "h.3.w", "h.1.w"])))
def test_the_depth_of_a_stack_does_not_depend_on_the_order_of_the_names(
    names: tuple[str, ...],
) -> None:
    assert {place.depth for place in places(names).values()} == {4}


def test_stacks_that_differ_in_one_component_are_two() -> None:
    names = ["image.layers.0.w", "text.layers.5.w", "text.blocks.8.w"]
    assert [places(names)[name].depth for name in names] == [1, 6, 9]


# --------------------------------------------------------------------------------------------
# random_masks


def test_bounds_of_single_precision_stay_within_32_bits() -> None:
    single = np.array([0.0, 0.25, 1.0], np.float32)
    assert bounds(single).tolist() == bounds(single.astype(np.float64)).tolist()


# --------------------------------------------------------------------------------------------
# vectors


def test_a_vector_of_arrays_has_the_origin_that_it_is_given() -> None:
    assert TaskVector.held({"w": np.zeros(2, np.float32)}, "0" * 64).origin == "0" * 64


def test_rounding_does_not_carry_a_cosine_past_one() -> None:
    one = TaskVector({"w": torch.ones(3)}, "0" * 64)  # 3**0.5 * 3**0.5 is less than 3
    assert one.cosine(one) == 1.0
    assert one.cosine(-one) == -1.0


FLOATS = {"w": torch.ones(2)}
COUNTS = {"w": torch.ones(2, dtype=torch.int64)}
VECTOR = TaskVector(FLOATS, "0" * 64)
SHORTER = TaskVector({"w": torch.ones(1)}, "0" * 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: VECTOR + SHORTER,
            r"the shape \(2,\) in the left vector and \(1,\) in the right vector;",
        ),
        (
            lambda: VECTOR.apply(SHORTER.tensors),  # type: ignore[arg-type]
            r"\(2,\) in the vector and \(1,\) in the pre-trained weights;",
        ),
        (lambda: VECTOR.apply(COUNTS), "tensors of the pre-trained weights are not floating"),
        (
            lambda: TaskVector.between(COUNTS, COUNTS, names=["w"]),
            "tensors of the checkpoint are not floating",
        ),
    ],
)
def test_a_message_names_the_side_that_is_wrong(call: Callable[[], object], message: str) -> None:
    with pytest.raises(IncompatibleWeights, match=message):
        call()
