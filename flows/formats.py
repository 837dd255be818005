"""What an exported model looks like to the programs that load it.

open_clip and transformers get the whole CLIP model: the edited vision tower and the untouched text
tower. A tower that they cannot load whole is exported alone, for taskvec.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from taskvec import plugins
from taskvec.checkpoints import CODES
from taskvec.errors import IncompatibleWeights, InvalidInput, nearest
from taskvec.mapped import Mapped, Stored
from taskvec.sections import Model, Source
from taskvec.towers import PREFIX, Tower

if TYPE_CHECKING:
    from torch import Tensor

QUICK = "-quickgelu"
NOTHING = np.empty(0, np.uint8)
# What of open_clip's configuration the CLIP of transformers can say.
VISION = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
WHOLE = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}


@dataclass(frozen=True)
class Layout:
    """The files of a format.

    Attributes:
        weights: what the file of weights is called.
        tensors: what it holds.
        texts: name -> contents of the other files.
        library: who loads it, as the Hugging Face hub calls it.
        pipeline: what the hub calls the task of such a model.
        usage: Python that loads it, in the directory of the export.
        base: what the hub, or else the family, calls the base model.
        kind: what the header says the file is.
    """

    weights: str
    tensors: Mapped
    texts: Mapping[str, str]
    library: str
    pipeline: str
    usage: str
    base: str
    kind: str = "export"


def layout(name: str, edited: Mapped, model: Model) -> Layout:
    """Return an edited vision tower in a format.

    Args:
        name: "open_clip", "transformers" or "taskvec"; empty for the first that fits the family.
        edited: the tensors of the tower.
        model: of the experiment that made it.

    Raises:
        InvalidInput: there is no such format, or the model cannot be written in it.
    """
    chosen = name or ("open_clip" if model.family == "open_clip" else "taskvec")
    if chosen not in FORMATS:
        raise InvalidInput(f"no format {chosen!r}; {nearest(chosen, FORMATS)}")
    if chosen != "taskvec" and model.family != "open_clip":
        raise InvalidInput(
            f"the family {model.family} is no CLIP model that {chosen} can load whole; "
            "--format taskvec writes its vision tower"
        )
    return FORMATS[chosen](edited, model)


def taskvec(edited: Mapped, model: Model) -> Layout:
    """Return the vision tower alone, as taskvec stores it."""
    options = "".join(f", {key}={value!r}" for key, value in _loading(model).items())
    identity = edited.metadata["identity"]
    usage = f"""\
from pathlib import Path
from taskvec import checkpoints
from taskvec.models import {model.family}

tower = {model.family}.tower({identity["image_size"]}{options})
tower.load(checkpoints.load(Path("model.safetensors"), "checkpoint").tensors)
# tower.features(images) are the unit features (N, D) of images (N, 3, S, S) uint8,
# S = {identity["image_size"]}; logits are features @ head.T, with a head of the base model's texts
"""
    return Layout(
        "model.safetensors", edited, {}, "taskvec", "image-feature-extraction", usage,
        _base(model, identity), kind="checkpoint",
    )  # fmt: skip


def open_clip(edited: Mapped, model: Model) -> Layout:
    """Return the whole model as `open_clip.create_model` reads it, by name or as a directory."""
    import open_clip

    identity = edited.metadata["identity"]
    name = open_clip_name(identity)
    tower = _architecture(model)
    config = {
        "model_cfg": open_clip.get_model_config(name),
        "preprocess_cfg": {"mean": tower.mean, "std": tower.std},
    }
    weights = "open_clip_model.safetensors"
    usage = f"""\
import open_clip

