"""File to file: the arithmetic to the last bit, the bytes of the files, and every failure."""

import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from taskvec import checkpoints, headers, lazy, streaming
from taskvec.checkpoints import load, save
from taskvec.edits import at
from taskvec.errors import IncompatibleWeights, Interrupted, InvalidInput
from taskvec.expressions import parse
from taskvec.lazy import Array, Blockwise, Held, Lazy, combination
from taskvec.mapped import Mapped, Stored, StoredVector, open_weights
from taskvec.streaming import Computed, apply, check_room, extract, write, write_vectors

law = settings(deadline=None, max_examples=40)
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = st.sampled_from([(), (0,), (1,), (5,), (97,), (3, 7), (4, 0, 2), (2, 3, 2, 5)])
GRAINS = st.sampled_from(["element", "row", "tensor"])
LARGEST = {torch.float32: 2.0**126, torch.float16: 2.0**15, torch.bfloat16: 2.0**126}
State = dict[str, Tensor]


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return finite values of very different sizes, whose differences are finite too."""
    few = draw(st.lists(st.floats(-LARGEST[dtype], LARGEST[dtype], width=32), min_size=1))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    many = random.normal(size=math.prod(shape)) * 10.0 ** draw(st.integers(-8, 4))
    many = np.where(random.random(many.shape) < 0.3, random.choice(few, many.size), many)
    return torch.tensor(many, dtype=torch.float32).reshape(shape).to(dtype)


@st.composite
def states(draw: st.DrawFn, count: int) -> list[State]:
    """Return checkpoints of one architecture: mixed dtypes, and buffers that they share."""
    dtypes = st.sampled_from(FLOATS)
    names = st.sampled_from(["w", "b", "x.y", "__x", "layers/0:a-b"])
    layout = draw(st.dictionaries(names, st.tuples(SHAPES, dtypes), min_size=1))
    shared = {
        "count": torch.tensor(draw(st.integers(-(2**60), 2**60))),
        "mask": torch.tensor([True, False, True]),
        "double": torch.tensor([0.1, 1e300], dtype=torch.float64),
    }
    kept = draw(st.lists(st.sampled_from(sorted(shared)), unique=True))
    return [
        {name: draw(tensors(*kind)) for name, kind in layout.items()}
        | {name: shared[name] for name in kept}
        for _ in range(count)
    ]


def on_disk(directory: Path, name: str, state: Mapping[str, Tensor], **metadata: Any) -> Mapped:
    path = directory / f"{name}.safetensors"
    save(path, state, "checkpoint", **metadata)
    return open_weights(path)


def plain(directory: Path, name: str, state: Mapping[str, Tensor]) -> Mapped:
    """Return a file of another program, which may hold anything."""
    save_file(dict(state), directory / f"{name}.safetensors")
    return open_weights(directory / f"{name}.safetensors")


def coarse(vector: Lazy, grain: str) -> Lazy:
    """Return the same vector, as if it could be computed by rows or whole tensors only."""
    return Blockwise([vector], lambda name, start, parts: parts[0].copy(), grain)


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Return whether names, dtypes, shapes and every bit are the same."""
    return left.keys() == right.keys() and all(
        (value.dtype, value.shape) == (right[name].dtype, right[name].shape)
        and value.numpy(force=True).tobytes() == right[name].numpy(force=True).tobytes()
        if value.dtype != torch.bfloat16
        else torch.equal(value.view(torch.int16), right[name].view(torch.int16))
        for name, value in left.items()
    )


def ulp(values: Tensor) -> Tensor:
    """Return the distance of neighbours at a magnitude, in the dtype of the values."""
    info = torch.finfo(values.dtype)
    size = values.double().abs().clamp(min=info.smallest_normal)
    return 2.0 ** torch.floor(torch.log2(size)) * info.eps


def edited(base: Mapping[str, Tensor], vector: Mapping[str, Array]) -> State:
    """Return ``base + vector`` by torch, each tensor in its own dtype."""
    return {
        name: (value.float() + torch.from_numpy(vector[name])).to(value.dtype)
        if name in vector
        else value
        for name, value in base.items()
    }


