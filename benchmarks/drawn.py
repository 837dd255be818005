"""A small experiment of drawn weights and pictures, searched: what `--quick` measures."""

import json
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from tasks import inputs, stages
from tasks.artifacts import Artifacts
from taskvec import checkpoints, params, tables
from taskvec.atomic import write_text
from taskvec.metrics import wilson_interval
from taskvec.numeric import make_deterministic
from taskvec.towers import Tower

SEED = 0
SIZE, PICTURES, CLASSES = 32, 20, 4
TASKS = ("first", "second")
CHANGE = 0.1  # of a vector, relative to the weights


def experiment(root: Path) -> None:
    """Write params.yaml and what the searches of all its edits read and write.

    The stages that come before combine are left out: their outputs are drawn.
    """
    make_deterministic()
    checked = params.validate(_params())
    write_text(root / "params.yaml", json.dumps(_params(), indent=1))
    artifacts = Artifacts(root)
    torch.manual_seed(SEED)
    tower = inputs.architecture(checked.model)
    _draw(artifacts, tower)
    for edit in checked.edits:
        for stage in ("combine", "search"):
            stages.run(stage, f"{edit}-{SEED}", checked, artifacts, lambda progress: None)


def _params() -> dict[str, object]:
    source = {"package": "scikit-learn", "version": "0", "files": {"a.csv": "0" * 64}}
    number = {"train": PICTURES, "validation": PICTURES, "test": PICTURES}
    classes = [f"class {label}" for label in range(CLASSES)]
    task = {
        "data": {"dataset": "digits", "source": source, **number},
        "head": {"kind": "text", "classes": classes, "templates": ["{}"]},
        "fine_tune": {},
    }
    recipe = {"steps": 1, "batch_size": 1, "learning_rate": 1e-3, "weight_decay": 0.0,
              "warmup": 0.0, "clip_norm": 1.0}  # fmt: skip
    values = {"low": 0.0, "high": 1.0, "points": 21}
    both = {"maximize": "normalized_accuracy", "tasks": list(TASKS)}
    return {
        "seeds": [SEED],
        "model": {"family": "bundled", "image_size": SIZE},
        "fine_tune": recipe,
        "tasks": dict.fromkeys(TASKS, task),
        "edits": {
            "addition": {
                "expression": "c * (first + second)",
                "coefficients": {"c": values},
                "objective": both,
                "evaluate": list(TASKS),
            },
            "analogy_two": {
                "expression": "a * first + b * second",
                "coefficients": {"a": {**values, "points": 5}, "b": {**values, "points": 5}},
                "objective": {"maximize": "accuracy", "tasks": ["second"]},
                "constraint": {"tasks": ["first"], "min_ratio": 0.5},
                "evaluate": list(TASKS),
            },
        },
    }


@torch.no_grad()
def _draw(artifacts: Artifacts, tower: Tower) -> None:
    """Write theta_pre, and of each task pictures, a head, a vector and reference levels."""
    state, edited = tower.state(), tower.edited()
    identity = dict(tower.identity)
    origin = checkpoints.save(
        artifacts.pretrained(), state, "checkpoint", edited=edited, identity=identity
    )
    for task in TASKS:
        vector = {name: CHANGE * torch.randn_like(state[name]) * state[name] for name in edited}
        checkpoints.save(
            artifacts.vector(task, SEED), vector, "vector", origin=origin, identity=identity
        )
        images = torch.randint(0, 256, (PICTURES, 3, SIZE, SIZE), dtype=torch.uint8)
        labels = torch.arange(PICTURES) % CLASSES
        checkpoints.save(artifacts.head(task), {"head": _head(tower.features(images))}, "head")
        checkpoints.save(
            artifacts.images(task, "validation"), {"images": images, "labels": labels}, "images"
        )
        table = pd.DataFrame([_level(task, name) for name in ("pretrained", "finetuned")])
        tables.write(artifacts.evaluation(task, SEED), table, tables.Evaluation)


def _head(features: Tensor) -> Tensor:
    """Return a drawn classifier that sees only how pictures differ, (classes, D).

    All features (N, D) of drawn weights point the same way, and so would all answers.
    """
    common = functional.normalize(features.mean(0), dim=0)
    drawn = torch.randn(CLASSES, len(common))
    return 20 * (drawn - (drawn @ common).outer(common))


def _level(task: str, model: str) -> dict[str, object]:
    correct = PICTURES // CLASSES
    low, high = wilson_interval(correct, PICTURES)
    return {
        "model": model, "seed": SEED, "task": task, "split": "validation", "items": PICTURES,
        "correct": correct, "accuracy": correct / PICTURES, "low": low, "high": high,
        "loss": 1.0, "loss_low": 1.0, "loss_high": 1.0, "normalized": 1.0, "ratio": 1.0,
        "chance": 1 / CLASSES,
    }  # fmt: skip
