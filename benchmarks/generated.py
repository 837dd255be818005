"""Checkpoints to merge: the shapes of CLIP's vision towers, drawn weights, small changes."""

import json
import math
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

Shapes = Mapping[str, tuple[int, ...]]
WEIGHTS = 0.02  # standard deviation of the base
CHANGE = 3e-4  # and of a fine-tuned checkpoint minus the base


@dataclass(frozen=True)
class Checkpoints:
    """A base and checkpoints fine-tuned from it, as float32 safetensors files.

    Attributes:
        base: the file of the base.
        finetuned: the other files.
        parameters: elements of one file.
    """

    base: Path
    finetuned: tuple[Path, ...]
    parameters: int

    @property
    def files(self) -> tuple[Path, ...]:
        """All files, the base first."""
        return (self.base, *self.finetuned)

    def first(self, number: int) -> "Checkpoints":
        """Return the base with so many of the fine-tuned ones."""
        return Checkpoints(self.base, self.finetuned[:number], self.parameters)

    def remove(self) -> None:
        """Delete the files."""
        shutil.rmtree(self.base.parent)


def tower_shapes(model: str) -> Shapes:
    """Return the names and shapes of the vision tower of an open_clip model, such as ViT-B-32."""
    import torch

    import taskvec.torchvision_import  # noqa: F401  before open_clip

    import open_clip  # isort: skip

    with torch.device("meta"):  # shapes alone: nothing is drawn or held
        state = open_clip.create_model(model, device="meta").visual.state_dict()
    return {name: tuple(value.shape) for name, value in state.items()}


def block(shapes: Shapes) -> Shapes:
    """Return the tensors of the first transformer block."""
    return {name: shape for name, shape in shapes.items() if ".resblocks.0." in name}


def elements(shapes: Shapes) -> int:
    """Return the number of elements of all tensors."""
    return sum(map(math.prod, shapes.values()))


def generate(directory: Path, shapes: Shapes, number: int) -> Checkpoints:
    """Write a base and so many fine-tuned checkpoints into a new directory."""
    directory.mkdir()
    base = {name: _drawn(shape, WEIGHTS, 0, place) for place, (name, shape) in _places(shapes)}
    save_file(base, directory / "base.safetensors")

    def finetune(label: int) -> Path:
        path = directory / f"m{label}.safetensors"
        changed = {
            name: base[name] + _drawn(shape, CHANGE, label + 1, place)
            for place, (name, shape) in _places(shapes)
        }
        save_file(changed, path)
        return path

    with ThreadPoolExecutor(2) as pool:
        files = tuple(pool.map(finetune, range(number)))
    return Checkpoints(directory / "base.safetensors", files, elements(shapes))


def write_config(
    path: Path,
    method: str,
    models: Mapping[Path, Mapping[str, float]],
    base: Path | None = None,
    **parameters: float | bool,
) -> Path:
    """Write a file of mergekit; JSON is YAML as well.

    Args:
        path: the file to write.
        method: its ``merge_method``.
        models: file -> its own parameters.
        base: its ``base_model``.
        parameters: of all models.
    """
    content = {
        "merge_method": method,
        **({"base_model": str(base)} if base else {}),
        "dtype": "float32",
        "parameters": parameters,
        "models": [{"model": str(file), "parameters": dict(own)} for file, own in models.items()],
    }
    path.write_text(json.dumps(content, indent=1))
    return path


def _places(shapes: Shapes) -> list[tuple[int, tuple[str, tuple[int, ...]]]]:
    return list(enumerate(shapes.items()))


def _drawn(shape: tuple[int, ...], deviation: float, *seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return np.multiply(values, np.float32(deviation), out=values)
