"""The smallest whole experiment: a perceptron, one task and one edit, in nine quick stages.

For trials by the hundred. The model is a family of the project's own, which needs torch and nothing
else; the pictures lie outside, below TASKVEC_DATA.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from tests.project import Project

FAMILY = '''"""A perceptron on the pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from taskvec.towers import PREFIX, Alignment, Tower


def tower(image_size: int | None, *, width: int = 16) -> Tower:
    """Return the tower; its weights are the same in every process."""
    size = image_size or 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Flatten(), nn.Linear(3 * size * size, width), nn.ReLU(), nn.Linear(width, 8)]
        module = nn.Sequential(*layers)
    identity = {"family": "perceptron", "width": str(width), "image_size": str(size)}
    return Tower(module, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), size, identity)


def pretrained(
    image_size: int | None, alignment: Sequence[Alignment], *, width: int = 16
) -> dict[str, Tensor]:
    """Return the weights that nobody has trained."""
    del alignment
    return tower(image_size, width=width).state()
'''

EXPERIMENT = """
seeds: [0]
gates: {expert_tolerance: 0.005, leak_margin: 0.3, leak_level: 0.001}
model: {family: perceptron, image_size: 8, align_tasks: []}
fine_tune:
  {steps: 8, batch_size: 8, learning_rate: 1e-3, weight_decay: 0.0, warmup: 0.1, clip_norm: 1.0}
tasks:
  colours:
    data:
      dataset: npz
      source: {external: colours, files: {colours.npz: DIGEST}}
      train: 48
      validation: 24
      test: 24
    head: {kind: prototypes, classes: [red, green, blue]}
    fine_tune: {}
edits:
  half:
    expression: c * colours
    coefficients: {c: {low: 0, high: 1, points: 3}}
    objective: {maximize: accuracy, tasks: [colours]}
    evaluate: [colours]
"""

TARGET = "evaluate-half-0"  # all but the report, which imports more than all others together
STAGES = {
    "prepare@colours", "pretrain", "head@colours", "fine_tune@colours-0", "extract@colours-0",
    "evaluate@colours-0", "combine-half-0", "search-half-0", "evaluate-half-0",
}  # fmt: skip
LEFT_OUT = ("benchmarks", "docs", "experiments", "tests")


def create(directory: Path, server: dict[str, str]) -> Project:
    """Return a checkout with this experiment; nothing has run.

    Args:
        directory: gets the checkout and the pictures.
        server: the environment that leads to the servers.
    """
    environment = {
        **server,
        "TASKVEC_DATA": str(directory / "sets"),
        "PYTHONDONTWRITEBYTECODE": "",
    }
    digest = _pictures(directory / "sets" / "colours.npz")
    return Project.create(
        directory / "checkout",
        environment,
        EXPERIMENT.replace("DIGEST", digest),
        {"taskvec/models/perceptron.py": FAMILY},
        LEFT_OUT,
    )


def _pictures(path: Path) -> str:
    """Write pictures whose label is the brightest channel; return the digest of the file."""
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, number in (("train", 60), ("val", 30), ("test", 30)):
        labels = np.arange(number) % 3
        images = random.integers(0, 150, (number, 8, 8, 3), dtype=np.uint8)
        images[np.arange(number), :, :, labels] += 60
        arrays |= {f"x_{split}": images, f"y_{split}": labels.astype(np.uint8)}
    path.parent.mkdir(parents=True)
    np.savez(path, **arrays)
    return hashlib.sha256(path.read_bytes()).hexdigest()
