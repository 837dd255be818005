"""A random vector: the norms of its tensors are given, its direction follows from the seed."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskvec import lazy
from taskvec.edits import edit_vector
from taskvec.errors import InvalidInput
from taskvec.lazy import Array, Held, Lazy
from taskvec.merging.random_like import random_like
from taskvec.vectors import TaskVector
from tests.test_lazy import array, equal_bytes, values

law = settings(deadline=None, max_examples=30)
SHAPES = st.sampled_from([(), (1,), (2,), (7,), (3, 5), (5, 1), (2, 3, 2, 2), (300,)])
LONG = (40_000,)


def random(model: dict[str, Array] | Lazy, label: str = "a", seed: int = 0) -> dict[str, Array]:
    vector = model if isinstance(model, Lazy) else Held(model)
    return values(random_like({label: vector}, seed=seed))


def norm(part: Array) -> float:
    return float(np.sqrt(np.square(part, dtype=np.float64).sum()))


def ones(shape: tuple[int, ...] = LONG) -> dict[str, Array]:
    return {"w": np.ones(shape, np.float32)}


@law
@given(SHAPES, st.integers(0, 999), st.sampled_from([1e-20, 1e-3, 1.0, 1e6]), st.integers(-9, 9))
def test_every_tensor_has_the_norm_of_the_operand_s(
    shape: tuple[int, ...], drawn: int, scale: float, seed: int
) -> None:
    part = array(np.random.default_rng(drawn).normal(size=shape) * scale)
    found = random({"w": part, "zero": 0 * part}, seed=seed)
    assert norm(found["w"]) == pytest.approx(norm(part), rel=1e-6)
    assert found["w"].shape == shape
    assert not found["zero"].any()


@law
@given(st.integers(0, 300), st.integers(0, 300))
def test_any_range_holds_the_elements_of_the_whole(one: int, other: int) -> None:
    start, stop = sorted([one, other])
    vector = random_like({"a": Held(ones((300,)))}, seed=3)
    assert np.array_equal(vector.block("w", start, stop), values(vector)["w"][start:stop])


def test_the_direction_follows_from_seed_label_and_name_alone() -> None:
    first = random(ones())["w"]
    other = {"w": array(np.linspace(-1, 2, LONG[0])), "v": array([1.0, 2.0])}
    assert random(other)["w"] / norm(other["w"]) == pytest.approx(first / norm(first), rel=1e-5)
    assert random({"w": -other["w"]})["w"].tobytes() == random(other)["w"].tobytes()
    renamed = values(random_like({"a": Held({"v": ones()["w"]})}))["v"]
    for found in (random(ones(), seed=1)["w"], random(ones(), label="b")["w"], renamed):
        cosine = float(np.dot(found, first)) / norm(first) / norm(found)
        assert abs(cosine) < 5 / math.sqrt(LONG[0])


def test_tensors_are_drawn_each_by_itself() -> None:
    both = random({"w": np.ones(9, np.float32), "v": np.ones((2, 3), np.float32)})
    assert equal_bytes({"w": both["w"]}, random({"w": np.ones(9, np.float32)}))


def test_elements_are_gaussian_and_neighbours_are_independent() -> None:
    found = np.sort(random(ones())["w"])  # norm sqrt(n): standard deviation 1
    places = (np.arange(len(found)) + 0.5) / len(found)
    cumulative = np.array([NormalDist().cdf(float(x)) for x in found[::50]])
    assert np.abs(cumulative - places[::50]).max() < 1.63 / math.sqrt(len(found))  # Kolmogorov, 1 %
    drawn = random(ones())["w"].astype(np.float64)
    for pairs in (drawn.reshape(-1, 2), drawn[1:-1].reshape(-1, 2)):
        for power in (1, 2):
            assert abs(np.corrcoef(pairs.T**power)[0, 1]) < 4 / math.sqrt(len(pairs))


def test_workers_and_blocks_change_no_byte_of_a_tensor_of_several_units() -> None:
    model = ones((lazy.UNIT + 4321,))
    found = []
    for workers, block in ((1, lazy.BLOCK), (3, 999)):
        with lazy.workers(workers):
            found.append(values(random_like({"a": Held(model)}), block=block))
    assert equal_bytes(*found)


def test_a_random_vector_does_not_change_from_one_release_to_the_next() -> None:
    found = random({"w": array([3, 0, 4]), "v": array([[2.0]])}, label="mnist", seed=5)
    assert found["w"] == pytest.approx([-4.3979225, -0.5557832, 2.3128726], rel=1e-6)
    assert found["v"].tolist() == [[-2.0]]


def test_it_stands_in_expressions_and_remembers_what_it_is_made_of() -> None:
    model = {"w": array([3, 0, 4])}
    vectors = {"mnist": TaskVector.held(model, "origin")}
    found = edit_vector("-c * random_like(mnist, seed=5)", vectors, c=2.0).lazy()
    expected = random(model, label="mnist", seed=5)
    assert np.array_equal(values(found)["w"], -2 * expected["w"])
    leaf = Held(model)
    assert random_like({"a": leaf}).leaves == (leaf,)


def test_two_operands_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"random_like takes one operand, found 2 \(a, b\)"):
        random_like({"a": Held(ones()), "b": Held(ones())})