@pytest.fixture
def wide() -> State:
    """Return a model of several pieces of 4 MiB whose last pieces are odd."""
    random = torch.Generator().manual_seed(0)
    return {
        "large": torch.randn(1100, 2000, generator=random),
        "half": torch.randn(2_200_001, generator=random).half(),
        "brain": torch.randn(3, 700, 1001, generator=random).bfloat16(),
        "small": torch.randn(3, generator=random),
        "count": torch.arange(5),
    }


def vector_for(state: Mapping[str, Tensor], seed: int = 1) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {
        name: np.asarray(random.normal(size=tuple(value.shape)) / 8, np.float32)
        for name, value in state.items()
        if value.is_floating_point() and value.dtype != torch.float64
    }


# The arithmetic


@law
@given(states(2))
def test_extract_and_apply_give_the_finetuned_model_within_one_ulp(
    tmp_path_factory: pytest.TempPathFactory, pair: list[State]
) -> None:
    directory = tmp_path_factory.mktemp("round")
    before, after = (on_disk(directory, f"m{i}", state) for i, state in enumerate(pair))
    extract(before, after, directory / "v")
    vector = StoredVector(open_weights(directory / "v"))
    apply(before, vector, directory / "edited")
    found = load(directory / "edited", "checkpoint").tensors
    assert list(vector.shapes) == sorted(n for n, v in pair[0].items() if v.dtype in FLOATS)
    for name, value in pair[1].items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        if value.dtype not in FLOATS:
            assert torch.equal(found[name], value)
            continue
        scale = torch.maximum(pair[0][name].abs(), value.abs())
        assert ((found[name].double() - value.double()).abs() <= ulp(scale)).all()


@law
@given(states(2), st.booleans())
def test_a_vector_on_disk_is_the_vector_of_the_algebra(
    tmp_path_factory: pytest.TempPathFactory, pair: list[State], chosen: bool
) -> None:
    from taskvec.vectors import TaskVector

    directory = tmp_path_factory.mktemp("extract")
    names = sorted(name for name, value in pair[0].items() if value.dtype in FLOATS)
    if chosen:
        pair[1] = {name: pair[int(name == names[0])][name] for name in pair[0]}
        names = names[:1]
    before, after = (on_disk(directory, f"m{i}", state) for i, state in enumerate(pair))
    mark = extract(before, after, directory / "v", names=names if chosen else None, task="t")
    loaded = load(directory / "v", "vector")
    inside = TaskVector.between(*pair, names=names)
    assert same(loaded.tensors, inside.tensors)
    assert loaded.fingerprint == mark == checkpoints.fingerprint(inside.tensors)
    assert loaded.metadata == {
        "kind": "vector",
        "fingerprint": mark,
        "origin": checkpoints.fingerprint(pair[0]),
        "finetuned": checkpoints.fingerprint(pair[1]),
        "task": "t",
    }
    assert inside.origin == loaded.metadata["origin"]


@law
@given(states(1))
def test_without_an_edit_the_model_is_copied_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, one: list[State]
) -> None:
    directory = tmp_path_factory.mktemp("copy")
    base = on_disk(directory, "base", one[0])
    mark = apply(base, None, directory / "copy", note="x")
    copy = load(directory / "copy", "checkpoint")
    assert same(copy.tensors, one[0])
    assert mark == base.fingerprint == copy.metadata["origin"]
    assert copy.metadata["note"] == "x"
    other = plain(directory, "plain", one[0])
    assert apply(other, None, directory / "other") == mark


@law
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=9, max_size=9),
    st.floats(-2, 2),
    st.floats(-2, 2),
)
def test_an_expression_is_its_arithmetic_in_the_order_of_its_text(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], a: float, b: float
) -> None:
    directory = tmp_path_factory.mktemp("expression")
    x, y, z = (np.array(values[i::3], np.float32) for i in range(3))
    base = on_disk(directory, "base", {"w": torch.ones(3)})
    edit = parse("b * (z - 3 * x) + a * y / 2 + x", ["x", "y", "z"], ["a", "b"])
    assert str(edit) == "x + 0.5 * a * y + b * (-3 * x + z)"
    vectors: dict[str, Lazy] = {"x": Held({"w": x}), "y": Held({"w": y}), "z": Held({"w": z})}
    apply(base, at(edit, {"a": a, "b": b}, vectors), directory / "edited")
    f = np.float32
    change = x if a or b else x * f(1)
    if a:
        change = change + (y * f(0.5)) * f(a)
    if b:
        change = change + (x * f(-3) + z) * f(b)
    found = load(directory / "edited", "checkpoint").tensors["w"].numpy()
    assert found.tobytes() == (np.ones(3, f) + change).tobytes()


