"""Weights on disk: safetensors, written atomically, checked before use.

Every file carries one metadata key, ``taskvec``, that holds canonical JSON (with several keys
safetensors files are not byte-deterministic): the kind of file, the fingerprint of its tensors,
whatever the writer adds, such as the origin, and a seal over all of these. A fingerprint identifies
tensors, not files: SHA-256 over the names, dtypes, shapes and bytes in the order of the names.
"""

import hashlib
import json
import re
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from taskvec.atomic import sync
from taskvec.errors import IncompatibleWeights, MissingArtifact

StateDict = Mapping[str, Tensor]

METADATA_KEY = "taskvec"
SEAL = "seal"
MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 50_000
MAX_RANK = 8
TENSOR_NAME = re.compile(r"[A-Za-z0-9_.]{1,256}")


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
    """Return the SHA-256 (hex) over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        label = f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n"
        digest.update(label.encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


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
    _check_count(len(tensors), path)
    for name, tensor in tensors.items():
        _check_name(name, path)
        _check_rank(name, tensor.ndim, path)
        check_finite(name, tensor)
    mark = fingerprint(tensors)
    content = {"kind": kind, "fingerprint": mark, **metadata}
    text = _canonical({**content, SEAL: _seal(content)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as directory:
        temporary = Path(directory) / path.name
        save_file(_separate(tensors), temporary, metadata={METADATA_KEY: text})
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
    metadata = _metadata(read_header(path), path)
    if metadata.get("kind") != kind:
        raise IncompatibleWeights(f"{path} holds a {metadata.get('kind')!r}, expected a {kind!r}")
    tensors = read_tensors(path)
    found = fingerprint(tensors)
    written = str(metadata.get("fingerprint"))
    if found != written:
        raise IncompatibleWeights(
            f"{path} is damaged: its tensors have the fingerprint {found[:12]}, its header says "
            f"{written[:12]}; delete the file and run `taskvec run`"
        )
    return Weights(tensors, metadata)


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


def read_header(path: Path) -> dict[str, Any]:
    """Return the checked JSON header of a safetensors file without reading its tensors.

    Stricter than the format: names, ranks and the number of tensors are bounded, and duplicates
    and unknown fields, which the reader would accept in silence, are refused.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise IncompatibleWeights(f"{path} is no safetensors file, or it is cut short")
            raw = file.read(length)
    except FileNotFoundError:
        raise MissingArtifact(f"{path} does not exist; `taskvec run` makes it") from None
    if not raw.startswith(b"{"):
        raise IncompatibleWeights(f"{path} is no safetensors file: its header is no JSON object")
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise IncompatibleWeights(f"{path}: malformed header: {error}") from None
    _check_header(header, path)
    return dict(header)


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


def _check_header(header: dict[str, Any], path: Path) -> None:
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise IncompatibleWeights(f"{path}: the metadata must map strings to strings")
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    _check_count(len(tensors), path)
    for name, entry in tensors.items():
        _check_name(name, path)
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise IncompatibleWeights(f"{path}: tensor {name!r} has a malformed entry")
        if not isinstance(entry["shape"], list):
            raise IncompatibleWeights(f"{path}: tensor {name!r} has a malformed shape")
        _check_rank(name, len(entry["shape"]), path)


def _metadata(header: dict[str, Any], path: Path) -> dict[str, Any]:
    text = header.get("__metadata__", {}).get(METADATA_KEY)
    if text is None:
        raise IncompatibleWeights(
            f"{path} was not written by taskvec: it has no {METADATA_KEY!r} metadata; "
            "name a plain checkpoint as model.pretrained in params.yaml instead"
        )
    try:
        metadata = json.loads(text, object_pairs_hook=_unique)
        intact = isinstance(metadata, dict) and metadata.pop(SEAL, None) == _seal(metadata)
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise IncompatibleWeights(
            f"{path} is damaged: its metadata are not those that were written; "
            "delete the file and run `taskvec run`"
        )
    return dict(metadata)


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _seal(content: Mapping[str, Any]) -> str:
    """Return a digest that finds damage in the metadata, as the fingerprint does in the tensors."""
    return hashlib.sha256(_canonical(content).encode()).hexdigest()[:16]


def _separate(tensors: StateDict) -> dict[str, Tensor]:
    """Return contiguous tensors that share no memory: safetensors refuses tied ones."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return result


def _check_count(count: int, path: Path) -> None:
    if not 1 <= count <= MAX_TENSORS:
        raise IncompatibleWeights(f"{path}: {count} tensors; expected 1 to {MAX_TENSORS}")


def _check_rank(name: str, rank: int, path: Path) -> None:
    if rank > MAX_RANK:
        raise IncompatibleWeights(
            f"{path}: tensor {name!r} has {rank} axes; expected at most {MAX_RANK}"
        )


def _check_name(name: str, path: Path) -> None:
    if not TENSOR_NAME.fullmatch(name) or name == "__metadata__":
        raise IncompatibleWeights(
            f"{path}: tensor name {name[:80]!r}; expected 1 to 256 of A-Z a-z 0-9 _ and ."
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result
