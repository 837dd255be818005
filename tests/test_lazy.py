"""The engine of lazy vectors: blocks cover everything once, and statistics are exact."""

import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskvec import lazy
from taskvec.errors import IncompatibleWeights, InvalidInput
from taskvec.lazy import Array, Blockwise, Held, Lazy

law = settings(deadline=None, max_examples=60)
SHAPES = st.sampled_from(
    [(), (0,), (1,), (2,), (7,), (99,), (300,), (2, 3), (4, 0, 2), (0, 5), (5, 1), (2, 3, 2, 2)]
)
GRAINS = st.sampled_from(["element", "row", "tensor"])
F32 = np.float32
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 3.4e38, -3.4e38, 1.2e-38, -1e-45, 1e-45, -1e-40, 2.0**-126]


def values(vector: Lazy, block: int = lazy.BLOCK) -> dict[str, Array]:
    """Return all tensors of a vector, computed as the writer of a file does it."""
    found = {name: np.full(vector.size(name), np.nan, np.float32) for name in vector.shapes}

    def fill(unit: lazy.Unit) -> None:
        for place, (part,) in lazy.blocks([vector], *unit, block=block):
            assert part.dtype == np.float32
            found[unit[0]][place : place + part.size] = part

    for _ in lazy.parallel(fill, lazy.all_units([vector])):
        pass
    return {name: part.reshape(vector.shapes[name]) for name, part in found.items()}


def equal_bytes(left: Mapping[str, Array], right: Mapping[str, Array]) -> bool:
    """Return whether names, shapes and every bit are the same."""
    return left.keys() == right.keys() and all(
        part.shape == right[name].shape and part.tobytes() == right[name].tobytes()
        for name, part in left.items()
    )


def coarse(vector: Lazy, grain: str) -> Lazy:
    """Return the same vector, as if it could be computed by rows or whole tensors only."""
    return Blockwise([vector], lambda name, start, parts: parts[0].copy(), grain)


def array(numbers: npt.ArrayLike) -> Array:
    return np.array(numbers, np.float32)


def flat(tensors: Mapping[str, Array]) -> Array:
    """Return all elements, in the order of the names."""
    return np.concatenate([tensors[name].reshape(-1) for name in sorted(tensors)])


@st.composite
def arrays(draw: st.DrawFn, shape: tuple[int, ...]) -> Array:
    """Return float32 with zeros of both signs, ties and extreme magnitudes."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = math.prod(shape)
    drawn = random.normal(size=size) * 10.0 ** draw(st.integers(-30, 30))
    few = draw(st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=4))
    share = draw(st.sampled_from([0, 0.3, 1]))
    mixed = np.where(random.random(size) < share, random.choice(few, size), drawn)
    return mixed.astype(np.float32).reshape(shape)


@st.composite
def models(draw: st.DrawFn) -> dict[str, Array]:
    names = draw(st.lists(st.sampled_from(["w", "b", "x.y", "a"]), min_size=1, unique=True))
    return {name: draw(arrays(draw(SHAPES))) for name in names}


@st.composite
def groups(draw: st.DrawFn, most: int = 3) -> list[dict[str, Array]]:
    """Return models of equal shapes."""
    first = draw(models())
    others = draw(st.integers(0, most - 1))
    return [first] + [
        {name: draw(arrays(part.shape)) for name, part in first.items()} for _ in range(others)
    ]


def bounded(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Return a model whose sums do not overflow."""
    return {name: np.clip(part, F32(-1e30), F32(1e30)) for name, part in tensors.items()}


def wide(seed: int = 0) -> dict[str, Array]:
    """Return a model that no block and no unit holds, with many ties."""
    random = np.random.default_rng(seed)
    return {
        "w": array(random.normal(size=(1100, 1000)) * 50).round() / F32(8),
        "m": random.normal(size=(300, 250)).astype(np.float32),
        "b": random.normal(size=3).astype(np.float32),
    }


# --------------------------------------------------------------------------------------------
# Blocks and units


@law
@given(models(), st.data())
def test_blocks_cover_any_range_once_and_in_order(
    tensors: dict[str, Array], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(tensors)))
    size = tensors[name].size
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    block = data.draw(st.integers(1, 400))
    vectors = [coarse(Held(tensors), data.draw(GRAINS)), Held(tensors)]
    place = start
    for first, parts in lazy.blocks(vectors, name, start, stop, block):
        assert first == place and (parts[0].size > 0 or start == stop)
        expected = tensors[name].reshape(-1)[first : first + parts[0].size]
        assert [part.tobytes() for part in parts] == [expected.tobytes()] * 2
        place += parts[0].size
    assert place == stop