@pytest.mark.parametrize("code", ["F16", "BF16"])
def test_values_are_rounded_to_the_nearest_and_ties_to_even(tmp_path: Path, code: str) -> None:
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[code]
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    exact = patterns[torch.isfinite(patterns)].float().unique()
    middle = (exact[:-1].double() + exact[1:].double()).div(2).float()
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    around = [torch.nextafter(middle, up), torch.nextafter(middle, down)]
    values = torch.cat([exact, middle, *around, torch.tensor([-0.0, 1e-45, -1e-45])])
    expected = values.to(dtype)
    assert torch.isfinite(expected).all()
    vector = Held({"x": values.numpy()})
    write(tmp_path / "x", {"x": Computed(vector, "x", code)}, kind="vector", metadata={})
    assert same(load(tmp_path / "x", "vector").tensors, {"x": expected})


def test_a_sum_in_half_precision_is_rounded_once(tmp_path: Path) -> None:
    # Rounded twice, 2048 + 1.0004 would become 2048: 1.0004 is 1 in half precision, and the sum
    # lies half-way between 2048 and 2050.
    base = on_disk(tmp_path, "base", {"w": torch.tensor([2048.0, -2048.0]).half()})
    vector = Held({"w": np.array([1.0004, -1.0004], np.float32)})
    apply(base, vector, tmp_path / "x")
    assert load(tmp_path / "x", "checkpoint").tensors["w"].tolist() == [2050.0, -2050.0]


# The bytes


@law
@given(
    states(1),
    st.sampled_from([8, 64, 1 << 22]),
    st.sampled_from([1, 2, 3, 7, 64, lazy.BLOCK]),
    st.integers(1, 4),
    GRAINS,
    st.booleans(),
)
def test_the_file_is_the_same_for_any_block_and_number_of_workers(
    tmp_path_factory: pytest.TempPathFactory,
    one: list[State],
    piece: int,
    block: int,
    workers: int,
    grain: str,
    halves: bool,
) -> None:
    directory = tmp_path_factory.mktemp("bytes")
    (state,) = one
    values = vector_for(state)
    state = edited(
        state, {n: np.zeros_like(v) for n, v in values.items()}
    )  # no -0.0, which sums lose
    if halves:
        values.pop(min(values))
    with pytest.MonkeyPatch.context() as patch, lazy.workers(workers):
        patch.setattr(headers, "PIECE", piece)
        base = on_disk(directory, "base", state)
        vector = coarse(Held(values), grain) if values else None
        output: dict[str, Any] = dict(base.tensors)
        for name in values:
            stored = base.tensors[name]
            output[name] = Computed(vector, name, stored.dtype, stored)  # type: ignore[arg-type]
        record = {"origin": "é", "seed": 3, "shares": [0.1, 1e-300]}
        told: list[tuple[int, int]] = []
        mark = write(
            directory / "x", output, kind="checkpoint", metadata=record, block=block,
            progress=lambda done, total: told.append((done, total)),
        )  # fmt: skip
        expected = edited(state, values)
        assert mark == save(directory / "y", expected, "checkpoint", **record)
        assert (directory / "x").read_bytes() == (directory / "y").read_bytes()
        assert open_weights(directory / "x").measure() == mark
    total = sum(value.nbytes for value in state.values())
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (total, total) if total else told == []


@pytest.mark.parametrize("grain", ["element", "row", "tensor"])
def test_tensors_of_several_pieces_have_the_same_bytes_however_they_are_computed(
    tmp_path: Path, wide: State, grain: str
) -> None:
    values = vector_for(wide)
    mark = save(tmp_path / "expected", edited(wide, values), "checkpoint", origin="o")
    base = on_disk(tmp_path, "base", wide)
    vector = coarse(Held(values), grain)
    for workers, block in ((1, lazy.BLOCK), (3, 100_003), (2, 4097)):
        with lazy.workers(workers), pytest.MonkeyPatch.context() as patch:
            defaults = {**(streaming.write.__kwdefaults__ or {}), "block": block}
            patch.setattr(streaming.write, "__kwdefaults__", defaults)
            patch.setattr(streaming, "FLUSH", 1 << 20)
            found = apply(base, vector, tmp_path / "x", origin="o")
        assert found == mark
        assert (tmp_path / "x").read_bytes() == (tmp_path / "expected").read_bytes()


