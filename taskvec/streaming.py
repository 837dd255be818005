"""Extract, combine and apply, file to file: one pass over memory-mapped inputs, bounded memory.

An output is a list of tensors that are copied from an input or computed by a `Lazy` vector. Workers
take ranges of the output, compute them block by block while the blocks lie in the cache, write them
to their place and digest them on the way. The file gets its name when it is complete.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from taskvec import headers
from taskvec.atomic import sync
from taskvec.errors import IncompatibleWeights, InvalidInput
from taskvec.lazy import BLOCK, Array, Lazy, blocks, parallel, units
from taskvec.mapped import FLOATS, Bytes, Mapped, Stored, check_finite, difference

FLUSH = 64 << 20  # bytes
MARK = "0" * 64  # stands for the fingerprint until it is known
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Computed:
    """A tensor to compute: ``base + vector``, or the vector alone, rounded to a dtype once."""

    vector: Lazy
    name: str
    dtype: str = "F32"
    base: Stored | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return self.vector.shapes[self.name]


Output = Mapping[str, Stored | Computed]


def extract(
    pretrained: Mapped,
    finetuned: Mapped,
    path: Path,
    /,
    *,
    names: list[str] | None = None,
    progress: Progress | None = None,
    **metadata: Any,
) -> str:
    """Write the task vector ``tau = theta_ft - theta_pre`` in float32; return its fingerprint.

    Args:
        pretrained: theta_pre.
        finetuned: theta_ft, of the same names, shapes and dtypes.
        path: the file to write.
        names: the edited parameters; default: all floating ones.
        progress: is told the bytes done and the bytes in all.
        metadata: what else to record.

    Raises:
        IncompatibleWeights: see `taskvec.mapped.difference`.

    Source: arXiv:2212.04089, section 2.
    """
    vector = difference(pretrained, finetuned, names)
    record = {"origin": pretrained.fingerprint, "finetuned": finetuned.fingerprint}
    return write_vectors(path, {"": vector}, kind="vector", progress=progress, **record | metadata)


def write_vectors(
    path: Path, vectors: Mapping[str, Lazy], *, kind: str, progress: Progress | None = None,
    **metadata: Any,
) -> str:  # fmt: skip
    """Write vectors in float32 to one file, each under its prefix; return the fingerprint."""
    output = {
        prefix + name: Computed(vector, name)
        for prefix, vector in vectors.items()
        for name in vector.shapes
    }
    return write(path, output, kind=kind, metadata=metadata, progress=progress)


def apply(
    pretrained: Mapped,
    edit: Lazy | None,
    path: Path,
    /,
    *,
    progress: Progress | None = None,
    **metadata: Any,
) -> str:
    """Write ``theta_pre + edit``, each tensor in its own dtype; return the fingerprint.

    Tensors that the edit does not name are copied byte for byte; without an edit all of them.

    Raises:
        IncompatibleWeights: the edit names a tensor that is not there, has another shape or is
            not floating, or a value leaves the range of its dtype.

    Source: arXiv:2212.04089, section 2.
    """
    output: dict[str, Stored | Computed] = dict(pretrained.tensors)
    for name, shape in edit.shapes.items() if edit else ():
        base = pretrained.tensors.get(name)
        if base is None or base.shape != shape or name not in pretrained.floating:
            found = "missing" if base is None else f"{base.dtype} {base.shape}"
            raise IncompatibleWeights(
                f"the edit changes {name!r} of shape {shape}, which in {pretrained.label} is "
                f"{found}; use vectors of this checkpoint"
            )
        output[name] = Computed(edit, name, base.dtype, base)  # type: ignore[arg-type]
    record = {"origin": pretrained.fingerprint, **metadata}
    if pretrained.tied:
        record[headers.TIED] = dict(pretrained.tied)
    return write(path, output, kind="checkpoint", metadata=record, progress=progress)


def write(
    path: Path,
    output: Output,
    *,
    kind: str,
    metadata: Mapping[str, Any],
    block: int = BLOCK,
    progress: Progress | None = None,
) -> str:
    """Write tensors so that ``path`` holds the old file or the whole new one; never a part.

    The bytes depend neither on ``block`` nor on the number of workers.

    Args:
        path: the file; its directory is made if needed.
        output: name -> a tensor to copy, or one to compute.
        kind: what the file is, as in `taskvec.checkpoints.save`.
        metadata: what to record; "tied" maps second names to names in ``output``.
        block: elements computed at a time.
        progress: is told the bytes done and the bytes in all.

    Returns:
        The fingerprint of the tensors.

    Raises:
        InvalidInput: the disk has not the room.
        IncompatibleWeights: a value is NaN or infinite, or a name is malformed.
    """
    _check(path, output)
    slots, length = headers.layout({name: (t.dtype, t.shape) for name, t in output.items()})
    content = {"kind": kind, "fingerprint": MARK, **metadata}
    start = len(headers.header_bytes(slots, content))
    check_room(path, start + length)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as directory:
        temporary = Path(directory) / path.name
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.posix_fallocate(descriptor, 0, start + length)
            digests = _fill(descriptor, start, output, slots, block, progress)
            entries = [(n, slots[n].dtype, slots[n].shape, digests[n]) for n in slots]
            twins = metadata.get(headers.TIED, {}).items()
            ties = [(name, f"= {twin}", (), b"") for name, twin in twins]
            mark = headers.fingerprint([*entries, *ties])
            _write_at(descriptor, headers.header_bytes(slots, {**content, "fingerprint": mark}), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.chmod(0o644)
        temporary.replace(path)
    sync(path.parent)
    return mark


def check_room(path: Path, needed: int) -> None:
    """Raise InvalidInput unless the disk of ``path`` has ``needed`` bytes and 1 % to spare."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed * 1.01:
        raise InvalidInput(
            f"{path} needs {needed / 1e9:.2f} GB, {parent} has {free / 1e9:.2f} GB free; "
            "make room or write elsewhere"
        )


