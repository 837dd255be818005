"""Evaluate models on validation and test data, with intervals."""

import json
from math import isnan
from pathlib import Path

import pandas as pd

from tasks.artifacts import Artifacts
from tasks.inputs import architecture, checkpoint, head, images
from tasks.stages import Emit
from taskvec import pictures as drawing
from taskvec import tables
from taskvec.atomic import write_text
from taskvec.metrics import Pictures, count_correct, normalized_accuracy, ratio, wilson_interval
from taskvec.params import Model
from taskvec.summaries import Estimate
from taskvec.towers import Tower


def evaluate(
    artifacts: Artifacts, *, name: str, seed: int, model: Model, tasks: list[str] | None, emit: Emit
) -> None:
    """Write the accuracy table of a task's own models, or of an edit.

    Args:
        artifacts: where files lie.
        name: a task, or an edit.
        seed: of the fine-tuned models.
        model: architecture.
        tasks: what to evaluate an edit on; None for a task: its pre-trained and fine-tuned model.
        emit: is told the progress.
    """
    tower = architecture(model)
    pretrained = checkpoint(artifacts.pretrained(), tower)
    if tasks is None:
        models = {
            "pretrained": artifacts.pretrained(),
            "finetuned": artifacts.checkpoint(name, seed),
        }
    else:
        models = {name: artifacts.edited(name, seed)}
    counts: list[dict[str, object]] = []
    for label, path in models.items():
        origin = "" if label == "pretrained" else pretrained.fingerprint
        tower.load(checkpoint(path, tower, origin).tensors)
        for task in tasks or [name]:
            for split in ("validation", "test"):
                counted = evaluated(artifacts, tower, task, split)
                counts.append({"model": label, "seed": seed, **counted})
                emit({"step": len(counts), "steps": len(models) * len(tasks or [name]) * 2})
    known = _references(artifacts, tasks or [], seed)
    table = _with_shares(pd.DataFrame(counts), known)
    tables.write(artifacts.evaluation(name, seed), table, tables.Evaluation)
    write_text(artifacts.figure(name, seed), _picture(pd.concat([*known, table])))
    _write_metrics(artifacts.metrics(name, seed), table, several=tasks is not None)


def evaluated(artifacts: Artifacts, tower: Tower, task: str, split: str) -> dict[str, object]:
    """Return how many items of a task's split the tower gets right, of how many."""
    weights = head(artifacts, task)
    pictures = Pictures(tower, *images(artifacts, task, split))
    correct = count_correct(tower, weights, pictures)
    return {
        "task": task, "split": split, "items": len(pictures), "correct": correct,
        "chance": 1 / len(weights),
    }  # fmt: skip


def _with_shares(table: pd.DataFrame, known: list[pd.DataFrame]) -> pd.DataFrame:
    """Return the table with accuracy, interval, normalised accuracy and ratio.

    Args:
        table: counts; for a task's own models they are their own references.
        known: the evaluations of the pre-trained and fine-tuned models, for an edit.
    """
    bounds = [wilson_interval(c, n) for c, n in zip(table["correct"], table["items"], strict=True)]
    table = table.assign(
        accuracy=table["correct"] / table["items"],
        low=[low for low, _ in bounds],
        high=[high for _, high in bounds],
    )
    references = pd.concat(known or [table])
    accuracy = references.set_index(["model", "task", "split"])["accuracy"]
    keys = list(zip(table["task"], table["split"], strict=True))
    return table.assign(
        normalized=[
            normalized_accuracy(value, accuracy["finetuned", *key])
            for value, key in zip(table["accuracy"], keys, strict=True)
        ],
        ratio=[
            ratio(value, accuracy["pretrained", *key])
            for value, key in zip(table["accuracy"], keys, strict=True)
        ],
    )


def _references(artifacts: Artifacts, tasks: list[str], seed: int) -> list[pd.DataFrame]:
    return [tables.read(artifacts.evaluation(task, seed), tables.Evaluation) for task in tasks]


def _picture(table: pd.DataFrame) -> str:
    """Return test accuracies as bars, by task; an edit beside what it started from and aims at."""
    rows = [
        drawing.Bar(
            f"{row['task']}, {row['model']}",
            Estimate(row["accuracy"], row["low"], row["high"]),
            reference=row["model"] == "pretrained",
        )
        for _, group in table[table["split"] == "test"].groupby("task", sort=False)
        for row in group.to_dict("records")
    ]
    return drawing.bars(rows, "evaluation", "accuracy on test data with 95 % intervals")


def _write_metrics(path: Path, table: pd.DataFrame, *, several: bool) -> None:
    flat: dict[str, float] = {}
    for row in table.to_dict("records"):
        subject = row["task"] if several else row["model"]
        flat[f"{row['split']}.accuracy.{subject}"] = row["accuracy"]
        if several:
            flat[f"{row['split']}.normalized.{subject}"] = row["normalized"]
            if not isnan(row["ratio"]):
                flat[f"{row['split']}.ratio.{subject}"] = row["ratio"]
    if several:
        for split, rows in table.groupby("split"):
            flat[f"{split}.mean_normalized"] = float(rows["normalized"].mean())
    write_text(path, json.dumps(flat, indent=2, sort_keys=True) + "\n")
