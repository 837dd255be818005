"""Headers: what is written is what others read, and damage is found before it is used."""

import hashlib
import json
import math
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from taskvec import checkpoints, headers
from taskvec.errors import IncompatibleWeights, MissingArtifact
from taskvec.headers import (
    BYTES,
    PIECE,
    Slot,
    canonical,
    header_bytes,
    layout,
    piece_digests,
    read_header,
    read_metadata,
    read_slots,
    seal,
)

NAMES = st.from_regex(r"[A-Za-z0-9_./:-]{1,20}", fullmatch=True).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
LAYOUTS = st.dictionaries(
    NAMES, st.tuples(st.sampled_from(sorted(BYTES)), SHAPES), min_size=1, max_size=6
)
CONTENT = st.dictionaries(
    st.text(max_size=5).filter(lambda key: key != headers.SEAL),
    st.recursive(
        st.one_of(
            st.none(), st.booleans(), st.integers(), st.text(),
            st.floats(allow_nan=False, allow_infinity=False),
        ),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=4,
    ),
)  # fmt: skip


def file_with(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(IncompatibleWeights) as caught:
        read_slots(path)
    assert caught.value.exit_code == 3
    assert str(path) in str(caught.value)
    return str(caught.value)


# Writing and reading


@settings(deadline=None)
@given(LAYOUTS, CONTENT)
def test_what_is_laid_out_is_read_again_by_us_and_by_safetensors(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    content: dict[str, Any],
) -> None:
    path = tmp_path_factory.mktemp("layout") / "x"
    slots, length = layout(tensors)
    head = header_bytes(slots, content)
    assert len(head) % 8 == 0
    data = bytes(length)
    path.write_bytes(head + data)
    found, raw, start = read_slots(path)
    assert found == slots
    assert start == len(head)
    assert {name: (slot.dtype, slot.shape) for name, slot in found.items()} == dict(tensors)
    assert read_metadata({"__metadata__": raw}, path) == content
    assert list(raw) == [headers.METADATA_KEY]
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == sorted(tensors)
        for name, (dtype, shape) in tensors.items():
            assert file.get_slice(name).get_dtype() == dtype
            assert tuple(file.get_slice(name).get_shape()) == shape


@settings(deadline=None, max_examples=50)
@given(LAYOUTS)
def test_the_layout_is_that_of_safetensors(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
) -> None:
    path = tmp_path_factory.mktemp("layout") / "x"
    dtypes = {code: dtype for dtype, code in checkpoints.CODES.items()}
    state = {name: torch.zeros(shape).to(dtypes[code]) for name, (code, shape) in tensors.items()}
    checkpoints.save(path, state, "checkpoint", note=1)
    slots, length = layout(tensors)
    assert read_slots(path)[0] == slots
    content = {"kind": "checkpoint", "fingerprint": checkpoints.fingerprint(state), "note": 1}
    assert path.read_bytes() == header_bytes(slots, content) + bytes(length)


def test_tensors_lie_without_holes_the_wide_ones_first() -> None:
    slots, length = layout({"b": ("F32", (2, 3)), "a": ("F16", (3,)), "c": ("F64", ()),
                            "d": ("BOOL", (0, 7)), "a2": ("F32", ())})  # fmt: skip
    assert slots == {
        "c": Slot("F64", (), 0, 8),
        "a2": Slot("F32", (), 8, 12),
        "b": Slot("F32", (2, 3), 12, 36),
        "a": Slot("F16", (3,), 36, 42),
        "d": Slot("BOOL", (0, 7), 42, 42),
    }
    assert list(slots) == ["c", "a2", "b", "a", "d"]
    assert length == 42


def test_every_dtype_has_the_width_of_torch() -> None:
    widths = {code: torch.zeros(1, dtype=dtype).nbytes for dtype, code in checkpoints.CODES.items()}
    assert dict(BYTES) == widths


def test_a_file_with_the_shapes_of_a_scalar_and_of_nothing_is_read(tmp_path: Path) -> None:
    header = {
        "scalar": entry(shape=[], offsets=[0, 4]),
        "empty": entry(shape=[2, 0], offsets=[4, 4]),
        "empty2": entry(shape=[0], offsets=[0, 0]),
    }
    (tmp_path / "x").write_bytes(file_with(header, bytes(4)))
    slots, raw, _ = read_slots(tmp_path / "x")
    assert slots["scalar"] == Slot("F32", (), 0, 4)
    assert slots["empty"] == Slot("F32", (2, 0), 4, 4)
    assert raw == {}


# Fingerprints


def test_a_fingerprint_by_hand() -> None:
    expected = hashlib.sha256(b"a = b ()\n" + b"b F32 (2, 3)\n" + b"D" * 32 + b"c I8 ()\n" + b"E")
    tensors = [("c", "I8", (), b"E"), ("b", "F32", (2, 3), b"D" * 32), ("a", "= b", (), b"")]
    assert headers.fingerprint(tensors) == expected.hexdigest()
    assert headers.fingerprint(reversed(tensors)) == expected.hexdigest()


@given(st.integers(0, 20), st.integers(1, 8))
def test_pieces_are_digested_one_by_one(length: int, piece: int) -> None:
    data = bytes(range(length))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(headers, "PIECE", piece)
        found = piece_digests(data)
    parts = [data[start : start + piece] for start in range(0, length, piece)]
    assert found == b"".join(hashlib.sha256(part).digest() for part in parts)
    assert len(found) == 32 * math.ceil(length / piece)


def test_a_piece_has_4_mib() -> None:
    data = bytes(PIECE + 1)
    first, rest = hashlib.sha256(bytes(4 << 20)), hashlib.sha256(b"\0")
    assert piece_digests(data) == first.digest() + rest.digest()
    assert piece_digests(b"") == b""


# Metadata


@given(CONTENT)
def test_canonical_text_does_not_depend_on_the_order(content: dict[str, Any]) -> None:
    assert canonical(content) == canonical(dict(reversed(content.items())))
    assert json.loads(canonical(content)) == content
    assert canonical(content).isascii()
    assert len(seal(content)) == 16


def test_a_seal_is_that_of_the_content() -> None:
    assert seal({"b": 1, "a": "é"}) == hashlib.sha256(b'{"a":"\\u00e9","b":1}').hexdigest()[:16]
    assert seal({"a": 1}) != seal({"a": 2}) != seal({"a": 1.5})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_metadata_hold_no_numbers_that_json_lacks(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        header_bytes({}, {"value": value})


@pytest.mark.parametrize(
    "text",
    ["", "3", "null", "[]", "{", '{"a": 1}', '{"a": 1, "a": 1}', '{"a": NaN}', "[" * 100_000,
     '{"seal": "0000000000000000"}', '{"seal": 3}', '{"kind": "\\ud800", "seal": "x"}'],
    ids=range(12),
)  # fmt: skip
def test_metadata_that_were_not_written_so_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleWeights, match="damaged: its metadata"):
        read_metadata({"__metadata__": {"taskvec": text}}, tmp_path)


@pytest.mark.parametrize("header", [{}, {"__metadata__": {}}, {"__metadata__": {"format": "pt"}}])
def test_files_of_others_have_no_metadata_of_ours(header: Any, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleWeights, match="was not written by taskvec"):
        read_metadata(header, tmp_path)


# Damage


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"x": entry("F99")}, "'x' has the dtype 'F99'; expected one of"),
        ({"x": entry(3)}, "'x' has the dtype 3"),
        ({"x": entry(["F32"])}, "'x' has the dtype ['F32']"),
        ({"x": entry({})}, "'x' has the dtype {}"),
        ({"x": entry(None)}, "'x' has the dtype None"),
        ({"x": entry(shape=3)}, "'x' has a malformed shape"),
        ({"x": entry(shape=None)}, "'x' has a malformed shape"),
        ({"x": entry(shape=[1.0])}, "'x' has a malformed shape or range"),
        ({"x": entry(shape=[True])}, "'x' has a malformed shape or range"),
        ({"x": entry(shape=["1"])}, "'x' has a malformed shape or range"),
        ({"x": entry(shape=[[1]])}, "'x' has a malformed shape or range"),
        ({"x": entry(shape=[-1, -1])}, "'x' has a malformed shape or range"),
        ({"x": entry(shape=[10**30])}, "'x' has a malformed shape or range"),
        ({"x": entry(shape=[1] * 9)}, "'x' has 9 axes"),
        ({"x": entry(offsets=[0])}, "'x' has a malformed shape or range"),
        ({"x": entry(offsets=[0, 4, 8])}, "'x' has a malformed shape or range"),
        ({"x": entry(offsets={"0": 4})}, "'x' has a malformed shape or range"),
        ({"x": entry(offsets=[-4, 0])}, "'x' has a malformed shape or range"),
        ({"x": entry(offsets=[0, 4.0])}, "'x' has a malformed shape or range"),
        ({"x": entry(offsets=[4, 0])}, "of 4 bytes has the range 4 to 0"),
        ({"x": entry(offsets=[0, 2])}, "of 4 bytes has the range 0 to 2 in 4 bytes"),
        ({"x": entry(shape=[2], offsets=[0, 8])}, "has the range 0 to 8 in 4 bytes of data"),
        ({"x": entry(shape=[2**62] * 8)}, "bytes has the range 0 to 4"),
        ({"x": entry(), "y": entry()}, "'y' overlaps another"),
        ({"x": entry(), "y": entry("F16", offsets=[2, 4])}, "'y' overlaps another"),
        ({"x": entry("F16", offsets=[2, 4])}, "'x' overlaps another or leaves a hole"),
        ({"x": entry("F16", offsets=[0, 2])}, "or bytes follow its last tensor"),
        ({"x": entry("F16", offsets=[0, 2]), "y": entry("I8", offsets=[3, 4])}, "'y' overlaps"),
        ({"x": {"dtype": "F32", "shape": [1]}}, "'x' has a malformed entry"),
        ({"x": {**entry(), "more": 1}}, "'x' has a malformed entry"),
        ({"x": [1]}, "'x' has a malformed entry"),
        ({}, "0 tensors"),
        ({"a b": entry()}, "tensor name 'a b'"),
        ({"x": entry(), "__metadata__": {"a": 1}}, "strings to strings"),
        ({"x": entry(), "__metadata__": "a"}, "strings to strings"),
    ],
    ids=range(35),
)
def test_headers_that_do_not_describe_the_file_are_refused(
    tmp_path: Path, header: Any, message: str
) -> None:
    assert message in refused(tmp_path / "x", file_with(header, bytes(4)))


