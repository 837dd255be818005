"""The bundled tower with drawn weights: a family whose pre-trained model and heads cost nothing.

`benchmarks.pipeline` copies it to taskvec/models/ of its checkouts. What is left of every stage is
the code around the work: imports, files, checks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from taskvec.models import bundled
from taskvec.towers import Alignment, Tower


def tower(image_size: int | None) -> Tower:
    """Return the bundled vision tower with random weights."""
    return bundled.tower(image_size)


def pretrained(image_size: int | None, alignment: Sequence[Alignment]) -> dict[str, Tensor]:
    """Return drawn weights, always the same."""
    torch.manual_seed(0)
    return tower(image_size).state()


def text_head(classes: list[str], templates: list[str]) -> Tensor:
    """Return drawn unit vectors, (classes, features)."""
    draw = torch.Generator().manual_seed(0)
    return functional.normalize(torch.randn(len(classes), bundled.EMBED_DIM, generator=draw))