def test_files_of_several_vectors_are_those_that_save_writes(tmp_path: Path, wide: State) -> None:
    one, other = vector_for(wide), vector_for(wide, 2)
    mark = write_vectors(
        tmp_path / "x", {"0.a.": Held(one), "0.b.": Held(other)}, kind="basis", note=[1]
    )
    state = {f"0.a.{name}": torch.from_numpy(value) for name, value in one.items()}
    state |= {f"0.b.{name}": torch.from_numpy(value) for name, value in other.items()}
    assert mark == save(tmp_path / "y", state, "basis", note=[1])
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    assert lazy.materialize(StoredVector(open_weights(tmp_path / "x"), "0.b.")).keys() == (
        other.keys()
    )


def test_every_dtype_is_copied_to_the_place_where_save_puts_it(tmp_path: Path) -> None:
    state = {f"t{i}": torch.zeros(3).to(dtype) for i, dtype in enumerate(checkpoints.CODES)}
    base = on_disk(tmp_path, "base", state)
    apply(base, None, tmp_path / "x")
    save(tmp_path / "y", state, "checkpoint", origin=base.fingerprint)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_a_model_can_be_written_over_its_own_file(tmp_path: Path) -> None:
    base = on_disk(tmp_path, "base", {"w": torch.arange(5.0), "b": torch.ones(2)})
    path = tmp_path / "base.safetensors"
    apply(base, Held({"w": np.ones(5, np.float32)}), path)
    assert load(path, "checkpoint").tensors["w"].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert base.tensors["w"].floats(0, 5).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


# Ties and buffers


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    shared, moved = torch.ones(2, 2), torch.full((2, 2), 1.5)
    base = on_disk(tmp_path, "base", {"a": shared, "b": shared, "c": shared.clone()})
    tuned = on_disk(tmp_path, "tuned", {"a": moved, "b": moved, "c": shared})
    assert dict(base.tied) == {"b": "a"}
    extract(base, tuned, tmp_path / "v")
    vector = StoredVector(open_weights(tmp_path / "v"))
    assert list(vector.shapes) == ["a", "c"]
    mark = apply(base, combination([(vector, 2.0)]), tmp_path / "x")
    found = load(tmp_path / "x", "checkpoint")
    assert checkpoints.tied(found.tensors) == {"b": "a"}
    assert found.tensors["b"] is found.tensors["a"]
    assert found.tensors["a"].tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert found.fingerprint == mark == checkpoints.fingerprint(found.tensors)
    save(tmp_path / "y", found.tensors, "checkpoint", origin=base.fingerprint)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    apply(base, None, tmp_path / "copy")
    assert checkpoints.tied(load(tmp_path / "copy", "checkpoint").tensors) == {"b": "a"}
    with pytest.raises(IncompatibleWeights, match="'b' of shape .* is missing"):
        apply(base, Held({"b": np.ones((2, 2), np.float32)}), tmp_path / "x")


@pytest.mark.parametrize(
    "buffer",
    [torch.tensor(7), torch.tensor([True]), torch.tensor([0.5], dtype=torch.float64)],
    ids=["int", "bool", "double"],
)
def test_buffers_are_copied_and_refused_where_they_differ(tmp_path: Path, buffer: Tensor) -> None:
    state = {"w": torch.ones(2), "buffer": buffer}
    base = on_disk(tmp_path, "base", state)
    tuned = on_disk(tmp_path, "tuned", {"w": torch.zeros(2), "buffer": buffer})
    extract(base, tuned, tmp_path / "v")
    assert list(open_weights(tmp_path / "v").tensors) == ["w"]
    apply(base, StoredVector(open_weights(tmp_path / "v")), tmp_path / "x")
    assert torch.equal(load(tmp_path / "x", "checkpoint").tensors["buffer"], buffer)
    other = on_disk(tmp_path, "other", {"w": torch.zeros(2), "buffer": torch.zeros_like(buffer)})
    with pytest.raises(IncompatibleWeights, match=r"not edited differ .*first: 'buffer'"):
        extract(base, other, tmp_path / "v")


