"""Weights on disk: what was written comes back, and damage is found before use."""

import hashlib
import json
import math
import os
import random
import stat
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from taskvec import headers
from taskvec.checkpoints import (
    Weights,
    check_finite,
    fingerprint,
    load,
    read_tensors,
    save,
    tied,
)
from taskvec.errors import IncompatibleWeights, MissingArtifact
from taskvec.headers import MAX_TENSORS, PIECE, read_header

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.int64]
SHAPES = st.sampled_from([(), (0,), (1,), (3,), (97,), (4, 0, 2), (2, 3, 2, 2)])
NAMES = st.from_regex(r"[A-Za-z0-9_./:-]{1,20}", fullmatch=True).filter(
    lambda n: n != "__metadata__"
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape, dtype = draw(SHAPES), draw(st.sampled_from(DTYPES))
    value = draw(st.floats(-100, 100, width=16))
    return (torch.arange(math.prod(shape)).reshape(shape) + value).to(dtype)


STATES = st.dictionaries(NAMES, tensors(), min_size=1, max_size=4)


def small() -> dict[str, Tensor]:
    return {
        "w": torch.tensor([[1.0, -2.0], [0.5, 3.0]]),
        "half": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        "flag": torch.tensor([True, False]),
        "count": torch.tensor(3),
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(value, right[name]) and value.dtype == right[name].dtype
        for name, value in left.items()
    )


def written(path: Path, **metadata: Any) -> bytes:
    save(path, small(), "vector", **metadata)
    return path.read_bytes()


def refused(path: Path, data: bytes, kind: str = "vector") -> str:
    path.write_bytes(data)
    with pytest.raises(IncompatibleWeights) as caught:
        load(path, kind)
    assert caught.value.exit_code == 3
    return str(caught.value)


def file_with(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: Any = (1,), end: int = 4) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [0, end]}


