"""Weights as torch tensors: written to safetensors files atomically, checked before use.

What is in a file besides the tensors is said in `taskvec.headers`. Tensors that are tied (two names
of one tensor) are stored once and come back tied.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from taskvec import headers
from taskvec.atomic import sync
from taskvec.errors import IncompatibleWeights, MissingArtifact
from taskvec.headers import METADATA_KEY, SEAL, TIED, read_header

StateDict = Mapping[str, Tensor]

CODES = {
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64", torch.float32: "F32",
    torch.int32: "I32", torch.uint32: "U32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int16: "I16", torch.uint16: "U16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Tensors read from a file, with what the writer said of them."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """The SHA-256 that identifies the tensors, in hex."""
        return str(self.metadata["fingerprint"])


def fingerprint(tensors: StateDict) -> str:
    """Return the SHA-256 (hex) that identifies tensors: see `taskvec.headers`."""
    twins = tied(tensors)
    entries: list[tuple[str, str, tuple[int, ...], bytes]] = []
    for name, tensor in tensors.items():
        if name in twins:
            entries.append((name, f"= {twins[name]}", (), b""))
        else:
            pieces = headers.piece_digests(_bytes(tensor))
            entries.append((name, CODES[tensor.dtype], tuple(tensor.shape), pieces))
    return headers.fingerprint(entries)


def tied(tensors: StateDict) -> dict[str, str]:
    """Return {name: first name} of the tensors that are the same memory under a second name."""
    seen: dict[Any, str] = {}
    twins = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and seen.setdefault(place, name) != name:
            twins[name] = seen[place]
    return twins


def save(path: Path, tensors: StateDict, kind: str, **metadata: Any) -> str:
    """Write tensors to ``path`` so that it holds the old file or the whole new one; never a part.

    Args:
        path: the file; its directory is made if needed.
        tensors: name -> tensor, any shapes; floating values must be finite.
        kind: what the file is: "checkpoint", "vector", "basis", "head" or "images".
        metadata: anything that JSON can hold; no times, hosts or absolute paths.

    Returns:
        The fingerprint of the tensors.

    Raises:
        IncompatibleWeights: a value is NaN or infinite, a name is malformed, or there are too many
            tensors or axes, or none.
    """
    headers.check_count(len(tensors), path)
    for name, tensor in tensors.items():
        headers.check_name(name, path)
        headers.check_rank(name, tensor.ndim, path)
        check_finite(name, tensor)
    mark = fingerprint(tensors)
    content = {"kind": kind, "fingerprint": mark, **metadata}
    twins = tied(tensors)
    if twins:
        content[TIED] = twins
    text = headers.canonical({**content, SEAL: headers.seal(content)})
    stored = {name: tensor for name, tensor in tensors.items() if name not in twins}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as directory:
        temporary = Path(directory) / path.name
        save_file(_separate(stored), temporary, metadata={METADATA_KEY: text})
        temporary.chmod(0o644)
        sync(temporary)
        temporary.replace(path)
    sync(path.parent)
    return mark


def load(path: Path, kind: str) -> Weights:
    """Read a file written by `save` and check its header, kind, fingerprint and values.

    Raises:
        MissingArtifact: there is no such file.
        IncompatibleWeights: the header is malformed, the kind differs, the bytes are not those
            that were written, or a value is NaN or infinite.
    """
    metadata = headers.read_metadata(read_header(path), path)
    check_kind(metadata, kind, path)
    tensors = read_tensors(path)
    twins = headers.read_ties(metadata, tensors, path)
    tensors.update({name: tensors[twin] for name, twin in twins.items()})
    check_fingerprint(fingerprint(tensors), metadata, path)
    return Weights(tensors, metadata)


def check_kind(metadata: Mapping[str, Any], kind: str, path: Path) -> None:
    """Raise IncompatibleWeights unless a file is of a kind."""
    if metadata.get("kind") != kind:
        raise IncompatibleWeights(f"{path} holds a {metadata.get('kind')!r}, expected a {kind!r}")


def check_fingerprint(found: str, metadata: Mapping[str, Any], path: Path) -> None:
    """Raise IncompatibleWeights unless the tensors of a file are those that were written."""
    written = str(metadata.get("fingerprint"))
    if found != written:
        raise IncompatibleWeights(
            f"{path} is damaged: its tensors have the fingerprint {found[:12]}, its header says "
            f"{written[:12]}; delete the file and run `taskvec run`"
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file, copied into memory, finite."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: _copied(name, file.get_tensor(name)) for name in sorted(file.keys())}
    except FileNotFoundError:
        raise MissingArtifact(f"{path} does not exist; `taskvec run` makes it") from None
    except SafetensorError as error:
        raise IncompatibleWeights(f"{path} cannot be read: {error}") from None
    for name, tensor in tensors.items():
        check_finite(name, tensor)
    return tensors


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise IncompatibleWeights if a floating tensor holds NaN or an infinity."""
    # The norm is NaN or infinite whenever an element is, and is much faster than isfinite().all();
    # it may overflow by itself, so the slow way has the last word.
    if not tensor.is_floating_point() or torch.isfinite(torch.linalg.vector_norm(tensor.float())):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise IncompatibleWeights(
            f"tensor {name!r} holds {bad} NaN or infinite values of {tensor.numel()}; "
            "retrain or replace the checkpoint it comes from"
        )


def _copied(name: str, tensor: Tensor) -> Tensor:
    """Return a copy: safetensors maps the file, so the values would change with the file."""
    if tensor.dtype == torch.bool and tensor.view(torch.uint8).gt(1).any():
        raise IncompatibleWeights(f"tensor {name!r} holds bytes that are neither true nor false")
    return tensor.clone()


def _bytes(tensor: Tensor) -> Any:
    plain = tensor.detach().cpu().contiguous()
    return plain.view(-1).view(torch.uint8).numpy().data if plain.numel() else b""


def _separate(tensors: StateDict) -> dict[str, Tensor]:
    """Return contiguous tensors that share no memory: safetensors refuses others."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return result
