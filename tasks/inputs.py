"""Reading what earlier stages wrote, with the checks that belong to it."""

from pathlib import Path

from torch import Tensor

from tasks.artifacts import Artifacts
from taskvec import checkpoints, plugins, yaml_file
from taskvec.errors import IncompatibleWeights
from taskvec.mapped import Mapped, open_weights
from taskvec.sections import Model
from taskvec.towers import Tower, check_identity


def images(artifacts: Artifacts, task: str, split: str) -> tuple[Tensor, Tensor]:
    """Return pictures (N, 3, S, S) uint8 and labels (N,) int64 of one split."""
    loaded = checkpoints.load(artifacts.images(task, split), "images")
    return loaded.tensors["images"], loaded.tensors["labels"]


def architecture(model: Model) -> Tower:
    """Return the tower of params.yaml:model with random weights."""
    family = plugins.load("models", model.family)
    tower: Tower = family.tower(model.image_size, **model.options)
    return tower


def checkpoint(path: Path, tower: Tower, origin: str = "") -> checkpoints.Weights:
    """Return a checkpoint that fits the tower.

    Args:
        path: the file.
        tower: what params.yaml:model describes.
        origin: fingerprint of theta_pre that it must descend from; empty for theta_pre itself.
    """
    loaded = checkpoints.load(path, "checkpoint")
    check_identity(tower, loaded.metadata, path.name)
    if origin:
        check_origin(loaded, origin, path.name)
    return loaded


def mapped(path: Path, kind: str) -> Mapped:
    """Return a file of taskvec mapped into memory, checked as `checkpoints.load` checks it."""
    weights = open_weights(path)
    checkpoints.check_kind(weights.metadata, kind, path)
    checkpoints.check_fingerprint(weights.measure(), weights.metadata, path)
    return weights


def check_origin(loaded: checkpoints.Weights | Mapped, origin: str, name: str) -> None:
    """Raise IncompatibleWeights unless the weights descend from ``origin``."""
    found = str(loaded.metadata.get("origin"))
    if found != origin:
        raise IncompatibleWeights(
            f"{name} starts from the pre-trained weights {found[:12]}, the checkpoint in use is "
            f"{origin[:12]}; run `taskvec run` to fine-tune it anew"
        )


def evaluation_code(artifacts: Artifacts) -> str:
    """Return the digest of the code that answers depend on, as code.yaml has it; may be empty."""
    path = artifacts.code()
    return str(yaml_file.read(path).get("answers", "")) if path.is_file() else ""


def head(artifacts: Artifacts, task: str) -> Tensor:
    """Return the frozen classifier of a task, (classes, D)."""
    return checkpoints.load(artifacts.head(task), "head").tensors["head"]