@settings(deadline=None)
@given(STATES)
def test_what_was_saved_is_loaded(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    path = tmp_path_factory.mktemp("round") / "x.safetensors"
    mark = save(path, state, "checkpoint", origin="é", seed=3, shares=[0.1, 1e-300])
    loaded = load(path, "checkpoint")
    assert same(loaded.tensors, state)
    assert loaded.fingerprint == mark == fingerprint(state)
    assert loaded.metadata == {
        "kind": "checkpoint",
        "fingerprint": mark,
        "origin": "é",
        "seed": 3,
        "shares": [0.1, 1e-300],
    }


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8, torch.int32, torch.float8_e4m3fn], ids=str)
def test_every_dtype_of_a_model_survives(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {"x": torch.tensor([0.0, 1.0, 1.0]).to(dtype)}
    save(tmp_path / "x", state, "vector")
    back = load(tmp_path / "x", "vector").tensors["x"]
    assert back.dtype == dtype
    assert back.float().tolist() == [0.0, 1.0, 1.0]


def test_the_bytes_do_not_depend_on_the_order_or_the_time(tmp_path: Path) -> None:
    items, words = list(small().items()), [("b", 1), ("a", 2), ("z", [3]), ("y", "four")]
    rng, digests = random.Random(0), set()
    for number in range(200):
        rng.shuffle(items)
        rng.shuffle(words)
        path = tmp_path / str(number % 2) / "x.safetensors"
        save(path, dict(items), "vector", **dict(words))
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_views_are_stored_as_tensors_of_their_own(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    state = {
        "all": base,
        "part": base[2:5],
        "turned": base.reshape(3, 4).T,
        "every": base[::2],
        "learnt": torch.nn.Parameter(torch.ones(2)),
    }
    save(tmp_path / "x", state, "vector")
    assert same(load(tmp_path / "x", "vector").tensors, state)


@settings(deadline=None)
@given(STATES)
def test_a_fingerprint_does_not_depend_on_the_order_of_the_entries(state: Any) -> None:
    assert fingerprint(state) == fingerprint(dict(reversed(state.items())))


@settings(deadline=None)
@given(st.integers(0, 8 * 24 - 1))
def test_a_fingerprint_changes_with_any_bit(bit: int) -> None:
    state = {"x": torch.arange(6.0)}
    changed = torch.arange(6.0)
    changed.view(torch.uint8)[bit // 8] ^= 1 << bit % 8
    assert fingerprint({"x": changed}) != fingerprint(state)


def test_a_fingerprint_changes_with_name_dtype_shape_and_division() -> None:
    zeros = torch.zeros(6)
    marks = {
        fingerprint({"x": zeros}),
        fingerprint({"y": zeros}),
        fingerprint({"x": zeros.to(torch.int32)}),
        fingerprint({"x": zeros.reshape(2, 3)}),
        fingerprint({"x": zeros.reshape(3, 2)}),
        fingerprint({"x": zeros[:3], "y": zeros[3:]}),
        fingerprint({"x": zeros[:2], "y": zeros[2:]}),
        fingerprint({"x": zeros, "empty": torch.zeros(0)}),
        fingerprint({"x": zeros, "empty": torch.zeros(0, 3)}),
        fingerprint({"x": -zeros}),
    }
    assert len(marks) == 10


def test_a_fingerprint_of_today_is_that_of_tomorrow() -> None:
    number, pair = struct.pack("<q", 3), struct.pack("<2f", 1, 2)
    by_hand = (
        b"empty F16 (0, 3)\n"
        + (b"n I64 ()\n" + hashlib.sha256(number).digest())
        + b"twin = w ()\n"
        + (b"w F32 (2,)\n" + hashlib.sha256(pair).digest())
    )
    w = torch.tensor([1.0, 2.0])
    state = {"w": w, "n": torch.tensor(3), "twin": w, "empty": torch.zeros(0, 3).half()}
    # the first name is the one that is stored
    assert tied(state) == {"w": "twin"}
    by_hand = by_hand.replace(b"twin = w ()\n", b"twin F32 (2,)\n" + hashlib.sha256(pair).digest())
    by_hand = by_hand[: by_hand.index(b"w F32")] + b"w = twin ()\n"
    assert fingerprint(state) == hashlib.sha256(by_hand).hexdigest()


def test_the_pieces_of_a_fingerprint_have_4_mib() -> None:
    large = torch.arange((2 * PIECE + 4) // 4, dtype=torch.int32)
    data = large.numpy().tobytes()
    pieces = [data[:PIECE], data[PIECE : 2 * PIECE], data[2 * PIECE :]]
    assert [len(piece) for piece in pieces] == [4 << 20, 4 << 20, 4]
    digests = b"".join(hashlib.sha256(piece).digest() for piece in pieces)
    by_hand = f"x I32 {tuple(large.shape)}\n".encode() + digests
    assert fingerprint({"x": large}) == hashlib.sha256(by_hand).hexdigest()


# Tied tensors


def tied_state() -> dict[str, Tensor]:
    shared = torch.arange(6.0).reshape(2, 3)
    return {"head": shared, "embedding": shared, "last": shared, "copy": shared.clone()}


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    state = tied_state()
    mark = save(tmp_path / "x", state, "checkpoint")
    assert set(read_header(tmp_path / "x")) == {"__metadata__", "embedding", "copy"}
    loaded = load(tmp_path / "x", "checkpoint")
    assert same(loaded.tensors, state)
    assert tied(loaded.tensors) == tied(state) == {"head": "embedding", "last": "embedding"}
    assert loaded.tensors["head"] is loaded.tensors["last"] is loaded.tensors["embedding"]
    assert loaded.fingerprint == mark == fingerprint(loaded.tensors)
    untied = {name: value.clone() for name, value in state.items()}
    assert fingerprint(untied) != mark
    save(tmp_path / "y", loaded.tensors, "checkpoint")
    assert (tmp_path / "y").read_bytes() == (tmp_path / "x").read_bytes()


def test_only_the_same_tensor_is_tied() -> None:
    base = torch.arange(6.0)
    views = {
        "a": base, "part": base[:3], "folded": base.reshape(2, 3), "strided": base[::2],
        "bits": base.view(torch.int32), "next": base[3:],
    }  # fmt: skip
    assert tied(views) == {}
    assert tied({"a": torch.zeros(0), "b": torch.zeros(0)}) == {}
    assert tied({"a": torch.zeros(3), "b": torch.zeros(3)}) == {}
    assert tied({"b": base[:3], "a": base[:3]}) == {"b": "a"}


def test_another_tie_than_the_one_that_was_written_is_damage(tmp_path: Path) -> None:
    state = tied_state()
    save(tmp_path / "x", state, "checkpoint")
    content = json.loads(read_header(tmp_path / "x")["__metadata__"]["taskvec"])
    for ties in ({}, {"head": "embedding"}, {"head": "copy", "last": "embedding"}):
        other = {name: value for name, value in content.items() if name != headers.SEAL}
        other["tied"] = ties
        text = headers.canonical({**other, headers.SEAL: headers.seal(other)})
        stored = {name: state[name].clone() for name in ("embedding", "copy")}
        save_file(stored, tmp_path / "y", metadata={"taskvec": text})
        assert "damaged: its tensors" in refused(
            tmp_path / "z", (tmp_path / "y").read_bytes(), "checkpoint"
        )


@pytest.mark.parametrize("ties", [{"head": "nobody"}, {"a/b": "w"}, ["head"], "head", {"head": 3}])
def test_ties_that_lead_nowhere_are_refused(tmp_path: Path, ties: Any) -> None:
    content = {"kind": "vector", "fingerprint": "0" * 64, "tied": ties}
    text = headers.canonical({**content, headers.SEAL: headers.seal(content)})
    save_file({"w": torch.ones(2)}, tmp_path / "x", metadata={"taskvec": text})
    refused(tmp_path / "x", (tmp_path / "x").read_bytes())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_values_that_are_not_finite_are_neither_saved_nor_loaded(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    path = tmp_path / "x.safetensors"
    state = {"a": torch.ones(2), "b": torch.tensor([1.0, value, value]).to(dtype)}
    message = "'b' holds 2 NaN or infinite values of 3"
    with pytest.raises(IncompatibleWeights, match=message):
        save(path, state, "vector")
    assert list(tmp_path.iterdir()) == []
    save_file(state, path)
    with pytest.raises(IncompatibleWeights, match=message):
        read_tensors(path)


def test_large_finite_values_are_finite() -> None:
    check_finite("x", torch.full((4,), 3e38))
    check_finite("x", torch.full((4,), 1e300, dtype=torch.float64))
    check_finite("x", torch.zeros(0))
    check_finite("x", torch.tensor([True]))


def test_every_flipped_bit_of_a_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    good = written(path, origin="0" * 8, ratio=0.5)
    for place in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[place] ^= 1 << bit
            path.write_bytes(bad)
            with pytest.raises(IncompatibleWeights):
                load(path, "vector")


def test_a_byte_that_changes_either_is_found_or_means_the_same(tmp_path: Path) -> None:
    path, rng = tmp_path / "x.safetensors", random.Random(1)
    good = written(path, origin="0" * 8)
    expected = load(path, "vector")
    for _ in range(1500):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] = rng.randrange(256)
        path.write_bytes(bad)
        try:
            loaded = load(path, "vector")
        except IncompatibleWeights:
            continue
        assert same(loaded.tensors, expected.tensors)
        assert loaded.metadata == expected.metadata


def test_truth_is_zero_or_one(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save(path, {"flag": torch.tensor([True, False])}, "vector")
    assert "'flag' holds bytes that are neither" in refused(path, path.read_bytes()[:-2] + b"\2\0")


def test_every_truncation_is_found(tmp_path: Path) -> None:
    good = written(tmp_path / "x")
    for length in range(len(good)):
        refused(tmp_path / "x", good[:length])
    refused(tmp_path / "x", good + b"\0")


def test_exchanged_tensors_are_found(tmp_path: Path) -> None:
    path = tmp_path / "x"
    good = written(path)
    save(path, {**small(), "w": small()["w"] + 1}, "vector")
    length = 8 + struct.unpack("<Q", good[:8])[0]
    assert "damaged: its tensors" in refused(path, good[:length] + path.read_bytes()[length:])


def test_metadata_are_checked_like_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x"
    good = written(path, origin="abc")
    assert "damaged: its metadata" in refused(path, good.replace(b"abc", b"abd"))
    for text in ("", "3", "[]", "{", "null", '{"kind":"vector"}', '{"a":1,"a":1}', '{"a":NaN}'):
        save_file(small(), path, metadata={"taskvec": text})
        assert "damaged: its metadata" in refused(path, path.read_bytes())


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "x")
    with pytest.raises(IncompatibleWeights, match="holds a 'vector', expected a 'checkpoint'"):
        load(tmp_path / "x", "checkpoint")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_plain_checkpoint_is_no_file_of_ours(tmp_path: Path, metadata: Any) -> None:
    save_file(small(), tmp_path / "x", metadata=metadata)
    with pytest.raises(IncompatibleWeights, match="was not written by taskvec"):
        load(tmp_path / "x", "vector")
    assert same(read_tensors(tmp_path / "x"), small())


def test_a_missing_file_is_a_missing_artifact(tmp_path: Path) -> None:
    for read in (lambda: load(tmp_path / "no", "vector"), lambda: read_tensors(tmp_path / "no")):
        with pytest.raises(MissingArtifact, match=r"no does not exist; `taskvec run`") as caught:
            read()
        assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut short"),
        (b"PK\x03\x04 a zip file of a pickle", "cut short"),
        (struct.pack("<Q", 2**63) + b"{}", "cut short"),
        (file_with(b"[]"), "no JSON object"),
        (file_with(b" {}"), "no JSON object"),
        (file_with(b"\xef\xbb\xbf{}"), "no JSON object"),
        (file_with(b"{x}"), "malformed header"),
        (file_with(b'{"\xff": 1}'), "malformed header"),
        (file_with(b'{"a":' + b"[" * 100_000), "malformed header"),
        (file_with(b'{"x": {"dtype": 1, "dtype": 2}}'), "a key appears twice"),
        (file_with(b'{"x": 1, "x": 2}'), "a key appears twice"),
        (file_with({}), "0 tensors"),
        (file_with({"__metadata__": {"a": "b"}}), "0 tensors"),
        (file_with({f"t{i}": entry() for i in range(MAX_TENSORS + 1)}), "50001 tensors"),
        (file_with({"__metadata__": {"a": 1}, "x": entry()}), "strings to strings"),
        (file_with({"__metadata__": [], "x": entry()}), "strings to strings"),
        (file_with({"x": 3}), "'x' has a malformed entry"),
        (file_with({"x": {**entry(), "extra": 1}}), "'x' has a malformed entry"),
        (file_with({"x": {"dtype": "F32"}}), "'x' has a malformed entry"),
        (file_with({"x": {**entry(), "shape": "1"}}), "'x' has a malformed shape"),
        (file_with({"x": entry([1] * 9)}), "'x' has 9 axes"),
        (file_with({"a b": entry()}), "tensor name 'a b'"),
        (file_with({"": entry()}), "tensor name ''"),
        (file_with({"a\0": entry()}), "tensor name"),
        (file_with({"x\n": entry()}), "tensor name"),
        (file_with({"x" * 257: entry()}), "tensor name 'x"),
        (file_with({"gewicht_ä": entry()}), "tensor name"),
    ],
    ids=range(27),
)
def test_malformed_headers_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    assert message in refused(tmp_path / "x", data)
    with pytest.raises(IncompatibleWeights):
        read_header(tmp_path / "x")


@pytest.mark.parametrize(
    "header",
    [
        {"x": entry((2,))},
        {"x": entry((-1,))},
        {"x": entry((2**62, 2**62))},
        {"x": entry(end=8)},
        {"x": {**entry(), "dtype": "F99"}},
        {"x": {**entry(), "data_offsets": [4, 0]}},
        {"x": entry(), "y": entry()},
    ],
)
def test_tensors_that_do_not_fill_the_file_are_refused(tmp_path: Path, header: Any) -> None:
    path = tmp_path / "x"
    path.write_bytes(file_with(header, b"\0" * 4))
    with pytest.raises(IncompatibleWeights, match="cannot be read"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "0 tensors"),
        ({"a b": torch.ones(1)}, "tensor name 'a b'"),
        ({"__metadata__": torch.ones(1)}, "tensor name '__metadata__'"),
        ({"x": torch.ones([1] * 9)}, "'x' has 9 axes"),
    ],
    ids=["empty", "name", "metadata", "rank"],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, state: Any, message: str) -> None:
    with pytest.raises(IncompatibleWeights, match=message):
        save(tmp_path / "x", state, "vector")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("step", ["chmod", "replace"])
