"""Any open_clip model, by its name and a tag or a local file of weights.

OpenAI's weights need the activation QuickGELU: use the ``-quickgelu`` names. A local file gives no
warning when the activation is wrong, so it is part of the identity that checkpoints carry.
"""

import hashlib
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
import torch
from torch import Tensor

import taskvec.torchvision_import  # noqa: F401  before open_clip

import open_clip  # isort: skip

from taskvec.errors import (
    IncompatibleWeights,
    InvalidData,
    InvalidInput,
    MissingArtifact,
    nearest,
)
from taskvec.towers import PREFIX, Alignment, Tower


def tower(image_size: int | None, *, name: str, pretrained: str, sha256: str = "") -> Tower:
    """Return the vision tower of an open_clip model, with random weights.

    Args:
        image_size: side of the pictures in pixels, if given the model's own.
        name: open_clip's name of the architecture, such as ``ViT-B-32-quickgelu``.
        pretrained: open_clip's tag (``openai``), or the path of a local file of weights. A tag
            also knows the mean and standard deviation of the colours; with a file they are CLIP's.
        sha256: digest of the file; required for a local one, so that lineage knows the bytes.
    """
    del sha256
    config = _config(name, pretrained, image_size)
    visual = open_clip.create_model(name, pretrained_text=False).visual
    colours = {**visual.preprocess_cfg, **open_clip.get_pretrained_cfg(name, pretrained)}
    return Tower(
        module=visual,
        mean=_triple(colours["mean"]),
        std=_triple(colours["std"]),
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
    _config(name, pretrained, image_size)
    model = _load(name, _weights(name, pretrained, sha256))
    return {PREFIX + key: value.clone() for key, value in model.visual.state_dict().items()}


def text_head(
    classes: list[str], templates: list[str], *, name: str, pretrained: str, sha256: str = ""
) -> Tensor:
    """Return open_clip's zero-shot classifier times the logit scale, (classes, features)."""
    _config(name, pretrained, None)
    model = _load(name, _weights(name, pretrained, sha256))
    try:
        tokenizer = open_clip.get_tokenizer(name)
    except OSError as error:
        raise _not_downloaded(f"the tokenizer of {name}", error) from None
    with torch.no_grad():
        classifier = open_clip.build_zero_shot_classifier(model, tokenizer, classes, templates)
        return (classifier.T * model.logit_scale.exp()).float().clone()


def _config(name: str, pretrained: str, image_size: int | None) -> dict[str, Any]:
    """Return open_clip's configuration of a model, which the options must fit."""
    if name not in open_clip.list_models():
        raise InvalidInput(
            f"unknown open_clip model {name!r}; {nearest(name, open_clip.list_models())}"
        )
    config: dict[str, Any] = open_clip.get_model_config(name)
    own = config["vision_cfg"]["image_size"]
    if image_size not in (None, own):
        raise InvalidInput(f"{name} takes pictures of {own} pixels; set model.image_size: {own}")
    published = open_clip.get_pretrained_cfg(name, pretrained)
    if published.get("quick_gelu") and not config.get("quick_gelu"):
        raise InvalidInput(
            f"the weights {pretrained!r} were trained with QuickGELU, {name} computes with GELU; "
            f"set model.name: {name}-quickgelu"
        )
    return config


def _weights(name: str, pretrained: str, sha256: str) -> Path:
    """Return the file of weights, downloaded if need be; its digest is that of ``sha256``."""
    local = bool(Path(pretrained).suffix) or "/" in pretrained
    path = Path(pretrained) if local else _download(name, pretrained)
    if not path.is_file():
        raise MissingArtifact(f"model.pretrained: {pretrained} does not exist")
    if not local and not sha256:
        return path
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise InvalidData(
            f"{pretrained} has the wrong digest: found {found}, expected {sha256 or 'none given'}; "
            "set model.sha256 to the digest of the file you mean"
        )
    return path


def _download(name: str, tag: str) -> Path:
    published = open_clip.get_pretrained_cfg(name, tag)
    if not published:
        known = open_clip.list_pretrained_tags_by_model(name)
        raise InvalidInput(
            f"model.pretrained: {name} has no weights {tag!r}; {nearest(tag, known)}; "
            "the path of a local file has a suffix"
        )
    if _is_offline():
        # else it tries for most of a minute before it looks into its cache
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        return Path(open_clip.download_pretrained(published))
    except (OSError, RuntimeError) as error:
        raise _not_downloaded(f"the weights {tag!r} of {name}", error) from None


def _is_offline() -> bool:
    """Return whether the Hugging Face hub cannot be reached for want of a name server or proxy."""
    try:
        socket.getaddrinfo(urlsplit(huggingface_hub.constants.ENDPOINT).hostname, 443)
    except OSError:
        return not getproxies()
    return False


def _not_downloaded(what: str, error: Exception) -> MissingArtifact:
    reason = str(error).partition("\n")[0]
    return MissingArtifact(
        f"{what} cannot be downloaded: {reason} Run it once with a network, which fills the cache "
        "of the Hugging Face hub (HF_HOME), or set model.pretrained to a local file and "
        "model.sha256 to its digest"
    )


def _load(name: str, path: Path) -> Any:
    """Return the model with the weights of a file, both towers; nothing in it is executed."""
    try:
        return open_clip.create_model(name, pretrained=str(path), weights_only=True).eval()
    except Exception as error:  # its readers of a dozen formats raise a dozen types
        reason = " ".join(str(error).split())[:300]
        raise IncompatibleWeights(
            f"{path} does not hold the weights of {name}: {reason}; "
            "correct model.name or model.pretrained"
        ) from None


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    return (values[0], values[1], values[2])
