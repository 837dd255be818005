"""Weights on disk as they lie there: mapped into memory, read a block at a time.

`open_weights` takes what people have: a safetensors file, a directory of Hugging Face or open_clip
with one file or shards (``model.safetensors.index.json``), the index itself, or a PyTorch file with
a plain state dict, which is read with ``weights_only=True`` (see `taskvec.pickles`). Values of
float32, float16 and bfloat16 come out as float32.

One tensor under two names (tied) may lie in a file once under one of them or twice; `difference`
takes these for the same model.
"""

import json
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from taskvec import headers
from taskvec.errors import IncompatibleWeights, MissingArtifact
from taskvec.lazy import Array, Lazy, parallel

Bytes = npt.NDArray[np.uint8]

FLOATS = ("F32", "F16", "BF16")  # what a vector can be made of
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
CONTENTS = (
    "model",
    "open_clip_model",
    "open_clip_pytorch_model",
    "pytorch_model",
    "diffusion_pytorch_model",
)
INDEX = ".index.json"
ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class Stored:
    """A tensor on disk: its dtype in the words of safetensors, its shape and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: Bytes

    def floats(self, start: int, stop: int) -> Array:
        """Return elements as float32; a view where they are float32 already."""
        width = headers.BYTES[self.dtype]
        raw = self.data[start * width : stop * width]
        if self.dtype == "F32":
            return raw.view(np.float32)
        if self.dtype == "F16":
            return raw.view(np.float16).astype(np.float32)
        wide = raw.view(np.uint16).astype(np.uint32)  # bfloat16 is the upper half of float32
        return np.left_shift(wide, 16, out=wide).view(np.float32)


@dataclass(frozen=True)
class Mapped:
    """Weights on disk.

    Attributes:
        tensors: name -> tensor, sorted by name; a tensor with two names is here once.
        label: what messages call them.
        metadata: what taskvec wrote into the file; empty if another program wrote it.
        tied: {second name: name in ``tensors``}.
    """

    tensors: Mapping[str, Stored]
    label: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "tensors", {name: self.tensors[name] for name in sorted(self.tensors)}
        )

    @property
    def named(self) -> dict[str, Stored]:
        """All tensors under all their names."""
        twins = {name: self.tensors[twin] for name, twin in self.tied.items()}
        return {**self.tensors, **twins}

    @property
    def floating(self) -> list[str]:
        """The names of the tensors that a vector can be made of."""
        return [name for name, tensor in self.tensors.items() if tensor.dtype in FLOATS]

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the tensors; from the header if taskvec wrote the file."""
        return str(self.metadata.get("fingerprint") or self.measure())

    def measure(self) -> str:
        """Return the fingerprint of the bytes as they are now."""
        names = list(self.tensors)
        work = [
            self.tensors[name].data[start : start + headers.PIECE]
            for name in names
            for start in range(0, len(self.tensors[name].data), headers.PIECE)
        ]
        digests = parallel(headers.piece_digests, work)
        entries = []
        for name, tensor in self.tensors.items():
            pieces = -(-len(tensor.data) // headers.PIECE)
            found = b"".join(next(digests) for _ in range(pieces))
            entries.append((name, tensor.dtype, tensor.shape, found))
        twins = [(name, f"= {twin}", (), b"") for name, twin in self.tied.items()]
        return headers.fingerprint([*entries, *twins])


class StoredVector(Lazy):
    """A task vector on disk, or a part of a file: the tensors below a prefix."""

    def __init__(self, weights: Mapped, prefix: str = "") -> None:
        self._label = weights.label
        self._tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in weights.tensors.items()
            if name.startswith(prefix)
        }
        wrong = [name for name, tensor in self._tensors.items() if tensor.dtype not in FLOATS]
        if wrong:
            raise IncompatibleWeights(
                f"{weights.label}: {wrong[0]!r} is {self._tensors[wrong[0]].dtype}; "
                f"the tensors of a vector are {', '.join(FLOATS)}"
            )
        super().__init__({name: tensor.shape for name, tensor in self._tensors.items()})

    def block(self, name: str, start: int, stop: int) -> Array:
        """Return elements of the file.

        Raises:
            IncompatibleWeights: one of them is NaN or infinite.
        """
        values = self._tensors[name].floats(start, stop)
        check_finite(values, name, self._label)
        return values