@law
@given(models(), GRAINS, st.integers(1, 400))
def test_a_function_gets_whole_rows_or_whole_tensors_if_it_asks_for_them(
    tensors: dict[str, Array], grain: str, block: int
) -> None:
    bounds: list[tuple[str, int, int]] = []

    def seen(name: str, start: int, parts: list[Array]) -> Array:
        bounds.append((name, start, start + parts[0].size))
        return parts[0]

    vectors = [Blockwise([Held(tensors)], seen, grain), Held(tensors)]
    for name, start, stop in lazy.all_units(vectors):
        assert list(lazy.blocks(vectors[::-1], name, start, stop, block))
    for name, start, stop in bounds:
        shape = tensors[name].shape
        size, row = tensors[name].size, shape[-1] if shape else 1
        unit = {"element": 1, "row": row, "tensor": size}[grain]
        assert start % unit == 0 and (stop % unit == 0 or stop == size)
        assert stop - start <= max(block, unit)
    assert sum(stop - start for _, start, stop in bounds) == flat(tensors).size


@law
@given(models(), GRAINS, st.integers(1, 50))
def test_units_cover_every_tensor_once_and_keep_whole_tensors_whole(
    tensors: dict[str, Array], grain: str, length: int
) -> None:
    vectors = [Held(tensors), coarse(Held(tensors), grain)]
    for name, part in tensors.items():
        units = lazy.units(vectors, name, length)
        assert {unit[0] for unit in units} <= {name}
        elements = [place for _, start, stop in units for place in range(start, stop)]
        assert elements == list(range(part.size))
        assert all(start < stop for _, start, stop in units)
        if grain == "tensor":
            assert len(units) == min(1, part.size)
        else:
            assert len(units) <= max(1, math.ceil(part.size / length))
    every = lazy.all_units(vectors)
    assert [unit[0] for unit in every] == sorted(unit[0] for unit in every)
    assert sum(stop - start for _, start, stop in every) == flat(tensors).size


def test_a_tensor_longer_than_a_unit_is_cut() -> None:
    found = lazy.all_units([Held(wide())])
    cut = lazy.UNIT
    assert found == [("b", 0, 3), ("m", 0, 75_000), ("w", 0, cut), ("w", cut, 1_100_000)]


@pytest.mark.parametrize("grain", ["element", "row", "tensor"])
@pytest.mark.parametrize("block", [1000, 65_536, 10**7])
def test_a_vector_longer_than_a_block_has_the_same_bytes_however_it_is_cut(
    grain: str, block: int
) -> None:
    tensors = wide()
    for number in (1, 2, 3):
        with lazy.workers(number):
            assert equal_bytes(values(coarse(Held(tensors), grain), block), tensors)


# --------------------------------------------------------------------------------------------
# Vectors


@law
@given(models())
def test_held_tensors_come_back_bit_for_bit_and_sorted_by_name(tensors: dict[str, Array]) -> None:
    vector = Held(tensors)
    assert list(vector.shapes.items()) == sorted((k, v.shape) for k, v in tensors.items())
    assert equal_bytes(values(vector), tensors)
    assert {name: vector.size(name) for name in tensors} == {k: v.size for k, v in tensors.items()}
    assert {vector.grain(name) for name in tensors} == {1}
    assert vector.leaves == (vector,)
    assert vector.weight == 1


def test_tensors_that_do_not_lie_in_one_piece_are_read_in_their_order() -> None:
    whole = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert Held({"w": whole.T}).block("w", 2, 5).tolist() == [8, 1, 5]


@law
@given(groups(), st.data())
def test_a_combination_is_rounded_product_by_product_and_sum_by_sum(
    group: list[dict[str, Array]], data: st.DataObject
) -> None:
    group = [bounded(tensors) for tensors in group]
    weight = st.sampled_from([1.0, -1.0, 0.3, 1 / 3, 2.0, 0.0])
    weights = [data.draw(weight) for _ in group]
    found = values(lazy.combination((Held(t), w) for t, w in zip(group, weights, strict=True)))
    for name, first in group[0].items():
        total = first * np.float32(weights[0])
        for tensors, each in zip(group[1:], weights[1:], strict=True):
            product = tensors[name] * np.float32(each)
            total = total + product
        assert found[name].tobytes() == total.tobytes()


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, 1e39, -1e39])
def test_a_weight_that_is_no_finite_float32_is_refused(weight: float) -> None:
    vector = Held({"w": array([1])})
    with pytest.raises(InvalidInput, match=re.escape(f"the weight {weight:g} of a vector")):
        lazy.combination([(vector, 1), (vector, weight)])
    assert values(lazy.combination([(vector, 3.4e38)]))["w"] == F32(3.4e38)


