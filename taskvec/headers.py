"""The header of a safetensors file, and the fingerprint that identifies tensors; without torch.

Files of taskvec carry one metadata key, ``taskvec``, that holds canonical JSON (with several keys
safetensors files are not byte-deterministic): the kind of file, the fingerprint of its tensors,
whatever the writer adds, such as the origin, and a seal over all of these. A fingerprint identifies
tensors, not files: SHA-256 over the names, dtypes, shapes and digests of the tensors, in the order
of the names. The digests are of fixed pieces of 4 MiB, so that several threads can share the work.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskvec.errors import IncompatibleWeights, MissingArtifact

METADATA_KEY = "taskvec"
SEAL = "seal"
TIED = "tied"
PIECE = 4 << 20  # bytes
MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 50_000
MAX_RANK = 8
TENSOR_NAME = re.compile(r"[A-Za-z0-9_./:-]{1,256}")
BYTES = {
    "U64": 8, "I64": 8, "F64": 8, "F32": 4, "U32": 4, "I32": 4, "BF16": 2, "F16": 2, "U16": 2,
    "I16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
DTYPES = tuple(BYTES)


@dataclass(frozen=True)
class Slot:
    """A tensor of a file: its dtype in the format's words, its shape and its range of bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def fingerprint(tensors: Iterable[tuple[str, str, tuple[int, ...], bytes]]) -> str:
    """Return the SHA-256 (hex) of tensors given as (name, dtype, shape, digests of the pieces).

    A tensor that is another one under a second name is given as (name, "= other", (), b"").
    """
    digest = hashlib.sha256()
    for name, dtype, shape, pieces in sorted(tensors):
        digest.update(f"{name} {dtype} {shape}\n".encode())
        digest.update(pieces)
    return digest.hexdigest()


def piece_digests(data: Any) -> bytes:
    """Return the SHA-256 digests of the pieces of a buffer, one after the other."""
    view = memoryview(data)
    return b"".join(
        hashlib.sha256(view[start : start + PIECE]).digest() for start in range(0, len(view), PIECE)
    )


def layout(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[dict[str, Slot], int]:
    """Return where tensors, given as (dtype, shape), lie in the data of a file, and its length.

    Wide dtypes come first, then the order of the names, as the safetensors library writes them.
    """
    slots, start = {}, 0
    for name in sorted(tensors, key=lambda name: (DTYPES.index(tensors[name][0]), name)):
        dtype, shape = tensors[name]
        size = math.prod(shape, start=BYTES[dtype])
        slots[name] = Slot(dtype, shape, start, start + size)
        start += size
    return slots, start


def header_bytes(slots: Mapping[str, Slot], content: Mapping[str, Any]) -> bytes:
    """Return the header of a file: its length, then JSON with the sealed content, padded to 8."""
    text = canonical({**content, SEAL: seal(content)})
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: text}}
    for name, slot in slots.items():
        header[name] = {
            "dtype": slot.dtype, "shape": slot.shape, "data_offsets": (slot.start, slot.stop)
        }  # fmt: skip
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def read_slots(path: Path) -> tuple[dict[str, Slot], dict[str, str], int]:
    """Return the tensors of a file, its raw metadata, and where its data start.

    Raises:
        MissingArtifact, IncompatibleWeights: see `read_header`; also if the ranges of bytes do not
            fit the shapes, overlap or leave the file.
    """
    header = read_header(path)
    start = 8 + _header_length(path)
    data = path.stat().st_size - start
    names = header.keys() - {"__metadata__"}
    slots = {name: _slot(name, header[name], data, path) for name in sorted(names)}
    reached = 0
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].start, item[1].stop)):
        if slot.start != reached:
            raise IncompatibleWeights(f"{path}: tensor {name!r} overlaps another or leaves a hole")
        reached = slot.stop
    if reached != data:
        raise IncompatibleWeights(f"{path} is cut short, or bytes follow its last tensor")
    return slots, dict(header.get("__metadata__", {})), start


def read_header(path: Path) -> dict[str, Any]:
    """Return the checked JSON header of a safetensors file without reading its tensors.

    Stricter than the format: names, ranks and the number of tensors are bounded, and duplicates
    and unknown fields, which the reader would accept in silence, are refused.
    """
    length = _header_length(path)
    with path.open("rb") as file:
        file.seek(8)
        raw = file.read(length)
    if not raw.startswith(b"{"):
        raise IncompatibleWeights(f"{path} is no safetensors file: its header is no JSON object")
    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise IncompatibleWeights(f"{path}: malformed header: {error}") from None
    _check_header(header, path)
    return dict(header)