class Difference(Lazy):
    """``theta_ft - theta_pre`` of two checkpoints on disk, taken in float32 (section 2)."""

    def __init__(self, pretrained: Mapped, finetuned: Mapped, names: Iterable[str]) -> None:
        self._pretrained, self._finetuned = pretrained, finetuned
        super().__init__({name: pretrained.tensors[name].shape for name in names})

    def block(self, name: str, start: int, stop: int) -> Array:
        """Return the difference of the same elements of both.

        Raises:
            IncompatibleWeights: one of them is NaN or infinite.
        """
        before = self._pretrained.tensors[name].floats(start, stop)
        after = self._finetuned.tensors[name].floats(start, stop)
        with np.errstate(invalid="ignore", over="ignore"):
            values = after - before
        if not _finite(values):
            check_finite(before, name, self._pretrained.label)
            check_finite(after, name, self._finetuned.label)
            check_finite(values, name, f"{self._finetuned.label} minus {self._pretrained.label}")
        return values


def difference(pretrained: Mapped, finetuned: Mapped, names: Iterable[str] | None = None) -> Lazy:
    """Return the task vector of a fine-tuned checkpoint, computed when it is read.

    Args:
        pretrained: theta_pre.
        finetuned: theta_ft; the same names, shapes and dtypes, but see `aligned`.
        names: the edited parameters; default: all of float32, float16 and bfloat16.

    Raises:
        IncompatibleWeights: names, shapes or dtypes differ, or a tensor that is not edited has
            changed: the vector would lose it.

    Source: arXiv:2212.04089, section 2.
    """
    finetuned = aligned(pretrained, finetuned)
    return Difference(pretrained, finetuned, _edited(pretrained, finetuned, names))


def aligned(pretrained: Mapped, finetuned: Mapped) -> Mapped:
    """Return fine-tuned weights under the names that the pre-trained ones are stored under.

    Programs store a tied tensor (an embedding that is the output layer too) once, under either
    name, or twice. A name that only one of them has is therefore no difference if its tensor is
    another tensor of the same file: the same memory, or a matrix of the same bytes.

    Raises:
        IncompatibleWeights: another name is in only one of them, or tensors that are tied in the
            pre-trained weights have become different.
    """
    before, after = pretrained.named, finetuned.named
    both = sorted(before.keys() & after.keys())
    missing = {name: _twins(name, before, both) for name in sorted(before.keys() - after.keys())}
    added = {name: _twins(name, after, both) for name in sorted(after.keys() - before.keys())}
    for here, names in ((pretrained, missing), (finetuned, added)):
        lone = [name for name, twins in names.items() if not twins]
        if lone:
            raise IncompatibleWeights(
                f"{pretrained.label} and {finetuned.label} do not have the same parameters: "
                f"{len(lone)} only in {here.label} (first: {lone[0]!r}); fine-tune both from one "
                "checkpoint"
            )
    for name, twins in missing.items():
        after[name] = after[twins[0]]
    for second, first in [*pretrained.tied.items(), *((n, t) for n in missing for t in missing[n])]:
        if not same_bytes(after[first], after[second]):
            raise IncompatibleWeights(
                f"{first!r} and {second!r} are one tensor in {pretrained.label} and two in "
                f"{finetuned.label}; store the first with two tensors, or tie the second"
            )
    tensors = {name: after[name] for name in pretrained.tensors}
    return Mapped(tensors, finetuned.label, finetuned.metadata)


