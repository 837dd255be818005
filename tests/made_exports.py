"""A small repository with an edited open_clip model, recorded as DVC records it.

The models are real and tiny; the pictures are not there, only their digests.
"""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ruamel.yaml import YAML
from torch import Tensor

from flows import export
from flows.card import Facts, render
from flows.formats import Layout, stored
from flows.records import Execution
from flows.statement import predicate
from taskvec import checkpoints, tables
from taskvec.mapped import Mapped
from taskvec.metrics import wilson_interval
from taskvec.models import open_clip as family
from tests.test_models import QUICK, register_tiny_models, write_tiny_weights

import pandas as pd  # isort: skip

TASKS = ("digits", "faces")
SOURCE = {"package": "scikit-learn", "version": "1.9.1", "files": {"sklearn/d.csv.gz": "ab" * 32}}
CODE = {"python": "3.11", "packages.torch": "2.13.0"}


@dataclass
class Repository:
    """A checkout whose lock file and cache are written by hand."""

    root: Path
    model: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, Any] = field(default_factory=dict)

    def keep(self, name: str) -> str:
        """Put a file of the checkout into the cache as well, and return its md5."""
        content = (self.root / name).read_bytes()
        md5 = hashlib.md5(content).hexdigest()
        cached = self.cached(md5)
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.write_bytes(content)
        return md5

    def cached(self, md5: str) -> Path:
        """Return where the cache holds a file."""
        return self.root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]

    def write(self, name: str, content: str) -> None:
        """Write a text file."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    def stage(
        self,
        name: str,
        deps: Sequence[str],
        outs: Sequence[str],
        params: Mapping[str, Any],
        code: Mapping[str, Any],
    ) -> None:
        """Record an execution; the files must be there."""
        entry = {
            "cmd": f"python -m tasks {name}",
            "deps": [{"path": path, "md5": self.keep(path)} for path in deps],
            "params": {"params.yaml": dict(params), "code.yaml": {**CODE, **code}},
            "outs": [{"path": path, "md5": self.keep(path)} for path in outs],
        }
        self.stages[name.replace(" ", "-")] = {key: item for key, item in entry.items() if item}

    def lock(self) -> None:
        """Write the lock file."""
        yaml = YAML()
        yaml.default_flow_style = False
        content = {"schema": "2.0", "stages": self.stages}
        with (self.root / "dvc.lock").open("w") as file:
            yaml.dump(json.loads(json.dumps(content)), file)  # a copy, else YAML has anchors


def repository(root: Path) -> Repository:
    """Return a repository with two tasks and the edit ``both`` of seed 0 in all its stages."""
    register_tiny_models(root)
    options = {**write_tiny_weights(root / "weights.safetensors"), "name": QUICK}
    made = Repository(root, {"family": "open_clip", **options})
    made.write("code.yaml", "pretrain: 11111111111111111111111111111111\n")
    model, code = {"model": made.model}, {"pretrain": "1" * 32}
    tower = family.tower(None, **options)
    base = family.pretrained(None, [], **options)
    pretrained = root / "data/checkpoints/pretrained.safetensors"
    origin = checkpoints.save(pretrained, base, "checkpoint", identity=dict(tower.identity))
    made.stage("pretrain", [], ["data/checkpoints/pretrained.safetensors"], model, code)
    vectors = {}
    for number, task in enumerate(TASKS):
        _prepared(made, task)
        vectors[task] = _learnt(made, task, base, tower.edited(), number, origin)
    _edited(made, base, vectors, origin)
    made.lock()
    return made


def _prepared(made: Repository, task: str) -> None:
    outs = [f"data/prepared/{task}/{split}.safetensors" for split in ("train", "test")]
    for out in outs:
        made.write(out, f"pictures of {out}")
    data = {"dataset": task, "source": SOURCE, "train": 200, "validation": 60, "test": 80}
    made.stage(
        f"prepare {task}", [], outs, {f"tasks.{task}.data": data},
        {"pictures": {"image_size": 16, "shots": 0}, f"prepare.{task}": "2" * 32},
    )  # fmt: skip


def _learnt(
    made: Repository,
    task: str,
    base: Mapping[str, Tensor],
    names: list[str],
    seed: int,
    origin: str,
) -> dict[str, Tensor]:
    """Record fine-tuning, extraction and evaluation; return the task vector."""
    generator = torch.Generator().manual_seed(seed)
    vector = {n: 0.01 * torch.randn(base[n].shape, generator=generator) for n in names}
    tuned = {name: value + vector.get(name, 0) for name, value in base.items()}
    paths = {kind: f"data/{kind}/{task}-0.safetensors" for kind in ("checkpoints", "vectors")}
    identity = checkpoints.load(made.root / PRETRAINED, "checkpoint").metadata["identity"]
    mark = checkpoints.save(
        made.root / paths["checkpoints"], tuned, "checkpoint", identity=identity, origin=origin,
        task=task, tasks=[task], seed=0,
    )  # fmt: skip
    checkpoints.save(
        made.root / paths["vectors"], vector, "vector", finetuned=mark, identity=identity,
        origin=origin, task=task, seed=0,
    )  # fmt: skip
    train = f"data/prepared/{task}/train.safetensors"
    code = {"fine_tune": "3" * 32}
    made.stage(
        f"fine_tune {task}-0", [PRETRAINED, train], [paths["checkpoints"]],
        {"fine_tune": {"steps": 6}, "model": made.model}, code,
    )  # fmt: skip
    made.stage(
        f"extract {task}-0", [PRETRAINED, paths["checkpoints"]], [paths["vectors"]], {},
        {"extract": "4" * 32},
    )  # fmt: skip
    table = f"data/evaluations/{task}-0.csv"
    scores(made.root / table, {"pretrained": {task: 40}, "finetuned": {task: 72}})
    made.stage(
        f"evaluate {task}-0", [PRETRAINED, paths["checkpoints"], *tests([task])], [table], {},
        {"evaluate": "5" * 32},
    )  # fmt: skip
    return vector


def _edited(
    made: Repository,
    base: Mapping[str, Tensor],
    vectors: Mapping[str, Mapping[str, Tensor]],
    origin: str,
) -> None:
    """Record combination, search and evaluation."""
    below = "data/edits/both-0"
    total = {name: sum(v[name] for v in vectors.values()) for name in vectors["digits"]}
    operands = [f"data/vectors/{task}-0.safetensors" for task in TASKS]
    expression = "c * (digits + faces)"
    basis = checkpoints.save(
        made.root / below / "basis.safetensors", total, "basis", expression=expression,
        coefficients=["c"], choices=[{}], origin=origin,
    )  # fmt: skip
    made.stage(
        "combine both-0", operands, [f"{below}/basis.safetensors"],
        {"edits.both.expression": expression}, {"combine.both": "6" * 32},
    )  # fmt: skip
    identity = checkpoints.load(made.root / PRETRAINED, "checkpoint").metadata["identity"]
    edited = {name: value + 0.5 * total.get(name, 0) for name, value in base.items()}
    checkpoints.save(
        made.root / below / "model.safetensors", edited, "checkpoint", identity=identity,
        origin=origin, basis=basis, coefficients={"c": 0.5}, choice={}, expression=expression,
        edit="both", seed=0,
    )  # fmt: skip
    summary = {
        "coefficient.c": 0.5, "interval.c.low": 0.25, "interval.c.high": 0.75, "objective": 0.875,
        "feasible": False, "strategy": "grid", "evaluated": 3,
    }  # fmt: skip
    made.write(f"{below}/coefficients.json", json.dumps(summary))
    references = [f"data/evaluations/{task}-0.csv" for task in TASKS]
    made.stage(
        "search both-0", [PRETRAINED, f"{below}/basis.safetensors", *references],
        [f"{below}/coefficients.json", f"{below}/model.safetensors"],
        {
            "edits.both.coefficients": {"c": {"low": 0, "high": 1, "points": 3}},
            "edits.both.objective": {"maximize": "accuracy", "tasks": list(TASKS)},
            "edits.both.constraint": {"tasks": ["faces"], "min_ratio": 0.95},
            "model": made.model,
        },
        {"search.both": "7" * 32},
    )  # fmt: skip
    scores(made.root / "data/evaluations/both-0.csv", {"both": {"digits": 50, "faces": 60}})
    gates = {"feasible.test": "infeasible", "gate.leak": "overridden: the sets are public"}
    made.write("data/evaluations/both-0.json", json.dumps(gates))
    made.stage(
        "evaluate both-0", [PRETRAINED, f"{below}/model.safetensors", *references, *tests(TASKS)],
        ["data/evaluations/both-0.csv", "data/evaluations/both-0.json"],
        {"edits.both.evaluate": list(TASKS)}, {"evaluate": "5" * 32},
    )  # fmt: skip


PRETRAINED = "data/checkpoints/pretrained.safetensors"


def tests(tasks: Sequence[str]) -> list[str]:
    """Return the test data of tasks."""
    return [f"data/prepared/{task}/test.safetensors" for task in tasks]


def scores(path: Path, correct: Mapping[str, Mapping[str, int]], items: int = 80) -> None:
    """Write an evaluation table: model -> task -> how many of ``items`` are right."""
    rows = []
    for model, found in correct.items():
        for task, right in found.items():
            low, high = wilson_interval(right, items)
            for split in ("validation", "test"):
                rows.append(
                    {
                        "model": model, "seed": 0, "task": task, "split": split, "items": items,
                        "correct": right, "accuracy": right / items, "low": low, "high": high,
                        "loss": 1.0, "loss_low": 0.9, "loss_high": 1.1, "normalized": 1.0,
                        "ratio": 1.0, "chance": 0.1,
                    }
                )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    tables.write(path, pd.DataFrame(rows), tables.Evaluation)


def tiny_export(directory: Path, seed: int) -> None:
    """Write an export of a few random tensors with a random lineage."""
    draw = random.Random(seed)
    numbers = np.random.default_rng(seed)
    tensors = {
        f"visual.{name}": torch.from_numpy(
            numbers.standard_normal([draw.randint(0, 5) for _ in range(draw.randint(0, 3))])
        ).to(draw.choice([torch.float32, torch.float16, torch.int64]))
        for name in ["a", "b.weight", *map(str, range(draw.randint(0, 4)))]
    }
    held = Mapped(stored(tensors), "tiny")
    metadata = {
        "fingerprint": held.measure(), "origin": _hex(draw, 64), "expression": "c * digits",
        "identity": {"name": "tiny", "activation": "gelu", "image_size": "16"},
        "coefficients": {"c": draw.random()}, "edit": "tiny", "seed": seed,
    }  # fmt: skip
    edited = Mapped(held.tensors, "tiny", metadata)
    whole = draw.random() < 0.5
    layout = Layout(
        draw.choice(["model.safetensors", "open_clip_model.safetensors"]),
        Mapped({**edited.tensors, **stored({"text": torch.ones(2)})}, "w") if whole else edited,
        {f"{name}.json": json.dumps(draw.random()) for name in "ab"[: draw.randint(0, 2)]},
        "taskvec", "image-feature-extraction", "pass\n", "tiny",
        kind="export" if whole else "checkpoint",
    )  # fmt: skip
    facts = Facts(
        title="tiny", expression="c * digits", coefficients=edited.metadata["coefficients"],
        choice={}, seed=seed, origin=str(edited.metadata["origin"]),
        fingerprint=edited.fingerprint, base="tiny", library="taskvec",
        pipeline="image-feature-extraction", usage="pass\n",
    )  # fmt: skip
    directory.mkdir()
    chain = executions(draw)
    statement = predicate({"seed": seed}, chain, chain[:1], {}, head=_hex(draw, 40))
    export.write(directory, layout, edited, render(facts), statement)


def executions(draw: random.Random) -> list[Execution]:
    """Return a random lineage."""
    return [
        Execution(
            f"python -m tasks {draw.choice(['search', 'combine'])} both-{number}",
            {f"data/in-{number}": _hex(draw, 32)},
            {f"data/out-{number}": _hex(draw, 32)},
            {"params.yaml": {"seed": draw.random()}, "code.yaml": {**CODE, "x": _hex(draw, 32)}},
            {
                "mlflow_run": _hex(draw, 32),
                "who": "Ada@engine",
                "when": "2026-01-02T03:04:05+00:00",
            },
        )
        for number in range(draw.randint(1, 4))
    ]


def _hex(draw: random.Random, length: int) -> str:
    return "".join(draw.choice("0123456789abcdef") for _ in range(length))