def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "x.safetensors"
    old = written(path)

    def interrupt(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, step, interrupt)
        with pytest.raises(OSError, match="no space"):
            save(path, {"w": torch.zeros(3)}, "vector")
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_metadata_that_json_cannot_hold_leave_the_old_file(tmp_path: Path) -> None:
    old = written(tmp_path / "x")
    for value in (math.nan, {1, 2}):
        with pytest.raises((ValueError, TypeError)):
            save(tmp_path / "x", small(), "vector", value=value)
    assert (tmp_path / "x").read_bytes() == old


def test_files_are_readable_whatever_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o077)
    try:
        written(tmp_path / "x")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644


def test_saving_over_a_read_only_hard_link_leaves_the_other_link(tmp_path: Path) -> None:
    cached, path = tmp_path / "cached", tmp_path / "x"
    old = written(cached)
    path.hardlink_to(cached)
    cached.chmod(0o444)
    save(path, {"w": torch.zeros(3)}, "vector")
    assert cached.read_bytes() == old
    assert stat.S_IMODE(cached.stat().st_mode) == 0o444
    assert load(path, "vector").tensors["w"].tolist() == [0.0] * 3


def test_saving_over_a_symbolic_link_leaves_its_target(tmp_path: Path) -> None:
    target, path = tmp_path / "target", tmp_path / "x"
    target.write_text("precious")
    path.symlink_to(target)
    written(path)
    assert target.read_text() == "precious"
    assert not path.is_symlink()


def test_loaded_tensors_do_not_change_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save(path, {"w": torch.ones(1000)}, "vector")
    loaded = load(path, "vector")
    with path.open("r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(bytes(4000))
    assert bool((loaded.tensors["w"] == 1).all())


def test_weights_know_their_fingerprint() -> None:
    assert Weights({}, {"fingerprint": "abc"}).fingerprint == "abc"