def test_a_total_is_added_in_the_order_given() -> None:
    large, one = Held({"w": array([1e8])}), Held({"w": array([1])})
    less = lazy.combination([(large, -1)])
    assert values(lazy.total([large, one, less]))["w"] == [0]
    assert values(lazy.total([large, less, one]))["w"] == [1]


@law
@given(groups())
def test_blocks_are_added_in_the_order_given_into_a_new_block(
    group: list[dict[str, Array]],
) -> None:
    parts = [flat(bounded(tensors)) for tensors in group]
    before = [part.tobytes() for part in parts]
    found = lazy.added(parts)
    expected = parts[0]
    for part in parts[1:]:
        expected = expected + part
    assert found.tobytes() == expected.tobytes()
    assert [part.tobytes() for part in parts] == before
    assert not any(np.shares_memory(found, part) for part in parts)


@law
@given(models())
def test_tensors_are_scaled_each_by_its_own_factor(tensors: dict[str, Array]) -> None:
    factors = {name: 2.0**-place for place, name in enumerate(sorted(tensors))}
    found = values(lazy.scaled(Held(tensors), factors))
    for name, part in tensors.items():
        assert found[name].tobytes() == (part * np.float32(factors[name])).tobytes()


@law
@given(models())
def test_absolute_values_lose_the_sign_of_zero_too(tensors: dict[str, Array]) -> None:
    for name, part in values(lazy.absolute(Held(tensors))).items():
        assert part.tobytes() == np.abs(tensors[name]).tobytes()
        assert not np.signbit(part).any()


def test_the_weight_of_a_scaled_vector_is_the_product_of_its_factors() -> None:
    a, b = Held({"w": np.ones(2, np.float32)}), Held({"w": np.ones(2, np.float32)})
    half = lazy.combination([(a, 0.5)])
    assert half.weight == 0.5
    assert lazy.combination([(half, -3)]).weight == -1.5
    assert coarse(half, "row").weight == 0.5
    assert lazy.absolute(lazy.combination([(lazy.absolute(half), 4)])).weight == 2
    assert lazy.combination([(half, 0.5), (b, 0.5)]).weight == 1
    assert lazy.combination([(lazy.total([half, b]), 0.25)]).weight == 0.25


def test_the_leaves_of_an_expression_are_its_different_vectors_in_the_order_of_their_use() -> None:
    a, b, c = (Held({"w": np.ones(2, np.float32)}) for _ in range(3))
    inner = lazy.total([b, a])
    assert lazy.total([lazy.absolute(inner), c, a, inner]).leaves == (b, a, c)
    assert inner.leaves == (b, a)


def test_the_grain_of_an_expression_is_the_coarsest_of_its_parts() -> None:
    held = Held({"w": np.ones((4, 3), np.float32), "s": array(1)})
    row, tensor = coarse(held, "row"), coarse(held, "tensor")
    assert [lazy.total([held, v]).grain("w") for v in (held, row, tensor)] == [1, 3, 12]
    assert coarse(tensor, "row").grain("w") == 12
    assert [v.grain("s") for v in (held, row, tensor)] == [1, 1, 1]


def test_vectors_with_other_parameters_are_refused_with_a_count_and_a_name() -> None:
    left = Held({"a": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)})
    right = Held({"b": np.zeros(1, np.float32), "c": np.zeros(1, np.float32)})
    with pytest.raises(IncompatibleWeights, match=r"2 only in some of them \(first: 'a'\)"):
        lazy.total([left, right])


def test_vectors_with_other_shapes_are_refused_with_both_shapes() -> None:
    left = {"a": np.zeros(1, np.float32), "b": np.zeros((2, 3), np.float32)}
    right = {**left, "b": np.zeros((3, 2), np.float32)}
    for ask in (lazy.total, lazy.check_shapes, lazy.gram):
        with pytest.raises(IncompatibleWeights) as caught:
            ask([Held(left), Held(left), Held(right)])
        assert "'b' has the shape (2, 3) in one vector and (3, 2)" in str(caught.value)
    lazy.check_shapes([Held(left), Held(left)])


