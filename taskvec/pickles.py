"""PyTorch files (.pt, .pth, .bin, .ckpt): mapped, read with ``weights_only=True``, never executed.

The paper's code stores whole pickled modules. Their classes are not needed and not imported: every
class that such a file names stands for an inert object here, from which the tensors are collected.
"""

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taskvec.checkpoints import CODES, tied
from taskvec.errors import IncompatibleWeights, MissingArtifact
from taskvec.mapped import Mapped, Stored

WRAPPERS = ("state_dict", "model_state_dict", "model")


def open_pickle(path: Path) -> Mapped:
    """Open a file that holds a state dict, bare or under the key ``state_dict``.

    Raises:
        MissingArtifact: there is no such file.
        IncompatibleWeights: it holds other objects than tensors.
    """
    content = _load(path)
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    return as_mapped(_checked(content, path), path.name)


def open_legacy(path: Path) -> Mapped:
    """Open a file of the paper's code: a whole pickled module (``finetuned.pt``, ``zeroshot.pt``).

    Names are those of ``module.state_dict()``.

    Raises:
        MissingArtifact: there is no such file.
        IncompatibleWeights: it holds no module.
    """
    if not path.is_file():
        raise MissingArtifact(f"{path} does not exist")
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise _unreadable(path, error) from None
    stubs: list[Any] = [(type("Inert", (_Inert,), {}), name) for name in named]
    with torch.serialization.safe_globals(stubs):
        module = _load(path)
    if not isinstance(module, _Inert) or not isinstance(module.__dict__.get("_modules"), Mapping):
        raise IncompatibleWeights(
            f"{path} holds no pickled module but a {type(module).__name__}; a plain state dict "
            "needs no import"
        )
    return as_mapped(_checked(dict(_tensors(module, "")), path), path.name)


def as_mapped(tensors: Mapping[str, Tensor], label: str) -> Mapped:
    """Return tensors as if they lay on disk; those that are tied are there once."""
    twins = tied(tensors)
    stored = {name: _stored(tensor) for name, tensor in tensors.items() if name not in twins}
    return Mapped(stored, label, tied=twins)


class _Inert:
    """Stands for an object of any class; keeps its attributes and does nothing."""

    def __new__(cls, *args: Any, **keywords: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **keywords: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def _tensors(module: _Inert, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield what ``module.state_dict()`` would hold."""
    own = module.__dict__
    transient = own.get("_non_persistent_buffers_set") or ()
    for room in ("_parameters", "_buffers"):
        for name, value in (own.get(room) or {}).items():
            if isinstance(value, Tensor) and name not in transient:
                yield prefix + name, value
    for name, child in (own.get("_modules") or {}).items():
        if isinstance(child, _Inert):
            yield from _tensors(child, f"{prefix}{name}.")


def _load(path: Path) -> Any:
    if not path.is_file():
        raise MissingArtifact(f"{path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise _unreadable(path, error) from None


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _unreadable(path: Path, error: Exception) -> IncompatibleWeights:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return IncompatibleWeights(
        f"{path} cannot be read as plain tensors ({reason}); files of the paper's code, which hold "
        f"whole modules, are converted by `taskvec import {path.name} --out FILE.safetensors`"
    )


def _checked(content: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not content:
        raise IncompatibleWeights(f"{path} holds no state dict but a {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise IncompatibleWeights(
                f"{path}: {name!r} is a {type(value).__name__}; expected names of tensors only"
            )
        if value.dtype not in CODES or value.layout != torch.strided:
            raise IncompatibleWeights(
                f"{path}: {name!r} is {value.dtype}, {value.layout}; expected plain dense tensors"
            )
    return dict(content)


def _stored(tensor: Tensor) -> Stored:
    plain = tensor.detach().cpu().contiguous()
    return Stored(
        CODES[tensor.dtype], tuple(tensor.shape), plain.view(-1).view(torch.uint8).numpy()
    )
