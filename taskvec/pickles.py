"""PyTorch files (.pt, .pth, .bin, .ckpt): mapped, read with ``weights_only=True``, never executed.

Names are those of the file, but ``module.`` (data parallel) and ``_orig_mod.`` (compiled) are taken
off if all names start with it: such a model is the same without its wrapper.

The paper's code stores whole pickled modules. Their classes are not needed and not imported: every
class that such a file names stands for an inert object here, from which the tensors are collected.
"""

import sys
import warnings
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taskvec import headers, streaming
from taskvec.checkpoints import CODES, tied
from taskvec.errors import IncompatibleWeights, MissingArtifact
from taskvec.mapped import Mapped, Stored

WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")
# What the attributes of a module may be of Python's own library. Nothing is called, whatever its
# name, but a file that names more, such as os.system or eval, is no honest model.
LIBRARY = (
    "argparse.", "collections.", "copyreg.", "dataclasses.", "datetime.", "decimal.", "enum.",
    "fractions.", "functools.", "logging.", "math.", "numbers.", "pathlib.", "random.", "re.",
    "types.SimpleNamespace", "typing.", "uuid.", "builtins.dict", "builtins.frozenset",
    "builtins.getattr", "builtins.list", "builtins.object", "builtins.slice", "builtins.tuple",
)  # fmt: skip


def open_pickle(path: Path) -> Mapped:
    """Open a file that holds a state dict, bare or under the key ``state_dict`` or ``model``.

    Raises:
        MissingArtifact: there is no such file.
        IncompatibleWeights: it holds other objects than tensors.
    """
    advice = (
        "files of the paper's code, which hold whole modules, are converted by `taskvec import "
        f"{path.name} --out FILE.safetensors`"
    )
    content = _load(path, advice)
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    return as_mapped(_checked(content, path), str(path))


def open_legacy(path: Path) -> Mapped:
    """Open a file of the paper's code: a whole pickled module (``finetuned.pt``, ``zeroshot.pt``).

    Names are those of ``module.state_dict()``. Nothing in the file is executed.

    Raises:
        MissingArtifact: there is no such file.
        IncompatibleWeights: it holds no module, or something else than modules.
    """
    if not _is_zip(path):
        raise IncompatibleWeights(
            f"{path} is not in the format of torch 1.6 and later; a plain state dict needs no "
            "import, a whole module must be loaded with the code that wrote it and saved anew"
        )
    advice = "a whole module, saved by torch.save(module, path), was expected"
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:
        raise _unreadable(path, error, advice) from None
    python = sys.stdlib_module_names | IMPORT_MAPPING.keys()  # those of Python 2 too
    for name in sorted(named):
        if name.partition(".")[0] in python and not name.startswith(LIBRARY):
            raise IncompatibleWeights(
                f"{path} names {name!r}, which no module is made of; nothing of the file was "
                "executed: do not open it with other programs"
            )
    stubs: list[Any] = [(type("Inert", (_Inert,), {"kind": name}), name) for name in named]
    with torch.serialization.safe_globals(stubs):
        module = _load(path, advice)
    return as_mapped(_checked(_tensors(module, path), path), str(path))


def import_legacy(path: Path, out: Path) -> str:
    """Convert a file of the paper's code to a checkpoint; return the fingerprint of its tensors.

    Args:
        path: a whole pickled module: see `open_legacy`.
        out: the safetensors file to write.

    Raises:
        MissingArtifact, IncompatibleWeights: see `open_legacy`.
    """
    weights = open_legacy(path)
    metadata: dict[str, Any] = {"imported": path.name}
    if weights.tied:
        metadata[headers.TIED] = dict(weights.tied)
    return streaming.write(out, weights.tensors, kind="checkpoint", metadata=metadata)


def as_mapped(tensors: Mapping[str, Tensor], label: str) -> Mapped:
    """Return tensors as if they lay on disk; those that are tied are there once."""
    twins = tied(tensors)
    stored = {name: _stored(tensor) for name, tensor in tensors.items() if name not in twins}
    return Mapped(stored, label, tied=twins)


class _Inert:
    """Stands for an object of any class; keeps its attributes and does nothing."""

    kind = ""

    def __new__(cls, *args: Any, **keywords: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **keywords: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def _tensors(root: Any, path: Path) -> dict[str, Any]:
    """Return what ``module.state_dict()`` would hold."""
    found: dict[str, Any] = {}
    waiting, seen = [(root, "")], 0
    while waiting:
        module, prefix = waiting.pop()
        own = module.__dict__ if isinstance(module, _Inert) else {}
        rooms: list[Any] = [own.get(room) for room in ("_parameters", "_buffers", "_modules")]
        transient = own.get("_non_persistent_buffers_set", set())
        seen += 1
        if not all(isinstance(room, dict) for room in rooms) or not isinstance(transient, set):
            place = f"{prefix[:-1]!r}" if prefix else "its content"
            raise IncompatibleWeights(
                f"{path}: {place} is no pickled module but a {_kind(module)}; a plain "
                "state dict needs no import"
            )
        if seen > headers.MAX_TENSORS:
            raise IncompatibleWeights(f"{path}: more than {headers.MAX_TENSORS} modules")
        parameters, buffers, modules = rooms
        persistent = {name: value for name, value in buffers.items() if name not in transient}
        for name, value in [*parameters.items(), *persistent.items()]:
            if value is not None:
                found[f"{prefix}{name}"] = value
        for name, child in modules.items():
            if child is not None:
                waiting.append((child, f"{prefix}{name}."))
    return found


def _load(path: Path, advice: str) -> Any:
    zipped = _is_zip(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of other protocols of pickle
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged file makes torch raise anything
        raise _unreadable(path, error, advice) from None


def _is_zip(path: Path) -> bool:
    if not path.is_file():
        raise MissingArtifact(f"{path} does not exist")
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _unreadable(path: Path, error: Exception, advice: str) -> IncompatibleWeights:
    cause = error.__context__ or error  # torch wraps its reason in advice to trust the file
    reason = (
        (str(cause).strip() or type(cause).__name__).splitlines()[0].partition(". ")[0].rstrip(".")
    )
    return IncompatibleWeights(f"{path} cannot be read as plain tensors ({reason}); {advice}")


def _kind(value: Any) -> str:
    return type(value).kind if isinstance(value, _Inert) else type(value).__name__


def _checked(content: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not content:
        raise IncompatibleWeights(f"{path} holds no tensors but a {_kind(content)}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise IncompatibleWeights(
                f"{path}: {name!r} is a {_kind(value)}; expected names of tensors only"
            )
        plain = value.layout == torch.strided and value.device.type == "cpu"
        if value.dtype not in CODES or not plain:
            raise IncompatibleWeights(
                f"{path}: {name!r} is {value.dtype}, {value.layout} on {value.device}; expected "
                "plain dense tensors"
            )
    return _without_wrapper(content)


def _without_wrapper(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            return _without_wrapper({name.removeprefix(prefix): tensors[name] for name in tensors})
    return dict(tensors)


def _stored(tensor: Tensor) -> Stored:
    plain = tensor.detach().cpu().contiguous()
    return Stored(
        CODES[tensor.dtype], tuple(tensor.shape), plain.view(-1).view(torch.uint8).numpy()
    )