def test_a_method_of_one_operand_names_those_it_got() -> None:
    a, b = Held({"w": array([1])}), Held({"w": array([2])})
    assert lazy.only("lines", {"a": a}) is a
    with pytest.raises(InvalidInput, match=r"lines takes one operand, found 2 \(a, b\)"):
        lazy.only("lines", {"a": a, "b": b})
    with pytest.raises(InvalidInput, match="found 0"):
        lazy.only("lines", {})


@law
@given(models(), GRAINS, st.integers(1, 3))
def test_a_materialized_vector_is_the_vector(
    tensors: dict[str, Array], grain: str, number: int
) -> None:
    with lazy.workers(number):
        found = lazy.materialize(coarse(Held(tensors), grain))
    assert list(found) == sorted(tensors)
    assert equal_bytes(found, tensors)
    assert all(part.dtype == np.float32 for part in found.values())


def test_a_materialized_vector_may_be_longer_than_a_unit() -> None:
    assert equal_bytes(lazy.materialize(lazy.total([Held(wide())])), wide())


@pytest.mark.parametrize(
    ("shape", "length"),
    [((), 1), ((0,), 1), ((7,), 7), ((2, 3), 3), ((4, 0, 2), 2), ((2, 0), 1)],
)
def test_a_row_is_as_long_as_the_last_axis(shape: tuple[int, ...], length: int) -> None:
    assert lazy.row_length(shape) == length


# --------------------------------------------------------------------------------------------
# Order statistics


def same_number(left: float, right: float) -> bool:
    """Return whether two numbers are equal; zeros of both signs are."""
    return left == right


@law
@given(models(), GRAINS, st.data())
def test_order_statistics_are_those_of_all_elements_sorted(
    tensors: dict[str, Array], grain: str, data: st.DataObject
) -> None:
    ordered = np.sort(flat(tensors))
    place = st.integers(0, max(0, ordered.size - 1))
    positions = data.draw(st.lists(place, max_size=4 if ordered.size else 0))
    found = lazy.order_statistics(coarse(Held(tensors), grain), positions)
    assert len(found) == len(positions)
    assert all(map(same_number, found, ordered[positions].tolist()))


def test_zeros_of_both_signs_stand_between_the_smallest_numbers() -> None:
    mixed = array([0.0, 1e-45, -0.0, -1e-45, 0.0, -0.0])
    found = lazy.order_statistics(Held({"w": mixed}), range(6))
    assert found == [-np.float32(1e-45), 0, 0, 0, 0, np.float32(1e-45)]
    assert [math.copysign(1, value) for value in found] == [-1, -1, -1, 1, 1, 1]


def test_infinite_numbers_stand_at_the_ends() -> None:
    mixed = array([np.inf, 3.4e38, -np.inf, -3.4e38])
    assert lazy.order_statistics(Held({"w": mixed}), [0, 3]) == [-np.inf, np.inf]


