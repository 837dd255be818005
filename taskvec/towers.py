"""The vision tower: what the stages need of a model family, and the interface of families.

A family is a module of taskvec/models/ with three functions, whose keyword arguments are the
family's options in params.yaml:

    def tower(image_size: int | None, *, OPTION: TYPE = DEFAULT, ...) -> Tower
        the architecture, its weights come from a checkpoint; None: the model's own size
    def pretrained(
        image_size: int | None, alignment: Sequence[Alignment], *, ...
    ) -> dict[str, Tensor]
        theta_pre: the state of the tower, loaded or made
    def text_head(classes: list[str], templates: list[str], *, ...) -> Tensor
        (classes, features): the zero-shot classifier, logit scale included
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from taskvec.checkpoints import StateDict
from taskvec.errors import IncompatibleWeights
from taskvec.vectors import check_alike

PREFIX = "visual."


@dataclass(frozen=True)
class Alignment:
    """A few labelled pictures of one task, from its training split.

    Attributes:
        images: (N, 3, S, S) uint8.
        labels: (N,) int64.
        classes: class names in label order.
        templates: prompts with one ``{}`` each.
    """

    images: Tensor
    labels: Tensor
    classes: list[str]
    templates: list[str]


@dataclass
class Tower:
    """A vision tower: pictures in, features out. Batch statistics never move.

    Attributes:
        module: normalised pictures (N, 3, S, S) -> features (N, D).
        mean: of the three channels, in [0, 1].
        std: of the three channels, in [0, 1].
        image_size: side of the pictures in pixels.
        identity: what the weights alone do not say: family, architecture, activation.
        frozen: prefixes of parameters that are never fine-tuned.
    """

    module: nn.Module
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    identity: Mapping[str, str]
    frozen: tuple[str, ...] = ()
    device: torch.device = field(default_factory=lambda: default_device())

    def __post_init__(self) -> None:
        # channels last: 1.5 to 2.2 times faster on a CPU
        self.module.to(self.device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

    def edited(self) -> list[str]:
        """Return the sorted names of the parameters that are fine-tuned and edited."""
        names = [PREFIX + name for name, _ in self.module.named_parameters()]
        return sorted(name for name in names if not name.startswith(self.frozen or ("\0",)))

    def state(self) -> dict[str, Tensor]:
        """Return a copy of all parameters and buffers, on the CPU, names as in open_clip."""
        state = self.module.state_dict()
        return {PREFIX + name: value.detach().cpu().clone() for name, value in state.items()}

    def load(self, state: StateDict) -> None:
        """Take over weights; every name, shape and dtype must fit.

        Raises:
            IncompatibleWeights: something is missing, left over or differs.
        """
        check_alike(self.state(), state, "the model", "the checkpoint")
        bare = {name.removeprefix(PREFIX): value for name, value in state.items()}
        self.module.load_state_dict(bare, strict=True)

    def normalize(self, images: Tensor) -> Tensor:
        """Return uint8 pictures (N, 3, S, S) as normalised float32, channels last."""
        mean = torch.tensor(self.mean, device=self.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=self.device).view(1, 3, 1, 1)
        scaled = images.to(self.device).float() / 255
        return ((scaled - mean) / std).contiguous(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> Tensor:
        """Return unit features (N, D) of uint8 pictures (N, 3, S, S)."""
        return self.embed(self.normalize(images))

    def embed(self, normalized: Tensor) -> Tensor:
        """Return unit features (N, D) of pictures that `normalize` made."""
        return functional.normalize(self.module(normalized), dim=-1)


def default_device() -> torch.device:
    """Return the first CUDA device that this process sees, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_identity(tower: Tower, metadata: Mapping[str, object], name: str) -> None:
    """Raise IncompatibleWeights if a checkpoint was written by another kind of tower.

    Weights alone do not tell which activation or preprocessing they were trained with.
    """
    found = metadata.get("identity")
    if found != dict(tower.identity):
        raise IncompatibleWeights(
            f"{name} belongs to the model {found}, but params.yaml says {dict(tower.identity)}; "
            "change model in params.yaml, or run `taskvec run` to make it anew"
        )