def read_metadata(header: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return what taskvec wrote into a header.

    Raises:
        IncompatibleWeights: taskvec did not write the file, or its metadata are damaged.
    """
    text = header.get("__metadata__", {}).get(METADATA_KEY)
    if text is None:
        raise IncompatibleWeights(
            f"{path} was not written by taskvec: it has no {METADATA_KEY!r} metadata; "
            "name a plain checkpoint as model.pretrained in params.yaml instead"
        )
    try:
        metadata = json.loads(text, object_pairs_hook=unique)
        intact = isinstance(metadata, dict) and metadata.pop(SEAL, None) == seal(metadata)
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise IncompatibleWeights(
            f"{path} is damaged: its metadata are not those that were written; "
            "delete the file and run `taskvec run`"
        )
    return dict(metadata)


def read_ties(metadata: Mapping[str, Any], names: Collection[str], path: Path) -> dict[str, str]:
    """Return {second name: name in the file} of the tensors that are tied.

    Raises:
        IncompatibleWeights: a tie leads nowhere, or its second name is in the file too.
    """
    twins = metadata.get(TIED, {})
    if not isinstance(twins, dict) or not all(
        isinstance(twin, str) and twin in names and name not in names
        for name, twin in twins.items()
    ):
        raise IncompatibleWeights(f"{path} is damaged: it ties tensors that it does not hold")
    return twins


def canonical(content: Mapping[str, Any]) -> str:
    """Return JSON that is the same for equal content."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def seal(content: Mapping[str, Any]) -> str:
    """Return a digest that finds damage in the metadata, as the fingerprint does in the tensors."""
    return hashlib.sha256(canonical(content).encode()).hexdigest()[:16]


def check_count(count: int, path: Path) -> None:
    """Raise IncompatibleWeights unless a file may hold so many tensors."""
    if not 1 <= count <= MAX_TENSORS:
        raise IncompatibleWeights(f"{path}: {count} tensors; expected 1 to {MAX_TENSORS}")


def check_rank(name: str, rank: int, path: Path) -> None:
    """Raise IncompatibleWeights unless a tensor may have so many axes."""
    if rank > MAX_RANK:
        raise IncompatibleWeights(
            f"{path}: tensor {name!r} has {rank} axes; expected at most {MAX_RANK}"
        )


def check_name(name: str, path: Path) -> None:
    """Raise IncompatibleWeights unless a tensor may be called so."""
    if not TENSOR_NAME.fullmatch(name) or name == "__metadata__":
        raise IncompatibleWeights(
            f"{path}: tensor name {name[:80]!r}; expected 1 to 256 of A-Z a-z 0-9 _ . - / :"
        )


def _header_length(path: Path) -> int:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
    except FileNotFoundError:
        raise MissingArtifact(f"{path} does not exist; `taskvec run` makes it") from None
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise IncompatibleWeights(f"{path} is no safetensors file, or it is cut short")
    return int(length)


def _check_header(header: dict[str, Any], path: Path) -> None:
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise IncompatibleWeights(f"{path}: the metadata must map strings to strings")
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    check_count(len(tensors), path)
    for name, entry in tensors.items():
        check_name(name, path)
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise IncompatibleWeights(f"{path}: tensor {name!r} has a malformed entry")
        if not isinstance(entry["shape"], list):
            raise IncompatibleWeights(f"{path}: tensor {name!r} has a malformed shape")
        check_rank(name, len(entry["shape"]), path)


def _slot(name: str, entry: Mapping[str, Any], data: int, path: Path) -> Slot:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise IncompatibleWeights(
            f"{path}: tensor {name!r} has the dtype {dtype!r}; expected one of {', '.join(BYTES)}"
        )
    whole = isinstance(offsets, list) and len(offsets) == 2
    numbers = [*shape, *offsets] if whole else [-1]
    if not all(type(number) is int and 0 <= number <= 2**63 for number in numbers):
        raise IncompatibleWeights(f"{path}: tensor {name!r} has a malformed shape or range")
    size = math.prod(shape, start=BYTES[dtype])
    if offsets[1] - offsets[0] != size or offsets[1] > data:
        raise IncompatibleWeights(
            f"{path}: tensor {name!r} of {size} bytes has the range {offsets[0]} to {offsets[1]} "
            f"in {data} bytes of data; the file is damaged or cut short"
        )
    return Slot(dtype, tuple(shape), *offsets)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the mapping that JSON means by pairs, for ``object_pairs_hook``.

    Raises:
        ValueError: a key appears twice.
    """
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result