@law
@given(models(), GRAINS, st.integers(-3, 3))
def test_order_statistics_of_tensors_are_those_of_each_sorted_by_itself(
    tensors: dict[str, Array], grain: str, offset: int
) -> None:
    def positions(size: int) -> list[int]:
        return [size // 2, 0, size - 1, size // 2, min(size - 1, max(0, size // 3 + offset))]

    found = lazy.tensor_order_statistics(coarse(Held(tensors), grain), positions)
    assert list(found) == sorted(tensors)
    for name, part in tensors.items():
        ordered = np.sort(part.reshape(-1))
        wanted = ordered[positions(part.size)].tolist() if part.size else []
        assert len(found[name]) == len(wanted)
        assert all(map(same_number, found[name], wanted))


def test_tensors_of_which_nothing_is_asked_have_no_order_statistics() -> None:
    vector = Held({"w": np.ones(3, np.float32), "x": np.ones(2, np.float32)})
    found = lazy.tensor_order_statistics(vector, lambda size: [2] if size == 3 else [])
    assert found == {"w": [1.0], "x": []}


class Scrambled(Lazy):
    """The whole numbers from 3 - n to 2, each once and none in its place, never in memory."""

    def __init__(self, size: int, largest: int) -> None:
        super().__init__({"w": (size,), "b": (3,)})
        self.largest = largest  # elements of a block that were asked for at once

    def block(self, name: str, start: int, stop: int) -> Array:
        assert stop - start <= self.largest, "more than a block is held"
        places = np.arange(start, stop, dtype=np.int64)
        return (places * 7_777_777 % self.size(name) + 3 - self.size(name)).astype(np.float32)


def test_a_tensor_too_large_to_hold_is_selected_from_block_by_block() -> None:
    size = lazy.HELD + 1
    assert math.gcd(size, 7_777_777) == 1
    vector = Scrambled(size, lazy.BLOCK)
    found = lazy.tensor_order_statistics(vector, lambda n: [0, n // 3, n - 1])
    assert found == {"b": [0, 1, 2], "w": [3 - size, 3 - size + size // 3, 2]}
    assert lazy.order_statistics(vector, [0, size, size + 2]) == [3 - size, 1, 2]


def test_a_large_tensor_that_comes_whole_is_selected_from_whole() -> None:
    size = lazy.HELD + 1
    vector = coarse(Scrambled(size, size), "tensor")
    assert lazy.tensor_order_statistics(vector, lambda n: [n // 3])["w"] == [3 - size + size // 3]


@law
@given(st.integers(1, 6), st.integers(1, 9), st.data())
def test_order_statistics_of_rows_are_those_of_each_row_sorted(
    rows: int, columns: int, data: st.DataObject
) -> None:
    matrix = data.draw(arrays((rows, columns)))
    before = matrix.tobytes()
    position = data.draw(st.integers(0, columns - 1))
    found = lazy.row_order_statistics(matrix, position)
    assert found.shape == (rows, 1)
    assert np.array_equal(found[:, 0], np.sort(matrix, axis=1)[:, position])
    assert matrix.tobytes() == before


# --------------------------------------------------------------------------------------------
# Sums


@law
@given(groups().map(lambda group: [bounded(tensors) for tensors in group]), GRAINS)
def test_gram_matrices_are_the_inner_products_in_float64(
    group: list[dict[str, Array]], grain: str
) -> None:
    found = lazy.gram([coarse(Held(tensors), grain) for tensors in group])
    assert list(found) == sorted(group[0])
    for name, matrix in found.items():
        rows = np.array([tensors[name].reshape(-1) for tensors in group], np.float64)
        expected = np.array([[math.fsum(a * b) for b in rows] for a in rows])
        scale = np.array([[math.fsum(np.abs(a * b)) for b in rows] for a in rows])
        assert matrix.dtype == np.float64 and matrix.shape == (len(group), len(group))
        assert np.all(np.abs(matrix - expected) <= 1e-13 * scale)
        assert np.array_equal(matrix, matrix.T)


@law
@given(models().map(bounded), GRAINS)
def test_sums_are_taken_tensor_by_tensor_and_empty_tensors_count_as_zero(
    tensors: dict[str, Array], grain: str
) -> None:
    def count_and_size(parts: list[Array]) -> list[float]:
        return [parts[0].size, np.abs(parts[0]).sum(dtype=np.float64)]

    found = lazy.sums([coarse(Held(tensors), grain)], count_and_size)
    assert list(found) == sorted(tensors)
    for name, part in tensors.items():
        expected = math.fsum(np.abs(part).reshape(-1).tolist())
        assert found[name].dtype == np.float64
        assert found[name].tolist() == [part.size, pytest.approx(expected, rel=1e-13, abs=0)]


@law
@given(groups(), GRAINS)
def test_l1_norms_are_the_sums_of_magnitudes_of_each_vector(
    group: list[dict[str, Array]], grain: str
) -> None:
    found = lazy.l1_norms([coarse(Held(bounded(tensors)), grain) for tensors in group])
    assert list(found) == sorted(group[0])
    for name, norms in found.items():
        parts = [np.abs(bounded(tensors)[name]).reshape(-1).tolist() for tensors in group]
        assert norms.dtype == np.float64
        assert norms.tolist() == [pytest.approx(math.fsum(p), rel=1e-13, abs=0) for p in parts]


def test_a_sum_of_numbers_is_a_number_for_each_tensor() -> None:
    tensors = wide()
    found = lazy.sums([Held(tensors)], lambda parts: np.sum(parts[0], dtype=np.float64))
    assert {name: value.shape for name, value in found.items()} == {"b": (), "m": (), "w": ()}
    for name, part in tensors.items():
        assert float(found[name]) == pytest.approx(math.fsum(part.reshape(-1).tolist()), rel=1e-9)


STATISTICS: dict[str, Callable[[Sequence[Lazy]], Any]] = {
    "gram": lambda v: {name: part.tobytes() for name, part in lazy.gram(v).items()},
    "sums": lambda v: {
        name: part.tobytes()
        for name, part in lazy.sums(
            v, lambda p: np.exp(p[0] * 1e-2, dtype=np.float64).sum()
        ).items()
    },
    "order": lambda v: lazy.order_statistics(v[0], [0, 12_345, 900_000, 1_175_002]),
    "tensors": lambda v: lazy.tensor_order_statistics(v[0], lambda n: [0, n // 2, n - 1]),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_the_same_bytes_for_any_number_of_workers(name: str) -> None:
    vectors = [Held(wide(1)), Held(wide(2))]
    found = []
    for number in (1, 2, 3):
        with lazy.workers(number):
            found.append(STATISTICS[name](vectors))
    assert found[0] == found[1] == found[2]


def test_statistics_of_more_than_a_unit_are_exact() -> None:
    tensors = wide()
    ordered = np.sort(flat(tensors))
    places = [0, 1, 555_555, 1_100_000, ordered.size - 1]
    assert lazy.order_statistics(Held(tensors), places) == ordered[places].tolist()
    found = lazy.gram([Held(tensors), Held(wide(1))])["w"][0, 1]
    products = tensors["w"].astype(np.float64) * wide(1)["w"]
    assert found == pytest.approx(math.fsum(products.reshape(-1).tolist()), rel=1e-9)


# --------------------------------------------------------------------------------------------
# Workers


@pytest.mark.parametrize("number", [1, 2, 3])
def test_results_come_in_the_order_of_the_items(number: int) -> None:
    first_done, seen = threading.Event(), set()

    def slow_at_first(item: int) -> int:
        seen.add(threading.get_ident())
        if number > 1 and item == 0:
            assert first_done.wait(10), "the items are not computed side by side"
        if item == 1:
            first_done.set()
        return item * item

    found = list(lazy.parallel(slow_at_first, range(20), number))
    assert found == [item * item for item in range(20)]
    assert len(seen) <= number
    assert (threading.get_ident() in seen) == (number == 1)


def test_nothing_to_do_gives_nothing() -> None:
    assert list(lazy.parallel(abs, [])) == []


@pytest.mark.parametrize("number", [1, 2])
def test_an_error_reaches_the_caller_and_ends_the_work(number: int) -> None:
    done: list[int] = []

    def fail_at_three(item: int) -> None:
        if item == 3:
            raise FloatingPointError("item 3")
        done.append(item)

    with pytest.raises(FloatingPointError, match="item 3"):
        for _ in lazy.parallel(fail_at_three, range(10_000), number):
            pass
    assert done[:3] == [0, 1, 2]
    assert len(done) < 9_999


def test_work_that_nobody_waits_for_is_dropped() -> None:
    done: list[int] = []
    found = lazy.parallel(done.append, range(10_000), 2)
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert 0 < len(done) < 10_000


def test_the_number_of_workers_holds_inside_and_is_put_back() -> None:
    def threads() -> int:
        barrier = threading.Barrier(3)

        def meet(item: int) -> bool:
            try:
                barrier.wait(0.3)
            except threading.BrokenBarrierError:
                return False
            return True

        return 3 if all(lazy.parallel(meet, range(3))) else 2

    with lazy.workers(3):
        assert threads() == 3
        with pytest.raises(KeyError), lazy.workers(2):
            assert threads() == 2
            raise KeyError
        assert threads() == 3
        lazy.set_workers(2)
        assert threads() == 2


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    ("kind", "counted"),
    [("normal", False), ("constant", True), ("misleading", True), ("half zero", True)],
)
def test_a_long_vector_is_selected_from_by_a_sample_or_if_it_misleads_by_counting(
    kind: str, counted: bool, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy, "HELD", 100_000)
    rng = np.random.default_rng(0)
    elements = {
        "normal": rng.normal(size=200_000),
        "constant": np.full(200_000, 3.0),
        "misleading": np.where(np.arange(200_000) % lazy.BLOCK < lazy.SAMPLE, 9.0, rng.random()),
        "half zero": np.maximum(rng.normal(size=200_000), 0),
    }[kind].astype(np.float32)
    vector = lazy.Held({"a": elements[:70_000].reshape(7, -1), "b": elements[70_000:]})
    asked = []
    radix = lazy._radix
    monkeypatch.setattr(lazy, "_radix", lambda *args: asked.append(args) or radix(*args))
    ordered = np.sort(elements)
    for position in (0, 1, 60_000, 160_000, 199_999):
        with lazy.workers(workers):
            assert lazy.order_statistics(vector, [position]) == [ordered[position]]
    assert bool(asked) == counted