model = open_clip.create_model({name!r}, pretrained="{weights}")
model.eval()
# with the colours that it expects, and without its name:
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:.")
"""
    return Layout(
        weights, _whole(edited, model), {"open_clip_config.json": _json(config)}, "open_clip",
        "zero-shot-image-classification", usage, _base(model, identity),
    )  # fmt: skip


def transformers(edited: Mapped, model: Model) -> Layout:
    """Return the whole model as a directory of transformers' `CLIPModel`.

    Raises:
        InvalidInput: it has parts that `CLIPModel` does not have.
    """
    import open_clip

    name = open_clip_name(edited.metadata["identity"])
    config = open_clip.get_model_config(name)
    _check_plain(name, config)
    tower = _architecture(model)
    clip = _clip_config(config)
    whole = _whole(edited, model)
    tensors = dict(_renamed(whole))
    _check_fits(name, clip, tensors)
    texts = {
        "config.json": _json(clip),
        "preprocessor_config.json": _json(_preprocessor(tower)),
    }
    usage = """\
from transformers import CLIPImageProcessor, CLIPModel

model = CLIPModel.from_pretrained(".")
processor = CLIPImageProcessor.from_pretrained(".")
# texts are tokenised as in the base model; no tokeniser is in this directory
"""
    return Layout(
        "model.safetensors", Mapped(tensors, whole.label), texts, "transformers",
        "zero-shot-image-classification", usage, _base(model, edited.metadata["identity"]),
    )  # fmt: skip


FORMATS: dict[str, Callable[[Mapped, Model], Layout]] = {
    "open_clip": open_clip,
    "transformers": transformers,
    "taskvec": taskvec,
}


def open_clip_name(identity: Mapping[str, str]) -> str:
    """Return the open_clip name whose activation is the one that weights were trained with.

    Raises:
        InvalidInput: open_clip has no such model.
    """
    import open_clip

    name, activation = identity["name"], identity["activation"]
    for candidate in (name, f"{name}{QUICK}", name.removesuffix(QUICK)):
        config = open_clip.get_model_config(candidate) or {}
        if config and activation == ("quickgelu" if config.get("quick_gelu") else "gelu"):
            return candidate
    raise InvalidInput(
        f"open_clip knows no model {name!r} with the activation {activation}; "
        "--format taskvec writes the vision tower alone"
    )


def stored(tensors: Mapping[str, "Tensor"]) -> dict[str, Stored]:
    """Return tensors in memory as they would lie on disk."""
    import torch

    found = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        flat = plain.reshape(-1).view(torch.uint8).numpy() if plain.numel() else NOTHING
        found[name] = Stored(CODES[plain.dtype], tuple(plain.shape), flat)
    return found


def _whole(edited: Mapped, model: Model) -> Mapped:
    """Return the base model with the edited tower in the place of its own."""
    from taskvec.models import open_clip as family

    options = model.options
    path = family._weights(options["name"], options["pretrained"], options.get("sha256", ""))
    base = stored(family._load(options["name"], path).state_dict())
    own = {name for name in base if name.startswith(PREFIX)}
    if own != edited.named.keys():
        raise InvalidInput(
            f"{edited.label} and {options['name']} do not have the same vision tower: "
            f"{min(own ^ edited.named.keys())!r} is in one of them; set model in params.yaml to "
            "the model that was edited"
        )
    found = Mapped({name: base[name] for name in own}, options["name"]).measure()
    if found != edited.metadata["origin"]:
        raise IncompatibleWeights(
            f"{path} holds other weights than the edit started from: its vision tower has the "
            f"fingerprint {found[:12]}, expected {edited.metadata['origin'][:12]}; restore the file"
        )
    return Mapped({**base, **edited.named}, edited.label, edited.metadata)


def _architecture(model: Model) -> Tower:
    from tasks.inputs import architecture

    return architecture(model)


def _loading(model: Model) -> dict[str, Any]:
    """Return the options that somebody else needs to build the tower: no local files."""
    local = {"pretrained": "", "sha256": ""} if model.family == "open_clip" else {}
    return {**dict(sorted(model.options.items())), **local}


def _base(model: Model, identity: Mapping[str, str]) -> str:
    if model.family != "open_clip":
        return identity["name"]
    import open_clip

    known = open_clip.get_pretrained_cfg(model.options["name"], model.options["pretrained"])
    return str(known.get("hf_hub", "")).strip("/") or identity["name"]


def _check_plain(name: str, config: Mapping[str, Any]) -> None:
    extra = {
        *(config.keys() - WHOLE), *(config["vision_cfg"].keys() - VISION),
        *(config["text_cfg"].keys() - TEXT),
    }  # fmt: skip
    if extra or not isinstance(config["vision_cfg"].get("layers"), int):
        raise InvalidInput(
            f"{name} has parts that transformers' CLIPModel does not have "
            f"({', '.join(sorted(extra)) or 'a ResNet'}); use --format open_clip"
        )


def _clip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return open_clip's configuration of a model in the words of transformers."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    shared = {
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": config["embed_dim"],
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config["embed_dim"],
        "vision_config": {
            **shared,
            "model_type": "clip_vision_model",
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        "text_config": {
            **shared,
            "model_type": "clip_text_model",
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            # open_clip reads a text at its largest token, which is the end of text
            "bos_token_id": text["vocab_size"] - 2,
            "eos_token_id": text["vocab_size"] - 1,
            "pad_token_id": 0,
        },
    }


def _preprocessor(tower: Tower) -> dict[str, Any]:
    size = tower.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True, "do_resize": True, "do_center_crop": True, "do_rescale": True,
        "do_normalize": True, "resample": 3, "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size},
        "image_mean": tower.mean, "image_std": tower.std,
    }  # fmt: skip


PLACES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "visual.proj": "visual_projection.weight",
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "transformer.resblocks": "text_model.encoder.layers",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
PARTS = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip
TRANSPOSED = ("visual.proj", "text_projection")


def _renamed(whole: Mapped) -> Iterator[tuple[str, Stored]]:
    """Yield the tensors of open_clip under the names of transformers, the same numbers."""
    for name, tensor in whole.named.items():
        place = next((key for key in PLACES if f"{name}.".startswith(f"{key}.")), "")
        target = PLACES.get(place, "unknown:") + name.removeprefix(place)
        if ".attn.in_proj_" in name:
            rows = tensor.shape[0] // 3
            for number, letter in enumerate("qkv"):
                part = target.replace("attn.in_proj_", f"self_attn.{letter}_proj.")
                yield part, _rows(tensor, number * rows, rows)
            continue
        for old, new in PARTS.items():
            target = target.replace(f".{old}.", f".{new}.")
        yield target, _transposed(tensor) if name in TRANSPOSED else tensor


def _rows(tensor: Stored, start: int, count: int) -> Stored:
    width = len(tensor.data) // tensor.shape[0]
    data = tensor.data[start * width : (start + count) * width]
    return Stored(tensor.dtype, (count, *tensor.shape[1:]), data)


def _transposed(tensor: Stored) -> Stored:
    rows, columns = tensor.shape
    cells = tensor.data.reshape(rows, columns, -1)
    data = np.ascontiguousarray(cells.transpose(1, 0, 2)).reshape(-1)
    return replace(tensor, shape=(columns, rows), data=data)


def _check_fits(name: str, clip: Mapping[str, Any], tensors: Mapping[str, Stored]) -> None:
    """Raise InvalidInput unless these are the tensors of a `CLIPModel`, shapes and all."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        expected = CLIPModel(CLIPConfig.from_dict(dict(clip))).state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in expected.items()}
    found = {key: tensor.shape for key, tensor in tensors.items()}
    if found != shapes:
        first = min(key for key, _ in shapes.items() ^ found.items())
        raise InvalidInput(
            f"{name} is no model that transformers' CLIPModel can load: {first!r} differs; "
            "use --format open_clip"
        )


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def family_sources(model: Model) -> list[Source]:
    """Return the files that the base weights of a family come from, if packages ship them."""
    module = plugins.load("models", model.family)
    return [item for item in vars(module).values() if isinstance(item, Source)]