def _check(path: Path, output: Output) -> None:
    headers.check_count(len(output), path)
    for name, tensor in output.items():
        headers.check_name(name, path)
        headers.check_rank(name, len(tensor.shape), path)


def _fill(
    descriptor: int,
    start: int,
    output: Output,
    slots: Mapping[str, headers.Slot],
    block: int,
    progress: Progress | None,
) -> dict[str, bytes]:
    """Write all tensors to their places; return the digests of their pieces."""
    work = [
        (name, *bounds)
        for name in slots
        for bounds in _ranges(output[name], headers.BYTES[slots[name].dtype])
    ]

    def fill(unit: tuple[str, int, int]) -> bytes:
        name, first, last = unit
        width = headers.BYTES[slots[name].dtype]
        place = start + slots[name].start + first * width
        digests = _Digests()
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
            for data in _data(output[name], name, first, last, block):
                _write_at(descriptor, data.data, place)
                digests.update(data)
                place += len(data)
        return digests.close()

    digests = dict.fromkeys(slots, b"")
    done, kept, total = 0, 0, sum(slot.stop - slot.start for slot in slots.values())
    for (name, first, last), found in zip(work, parallel(fill, work), strict=True):
        digests[name] += found
        done += (last - first) * headers.BYTES[slots[name].dtype]
        if done - kept >= FLUSH:
            os.fdatasync(descriptor)  # while the workers go on
            kept = done
        if progress:
            progress(done, total)
    return digests


def _ranges(tensor: Stored | Computed, width: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of elements that workers take: whole pieces, or whole tensors."""
    step = headers.PIECE // width
    if isinstance(tensor, Computed):
        yield from (unit[1:] for unit in units([tensor.vector], tensor.name, step))
    else:
        size = len(tensor.data) // width
        yield from ((first, min(first + step, size)) for first in range(0, size, step))


def _data(
    tensor: Stored | Computed, name: str, first: int, last: int, block: int
) -> Iterator[Bytes]:
    """Yield the bytes of a range of elements."""
    if isinstance(tensor, Stored):
        width = headers.BYTES[tensor.dtype]
        if tensor.dtype in FLOATS:
            check_finite(tensor.floats(first, last), name, "the input")
        yield tensor.data[first * width : last * width]
        return
    for place, (values,) in blocks([tensor.vector], tensor.name, first, last, block):
        if tensor.base is not None:
            values = tensor.base.floats(place, place + len(values)) + values
        check_finite(values, name, "the result")
        yield _encoded(values, tensor.dtype, name)


def _encoded(values: Array, dtype: str, name: str) -> Bytes:
    """Return float32 values rounded to a dtype (to the nearest, ties to even), as bytes."""
    if dtype == "F32":
        return np.ascontiguousarray(values).view(np.uint8)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        overflow = ~np.isfinite(half).all()
        data = half.view(np.uint8)
    else:
        bits = np.ascontiguousarray(values).view(np.uint32)
        upper = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        overflow = ((upper & 0x7F80) == 0x7F80).any()
        data = upper.view(np.uint8)
    if overflow:
        raise IncompatibleWeights(
            f"tensor {name!r} of the result leaves the range of {dtype}; use smaller coefficients, "
            "or a float32 checkpoint"
        )
    return data


def _write_at(descriptor: int, data: Any, place: int) -> None:
    view = memoryview(data)
    while len(view):
        written = os.pwrite(descriptor, view, place)
        view, place = view[written:], place + written


class _Digests:
    """The SHA-256 digests of the pieces of a stream of bytes that starts with a piece."""

    def __init__(self) -> None:
        self._found = b""
        self._current = hashlib.sha256()
        self._left = headers.PIECE

    def update(self, data: Bytes) -> None:
        """Take the next bytes."""
        while len(data):
            part = data[: self._left]
            self._current.update(part.data)
            self._left -= len(part)
            if not self._left:
                self._next()
            data = data[len(part) :]

    def close(self) -> bytes:
        """Return all digests, one after the other."""
        if self._left < headers.PIECE:
            self._next()
        return self._found

    def _next(self) -> None:
        self._found += self._current.digest()
        self._current = hashlib.sha256()
        self._left = headers.PIECE