def same_bytes(one: Stored, other: Stored) -> bool:
    """Return whether two tensors are the same in dtype, shape and every byte."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one is other or all(
        np.array_equal(
            one.data[start : start + headers.PIECE], other.data[start : start + headers.PIECE]
        )
        for start in range(0, len(one.data), headers.PIECE)
    )


def weights_as_vector(weights: Mapped) -> Lazy:
    """Return weights as a vector that starts from zero, for methods that merge whole models."""
    floating = {name: weights.tensors[name] for name in weights.floating}
    return StoredVector(Mapped(floating, weights.label))


def check_alike(
    pretrained: Mapped, finetuned: Mapped, names: Iterable[str] | None = None
) -> list[str]:
    """Return the edited names; raise IncompatibleWeights unless a vector loses nothing.

    Names may differ as `aligned` says; shapes and dtypes may not, nor tensors that are not edited.
    """
    return _edited(pretrained, aligned(pretrained, finetuned), names)


def _edited(here: Mapped, there: Mapped, names: Iterable[str] | None) -> list[str]:
    for name, tensor in here.tensors.items():
        twin = there.tensors[name]
        check_shape(name, tensor.shape, here.label, twin.shape, there.label)
        if tensor.dtype != twin.dtype:
            raise IncompatibleWeights(
                f"{name!r} is {tensor.dtype} in {here.label} and {twin.dtype} in {there.label}; "
                "store both in one dtype"
            )
    edited = sorted(here.floating if names is None else set(names))
    _check_edited(edited, here)
    _check_frozen(sorted(here.tensors.keys() - set(edited)), here, there)
    return edited


def check_shape(
    name: str, shape: tuple[int, ...], label: str, other: tuple[int, ...], other_label: str
) -> None:
    """Raise IncompatibleWeights unless a tensor has one shape in two places."""
    if shape != other:
        grown = len(shape) > 1 and shape[1:] == other[1:]
        advice = "use checkpoints of one architecture"
        if grown:
            advice = "if its rows are a vocabulary, resize both models to one before"
        raise IncompatibleWeights(
            f"{name!r} has the shape {shape} in {label} and {other} in {other_label}; {advice}"
        )


def check_finite(values: Array, name: str, label: str) -> None:
    """Raise IncompatibleWeights if a block holds NaN or an infinity."""
    if not _finite(values):
        bad = int((~np.isfinite(values)).sum())
        raise IncompatibleWeights(
            f"tensor {name!r} of {label} holds NaN or infinite values ({bad} in one block of "
            f"{values.size}); retrain or replace the checkpoint it comes from"
        )


def open_weights(path: Path) -> Mapped:
    """Open weights of any known layout.

    Raises:
        MissingArtifact: there is nothing, or a directory without weights.
        IncompatibleWeights: the file is malformed, or pickled objects other than tensors are in it.
    """
    if path.is_dir():
        return open_weights(_inside(path))
    if path.name.endswith(INDEX):
        return _open_shards(path)
    if path.suffix in PICKLES:
        return _open_pickle(path)
    slots, raw, start = headers.read_slots(path)
    with path.open("rb") as file:
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    tensors = {
        name: Stored(slot.dtype, slot.shape, data[start + slot.start : start + slot.stop])
        for name, slot in slots.items()
    }
    if headers.METADATA_KEY not in raw:
        return Mapped(tensors, str(path))
    metadata = headers.read_metadata({"__metadata__": raw}, path)
    return Mapped(tensors, str(path), metadata, headers.read_ties(metadata, tensors, path))


def _inside(directory: Path) -> Path:
    for stem in CONTENTS:
        for name in (f"{stem}.safetensors{INDEX}", f"{stem}.safetensors"):
            if (directory / name).is_file():
                return directory / name
    for stem in CONTENTS:
        for name in (f"{stem}.bin{INDEX}", f"{stem}.bin"):
            if (directory / name).is_file():
                return directory / name
    if (directory / ADAPTER).is_file():
        raise IncompatibleWeights(
            f"{directory} holds a LoRA adapter, not a model; it is a vector of its base model"
        )
    raise MissingArtifact(
        f"{directory} holds no weights; expected model.safetensors, model.safetensors{INDEX}, "
        "open_clip_model.safetensors or pytorch_model.bin"
    )


def _open_shards(index: Path) -> Mapped:
    try:
        content = json.loads(index.read_bytes(), object_pairs_hook=headers.unique)
        named = {str(name): str(file) for name, file in content["weight_map"].items()}
    except FileNotFoundError:
        raise MissingArtifact(f"{index} does not exist") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IncompatibleWeights(f"{index}: no weight_map of names to files: {error}") from None
    headers.check_count(len(named), index)
    tensors: dict[str, Stored] = {}
    tied: dict[str, str] = {}
    for file in sorted(set(named.values())):
        if Path(file).name != file or Path(file).suffix not in (".safetensors", *PICKLES):
            raise IncompatibleWeights(f"{index}: {file!r} is no file of weights beside the index")
        if not (index.parent / file).is_file():
            raise MissingArtifact(f"{index} names {file!r}, which is not there; download it")
        found = open_weights(index.parent / file)
        listed = {name for name, place in named.items() if place == file}
        if found.named.keys() != listed:
            name = min(found.named.keys() ^ listed)
            raise IncompatibleWeights(
                f"{index} and {file} do not agree on {name!r}; download the shards anew"
            )
        tensors.update(found.tensors)
        tied.update(found.tied)
    return Mapped(tensors, str(index.parent), tied=tied)


def _open_pickle(path: Path) -> Mapped:
    from taskvec import pickles  # imports torch

    return pickles.open_pickle(path)


def _twins(name: str, tensors: Mapping[str, Stored], among: Iterable[str]) -> list[str]:
    """Return which tensors are the same one: by memory, or matrices by bytes.

    Vectors, and matrices of one value, are the same by chance: many layers start with ones.
    """
    tensor = tensors[name]
    same = [other for other in among if tensors[other] is tensor]
    start, width = tensor.data[: headers.PIECE], headers.BYTES[tensor.dtype]
    if same or len(tensor.shape) < 2 or np.array_equal(start[width:], start[:-width]):
        return same
    return [other for other in among if same_bytes(tensors[other], tensor)]


def _check_edited(edited: list[str], weights: Mapped) -> None:
    for name in edited:
        if name not in weights.tensors:
            raise IncompatibleWeights(
                f"the edited parameter {name!r} is not in {weights.label}; was it written by "
                "another model family?"
            )
        dtype = weights.tensors[name].dtype
        if dtype not in FLOATS:
            raise IncompatibleWeights(
                f"{name!r} of {weights.label} is {dtype}; a vector is made of {', '.join(FLOATS)}"
            )
    if not edited:
        raise IncompatibleWeights(
            f"{weights.label} has no tensor of {', '.join(FLOATS)}; there is nothing to edit"
        )


def _check_frozen(names: list[str], here: Mapped, there: Mapped) -> None:
    """Raise IncompatibleWeights if a tensor that is not edited differs in a single byte."""

    def equal(piece: tuple[str, int]) -> bool:
        name, start = piece
        stop = start + headers.PIECE
        one, other = here.tensors[name].data[start:stop], there.tensors[name].data[start:stop]
        return bool(np.array_equal(one, other))

    work = [
        (name, start)
        for name in names
        for start in range(0, len(here.tensors[name].data), headers.PIECE)
    ]
    moved = [name for (name, _), same in zip(work, parallel(equal, work), strict=True) if not same]
    if moved:
        name = moved[0]
        raise IncompatibleWeights(
            f"{len(set(moved))} tensors that are not edited differ between {here.label} and "
            f"{there.label} (first: {name!r}, {here.tensors[name].dtype}); a task vector would "
            f"lose them: freeze them, or edit them too, as one of {', '.join(FLOATS)}"
        )


def _finite(values: Array) -> bool:
    return bool(np.isfinite(values).all())