# Failures leave the old file and nothing else


@contextmanager
def untouched(path: Path, kind: type[Exception], message: str) -> Iterator[None]:
    """Check that an error is raised, and that the directory is as before."""
    path.write_bytes(b"old")
    before = {file: file.stat().st_mtime_ns for file in path.parent.iterdir()}
    with pytest.raises(kind, match=message) as caught:
        yield
    if isinstance(caught.value, InvalidInput):
        assert caught.value.exit_code == 3
    assert path.read_bytes() == b"old"
    assert {file: file.stat().st_mtime_ns for file in path.parent.iterdir()} == before


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_with_its_tensor(
    tmp_path: Path, bad: float, dtype: torch.dtype, workers: int
) -> None:
    good = {"a": torch.ones(70_000, dtype=dtype), "b": torch.ones(70_000, dtype=dtype)}
    broken = {**good, "b": good["b"].clone()}
    broken["b"][-1] = bad
    base, wrong = plain(tmp_path, "base", good), plain(tmp_path, "wrong", broken)
    step = Held({name: np.ones(70_000, np.float32) for name in good})
    spoilt = Held({name: value.float().numpy() for name, value in broken.items()})
    path, message = tmp_path / "x", r"tensor 'b' of .* holds NaN or infinite values \(1 in one"
    with lazy.workers(workers):
        for pair in ((base, wrong), (wrong, base), (wrong, wrong)):
            with untouched(path, IncompatibleWeights, message):
                extract(*pair, path)
        with untouched(path, IncompatibleWeights, message):
            apply(wrong, step, path)
        with untouched(path, IncompatibleWeights, message):
            apply(base, spoilt, path)
        with untouched(path, IncompatibleWeights, message):
            apply(base, StoredVector(wrong), path)
        with untouched(path, IncompatibleWeights, message):
            write_vectors(path, {"": spoilt}, kind="vector")


def test_values_that_leave_the_range_of_their_dtype_are_refused(tmp_path: Path) -> None:
    cases = {
        "F32": (torch.float32, 3e38, 3e38),
        "F16": (torch.float16, 65504.0, 16.0),
        "BF16": (torch.bfloat16, 3.3895313892515355e38, 2.0**119),
    }
    for code, (dtype, value, step) in cases.items():
        base = on_disk(tmp_path, code, {"n": torch.zeros(1, dtype=dtype),
                                        "w": torch.full((3,), value, dtype=dtype)})  # fmt: skip
        vector = Held({"w": np.full(3, step, np.float32)})
        with untouched(tmp_path / "x", IncompatibleWeights, "tensor 'w' of the result"):
            apply(base, vector, tmp_path / "x")
        below = step * 0.999 if code != "F32" else 1e37
        apply(base, Held({"w": np.full(3, below, np.float32)}), tmp_path / "y")
        assert torch.isfinite(load(tmp_path / "y", "checkpoint").tensors["w"]).all()


def test_differences_that_overflow_are_refused(tmp_path: Path) -> None:
    before = on_disk(tmp_path, "before", {"w": torch.tensor([3e38])})
    after = on_disk(tmp_path, "after", {"w": torch.tensor([-3e38])})
    with untouched(tmp_path / "x", IncompatibleWeights, "'w' of .* minus .* holds NaN"):
        extract(before, after, tmp_path / "x")


@pytest.mark.parametrize("coefficient", [1e30, 1e39, -1e300, math.inf, math.nan])
def test_coefficients_that_are_too_large_are_refused(tmp_path: Path, coefficient: float) -> None:
    base = on_disk(tmp_path, "base", {"w": torch.zeros(3)})
    held = Held({"w": np.array([0, 1, 1e10], np.float32)})
    with untouched(tmp_path / "x", InvalidInput, "tensor 'w' of the result|float32"):
        apply(base, combination([(held, coefficient)]), tmp_path / "x")


