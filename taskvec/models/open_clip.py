"""Any open_clip model, by its name and a tag or a local file of weights.

OpenAI's weights need the activation QuickGELU: use the ``-quickgelu`` names. A local file gives no
warning when the activation is wrong, so it is part of the identity that checkpoints carry.
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import taskvec.torchvision_import  # noqa: F401  before open_clip

import open_clip  # isort: skip

from taskvec.errors import InvalidData, InvalidInput, MissingArtifact, nearest
from taskvec.towers import PREFIX, Alignment, Tower


def tower(image_size: int | None, *, name: str, pretrained: str, sha256: str = "") -> Tower:
    """Return the vision tower of an open_clip model, with random weights.

    Args:
        image_size: side of the pictures in pixels, if given the model's own.
        name: open_clip's name of the architecture, such as ``ViT-B-32-quickgelu``.
        pretrained: open_clip's tag (``openai``), or the path of a local file of weights.
        sha256: digest of the local file; required for one, so that lineage knows the bytes.
    """
    del pretrained, sha256
    model = _build(name, None, image_size)
    config = open_clip.get_model_config(name)
    return Tower(
        module=model.visual,
        mean=_triple(model.visual.preprocess_cfg["mean"]),
        std=_triple(model.visual.preprocess_cfg["std"]),
        image_size=config["vision_cfg"]["image_size"],
        identity={
            "family": "open_clip",
            "name": name,
            "activation": "quickgelu" if config.get("quick_gelu") else "gelu",
            "image_size": str(config["vision_cfg"]["image_size"]),
        },
    )


def pretrained(
    image_size: int | None,
    alignment: Sequence[Alignment],
    *,
    name: str,
    pretrained: str,
    sha256: str = "",
) -> dict[str, Tensor]:
    """Return the pre-trained weights of the vision tower; see `tower` for the options."""
    if alignment:
        raise InvalidInput(
            "model.align_tasks is for families without a text-aligned tower; open_clip's models "
            "are aligned: remove align_tasks"
        )
    model = _build(name, _weights(pretrained, sha256), image_size)
    return {PREFIX + key: value.clone() for key, value in model.visual.state_dict().items()}


def text_head(
    classes: list[str], templates: list[str], *, name: str, pretrained: str, sha256: str = ""
) -> Tensor:
    """Return open_clip's zero-shot classifier times the logit scale, (classes, features)."""
    model = _build(name, _weights(pretrained, sha256), None)
    with torch.inference_mode():
        classifier = open_clip.build_zero_shot_classifier(
            model, open_clip.get_tokenizer(name), classes, templates
        )
        return (classifier.T * model.logit_scale.exp()).float().clone()


@cache
def _build(name: str, weights: str | None, image_size: int | None) -> Any:
    if name not in open_clip.list_models():
        raise InvalidInput(
            f"unknown open_clip model {name!r}; {nearest(name, open_clip.list_models())}"
        )
    own = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    if image_size not in (None, own):
        raise InvalidInput(f"{name} takes pictures of {own} pixels; set model.image_size: {own}")
    return open_clip.create_model(name, pretrained=weights, device="cpu").eval()


def _weights(pretrained: str, sha256: str) -> str:
    path = Path(pretrained)
    if not path.suffix and "/" not in pretrained:
        return pretrained
    if not path.is_file():
        raise MissingArtifact(f"model.pretrained: {pretrained} does not exist")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise InvalidData(
            f"{pretrained} has the wrong digest: found {found}, expected {sha256 or 'none given'}; "
            "set model.sha256 to the digest of the file you mean"
        )
    return pretrained


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    return (values[0], values[1], values[2])