def test_names_that_begin_with_underscores_are_names_like_any_other(tmp_path: Path) -> None:
    state = {"__x": torch.ones(2), "__metadata": torch.ones(1), "y": torch.zeros(3)}
    checkpoints.save(tmp_path / "x", state, "checkpoint")
    assert set(read_slots(tmp_path / "x")[0]) == set(state)
    data = file_with({"__x": [1], "y": entry()}, bytes(4))
    assert "'__x' has a malformed entry" in refused(tmp_path / "x", data)


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    for length in (0, 1, 3, 100, headers.MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1):
        assert "cut short" in refused(tmp_path / "x", struct.pack("<Q", length) + b"{}")
    for size in range(8):
        assert "cut short" in refused(tmp_path / "x", bytes(size))


def test_a_missing_file_is_a_missing_artifact(tmp_path: Path) -> None:
    for read in (read_slots, read_header):
        with pytest.raises(MissingArtifact, match="no does not exist"):
            read(tmp_path / "no")


def test_a_damaged_file_is_refused_or_describes_tensors_that_fit(tmp_path: Path) -> None:
    path, rng = tmp_path / "x", random.Random(0)
    state = {"w": torch.ones(2, 3), "b": torch.ones(3).half(), "n": torch.tensor(3)}
    checkpoints.save(path, state, "vector", origin="0" * 8)
    good = path.read_bytes()
    bits = [b'"', b"[", b"]", b"{", b"}", b",", b":", b"-", b"9", b"1e9", b"null", b"\xff", b""]
    accepted = 0
    for _ in range(800):
        bad = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(8, len(bad))
            bad[place : place + rng.randrange(3)] = rng.choice(bits)
        bad[:8] = struct.pack("<Q", struct.unpack("<Q", good[:8])[0] + len(bad) - len(good))
        path.write_bytes(bad)
        try:
            slots, _, start = read_slots(path)
        except IncompatibleWeights:
            continue
        accepted += 1
        assert start + sum(slot.stop - slot.start for slot in slots.values()) == len(bad)
        try:
            safe_open(path, framework="pt")
        except SafetensorError as error:
            pytest.fail(f"accepted what safetensors refuses: {error}")
    assert accepted > 20