@pytest.mark.parametrize(
    ("name", "shape", "found"),
    [
        ("other", (2,), "missing"),
        ("w", (3,), r"F32 \(2,\)"),
        ("w", (1, 2), r"F32 \(2,\)"),
        ("count", (), r"I64 \(\)"),
        ("double", (1,), r"F64 \(1,\)"),
    ],
)
def test_edits_of_another_architecture_are_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...], found: str
) -> None:
    state = {"w": torch.ones(2), "count": torch.tensor(3), "double": torch.ones(1).double()}
    base = on_disk(tmp_path, "base", state)
    vector = Held({name: np.zeros(shape, np.float32)})
    with untouched(tmp_path / "x", IncompatibleWeights, f"the edit changes '{name}' .* is {found}"):
        apply(base, vector, tmp_path / "x")


def stored(*shape: int) -> Stored:
    return Stored("F32", shape, np.zeros(4 * math.prod(shape), np.uint8))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({}, "0 tensors"),
        ({"a b": stored(1)}, "tensor name 'a b'"),
        ({"__metadata__": stored(1)}, "tensor name '__metadata__'"),
        ({"x": stored(*[1] * 9)}, "'x' has 9 axes"),
        ({f"t{i}": stored(0) for i in range(headers.MAX_TENSORS + 1)}, "50001 tensors"),
    ],
    ids=["none", "name", "metadata", "rank", "many"],
)
def test_what_could_not_be_read_is_not_written(tmp_path: Path, output: Any, message: str) -> None:
    with untouched(tmp_path / "x", IncompatibleWeights, message):
        write(tmp_path / "x", output, kind="vector", metadata={})


def test_metadata_that_json_cannot_hold_leave_the_old_file(tmp_path: Path) -> None:
    for value in (math.nan, {1, 2}):
        with untouched(tmp_path / "x", Exception, "JSON"):
            write(tmp_path / "x", {"w": stored(1)}, kind="vector", metadata={"value": value})


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_the_middle_leaves_the_old_file(tmp_path: Path, workers: int) -> None:
    def fail(name: str, start: int, parts: list[Array]) -> Array:
        if start > 1_500_000:
            raise RuntimeError("planted")
        return parts[0]

    vector = Blockwise([Held({"w": np.ones(3_000_000, np.float32)})], fail)
    with lazy.workers(workers), untouched(tmp_path / "x", RuntimeError, "planted"):
        write_vectors(tmp_path / "x", {"": vector}, kind="vector")


@pytest.mark.parametrize("step", ["chmod", "replace"])
def test_an_interrupted_end_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def interrupt(*_: Any) -> None:
        raise Interrupted(signal.SIGINT)

    with monkeypatch.context() as patch, untouched(tmp_path / "x", Interrupted, "interrupted"):
        patch.setattr(Path, step, interrupt)
        write(tmp_path / "x", {"w": stored(3)}, kind="vector", metadata={})


def test_files_are_readable_whatever_the_umask_and_links_stay_behind(tmp_path: Path) -> None:
    cached, path, link = tmp_path / "cached", tmp_path / "x", tmp_path / "link"
    cached.write_bytes(b"old")
    path.hardlink_to(cached)
    link.symlink_to(cached)
    cached.chmod(0o444)
    previous = os.umask(0o077)
    try:
        for target in (path, link):
            write(target, {"w": stored(3)}, kind="vector", metadata={})
    finally:
        os.umask(previous)
    assert cached.read_bytes() == b"old"
    assert stat.S_IMODE(cached.stat().st_mode) == 0o444
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert not link.is_symlink()
    assert path.read_bytes() == link.read_bytes()


def test_the_directory_is_made_if_needed(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x"
    write(path, {"w": stored(3)}, kind="vector", metadata={})
    assert [file.name for file in path.parent.iterdir()] == ["x"]


def test_empty_tensors_alone_make_a_file(tmp_path: Path) -> None:
    mark = write(tmp_path / "x", {"w": stored(0, 3)}, kind="vector", metadata={})
    assert mark == save(tmp_path / "y", {"w": torch.zeros(0, 3)}, "vector")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


# The disk


def test_a_disk_without_the_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    asked: list[Path] = []

    def free(count: int) -> Callable[[Path], Any]:
        return lambda path: (asked.append(path), usage._replace(free=count))[1]

    monkeypatch.setattr(shutil, "disk_usage", free(10_100))
    path = tmp_path / "not" / "there" / "x"
    check_room(path, 10_000)
    assert asked == [tmp_path]
    with pytest.raises(InvalidInput, match=r"x needs 0\.00 GB, .* has 0\.00 GB free; make room"):
        check_room(path, 10_001)
    with pytest.raises(InvalidInput, match="make room"):
        write(path, {"w": stored(10_000)}, kind="vector", metadata={})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x").write_bytes(b"old")
    base = Mapped({"w": stored(10_000)}, "base", {"fingerprint": "f"})
    with untouched(tmp_path / "x", InvalidInput, "make room"):
        apply(base, None, tmp_path / "x")


def child(code: str, *arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


WRITE = """
import resource, sys
from pathlib import Path
import numpy as np
from taskvec import lazy, streaming
streaming.check_room = lambda path, needed: None
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
vector = lazy.Held({"w": np.ones(int(sys.argv[2]), np.float32)})
try:
    streaming.write_vectors(Path(sys.argv[1]), {"": vector}, kind="vector")
except OSError as error:
    sys.exit(error.strerror)
"""


def test_a_file_that_grows_too_large_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    done = child(WRITE, path, 100_000, 100_000)
    _, error = done.communicate(timeout=60)
    assert (done.returncode, error) == (1, "File too large\n")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_after_all_leaves_the_old_file(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    script = (
        'mount -t tmpfs -o size=256k none "$1" || exit 77; echo old > "$1/x";'
        '"$2" -c "$3" "$1/x" 100000 -1; echo "code $?"; ls -A "$1"; cat "$1/x"'
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", tmp_path, sys.executable, WRITE],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("a small disk cannot be mounted without privileges here")
    assert done.stderr == "No space left on device\n"
    assert done.stdout.split() == ["code", "1", "x", "old"]


HANG = """
import sys, time
from pathlib import Path
import numpy as np
from taskvec import lazy, streaming

def wait(name, start, parts):
    if start > 1_000_000:
        print("half", flush=True)
        time.sleep(60)
    return parts[0]

vector = lazy.Blockwise([lazy.Held({"w": np.ones(2_000_000, np.float32)})], wait)
streaming.write_vectors(Path(sys.argv[1]), {"": vector}, kind="vector")
"""


def test_a_process_that_is_killed_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    process = child(HANG, path)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    write(path, {"w": stored(3)}, kind="vector", metadata={})
    assert load(path, "vector").tensors["w"].tolist() == [0.0] * 3


# Memory

APPLY = """
import sys
from pathlib import Path
from taskvec import lazy, streaming
from taskvec.mapped import StoredVector, open_weights

lazy.set_workers(4)
base, vector, out = map(Path, sys.argv[1:])
edit = StoredVector(open_weights(vector))
streaming.apply(open_weights(base), lazy.combination([(edit, 0.5)]), out)
"""
SIZE = 400_000_000  # bytes


def sparse(path: Path, kind: str, rows: int) -> None:
    """Write a model of zeros that takes no room on the disk."""
    slots, length = headers.layout({f"t{i}": ("F32", (rows, 1000)) for i in range(4)})
    head = headers.header_bytes(slots, {"kind": kind, "fingerprint": "0" * 64})
    path.write_bytes(head)
    os.truncate(path, len(head) + length)


def anonymous(process: "subprocess.Popen[str]") -> int:
    """Return the bytes of memory that belong to a process and to no file."""
    try:
        text = Path(f"/proc/{process.pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = [line.split()[1] for line in text.splitlines() if line.startswith("RssAnon")]
    return int(found[0]) * 1024 if found else 0


def test_a_large_model_is_edited_in_little_memory(tmp_path: Path) -> None:
    sparse(tmp_path / "base", "checkpoint", SIZE // 16_000)
    sparse(tmp_path / "vector", "vector", SIZE // 16_000)
    process = child(APPLY, tmp_path / "base", tmp_path / "vector", tmp_path / "out")
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous(process))
        time.sleep(0.01)
    assert process.communicate()[1] == ""
    assert (tmp_path / "out").stat().st_size > SIZE
    assert 1_000_000 < peak < 150_000_000
    (tmp_path / "out").unlink()
