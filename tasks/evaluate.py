"""Evaluate models on validation and test data, with intervals, and ask the gates."""

import json
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from tasks.artifacts import Artifacts
from tasks.inputs import architecture, checkpoint, head, images
from tasks.stages import Emit
from taskvec import gates as gating
from taskvec import pictures as drawing
from taskvec import tables
from taskvec.answers import answer, join
from taskvec.atomic import write_text
from taskvec.gates import Count, Feasibility, Finding
from taskvec.metrics import Pictures, normalized_accuracy, ratio, wilson_interval
from taskvec.params import Constraint, Gates
from taskvec.sections import Model
from taskvec.summaries import Estimate, Score
from taskvec.towers import Tower

Kind = Literal["task", "variant", "edit"]
SPLITS = ("validation", "test")


def evaluate(
    artifacts: Artifacts,
    *,
    kind: Kind,
    name: str,
    seed: int,
    model: Model,
    tasks: list[str],
    vectors: list[str],
    constraint: Constraint | None,
    gates: Gates,
    checks: int,
    emit: Emit,
) -> None:
    """Write the table of a task's own models, of a variant or of an edit: accuracy and loss.

    Args:
        artifacts: where files lie.
        kind: what is evaluated: the pre-trained and the fine-tuned model of a task, another way to
            fine-tune, or an edit.
        name: of the task, variant or edit.
        seed: of the fine-tuned models.
        model: architecture.
        tasks: what to evaluate on; for a task only itself.
        vectors: the tasks whose training data went into the model.
        constraint: what an edit must keep; test data says whether it does.
        gates: when to stop.
        checks: how many comparisons of test with validation accuracy the experiment makes; they
            share the level of the test.
        emit: is told the progress.

    Raises:
        GateClosed: the model is not what its header says, or test data was trained on. Nothing is
            written.
    """
    path = artifacts.edited(name, seed) if kind == "edit" else artifacts.checkpoint(name, seed)
    models = {"finetuned" if kind == "task" else name: path}
    if kind == "task":
        models = {"pretrained": artifacts.pretrained(), **models}
    counts, metadata = _measure(artifacts, model, models, tasks, seed, emit)
    items = {
        task: tables.read(artifacts.items(task), tables.Items)
        for task in dict.fromkeys([*tasks, *vectors])
    }
    scores = _scored(counts[counts["model"] != "pretrained"], items)
    file = str(path.relative_to(artifacts.root))
    findings = [_leak_gate(name, file, scores, items, vectors, gates, checks)]
    if kind != "edit":
        findings.append(_expert_gate(name, file, scores, metadata, gates))
    record: dict[str, str] = gating.settle(findings, gates.override)
    known = [] if kind == "task" else _references(artifacts, tasks, seed)
    table = _with_shares(counts, known)
    if kind == "edit":
        record["feasible.test"] = _feasibility(constraint, table, known)
    tables.write(artifacts.evaluation(name, seed), table, tables.Evaluation)
    write_text(artifacts.figure(name, seed), _picture(pd.concat([*known, table])))
    _write_metrics(artifacts.metrics(name, seed), table, record, several=kind != "task")


def _measure(
    artifacts: Artifacts,
    model: Model,
    models: Mapping[str, Path],
    tasks: Sequence[str],
    seed: int,
    emit: Emit,
) -> tuple[pd.DataFrame, Mapping[str, Any]]:
    """Return what `evaluated` says of each model, task and split, and the last model's metadata."""
    tower = architecture(model)
    pretrained = checkpoint(artifacts.pretrained(), tower)
    rows: list[dict[str, object]] = []
    for label, path in models.items():
        origin = "" if label == "pretrained" else pretrained.fingerprint
        weights = checkpoint(path, tower, origin)
        tower.load(weights.tensors)
        for task in tasks:
            for split in SPLITS:
                rows.append(
                    {"model": label, "seed": seed, **evaluated(artifacts, tower, task, split)}
                )
                emit({"step": len(rows), "steps": len(models) * len(tasks) * len(SPLITS)})
    return pd.DataFrame(rows), weights.metadata


def evaluated(artifacts: Artifacts, tower: Tower, task: str, split: str) -> dict[str, object]:
    """Return how a tower does on a task's split.

    Returns:
        task, split, the number of items, how many of them are correct, chance (1 / classes), and
        the mean cross-entropy in nats with its 95 % interval: loss, loss_low, loss_high.
    """
    weights = head(artifacts, task)
    pictures = Pictures(tower, *images(artifacts, task, split))
    answers = join(answer(tower, weights, pictures, chunk) for chunk in range(pictures.chunks))
    loss = Estimate.of_mean(answers.loss)
    return {
        "task": task, "split": split, "items": len(answers), "correct": int(answers.correct.sum()),
        "chance": 1 / len(weights), "loss": loss.value, "loss_low": loss.low,
        "loss_high": loss.high,
    }  # fmt: skip


def _with_shares(table: pd.DataFrame, known: list[pd.DataFrame]) -> pd.DataFrame:
    """Return the table with accuracy, interval, normalised accuracy and ratio.

    Args:
        table: counts; for a task's own models they are their own references.
        known: the evaluations of the pre-trained and fine-tuned models, for a variant or an edit.
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


def _scored(
    table: pd.DataFrame, items: Mapping[str, pd.DataFrame]
) -> dict[str, tuple[Count, Count]]:
    """Return task -> counts on validation and on test data of the only model of a table."""
    rows = table.set_index(["task", "split"])
    groups = {task: found.groupby("split")["group"].nunique() for task, found in items.items()}
    found = {}
    for task in dict.fromkeys(table["task"]):
        validation, test = (
            Count(
                int(rows.loc[(task, split), "correct"]),
                int(rows.loc[(task, split), "items"]),
                int(groups[task][split]),
            )
            for split in SPLITS
        )
        found[task] = (validation, test)
    return found


def _expert_gate(
    name: str,
    file: str,
    scores: Mapping[str, tuple[Count, Count]],
    metadata: Mapping[str, Any],
    gates: Gates,
) -> Finding:
    recorded = gating.recorded_score(metadata, file)
    measured = {task: validation for task, (validation, _) in scores.items()}
    return gating.expert(name, file, recorded, measured, gates.expert_tolerance)


def _leak_gate(
    name: str,
    file: str,
    scores: Mapping[str, tuple[Count, Count]],
    items: Mapping[str, pd.DataFrame],
    vectors: Sequence[str],
    gates: Gates,
    checks: int,
) -> Finding:
    leaked = gating.leaks(
        {task: _places(items[task], "train") for task in vectors},
        {task: _places(items[task], "test") for task in scores},
    )
    level = gates.leak_level / checks
    return gating.leak(name, file, leaked, scores, margin=gates.leak_margin, level=level)


def _places(items: pd.DataFrame, split: str) -> dict[str, int]:
    """Return digest -> place of the items of a split."""
    rows = items[items["split"] == split]
    return dict(zip(rows["digest"], map(int, rows["item"]), strict=True))


def _feasibility(
    constraint: Constraint | None, table: pd.DataFrame, known: Sequence[pd.DataFrame]
) -> Feasibility:
    pretrained = pd.concat(known)
    return gating.feasibility(
        constraint, _scores(table), _scores(pretrained[pretrained["model"] == "pretrained"])
    )


def _scores(table: pd.DataFrame) -> dict[str, Score]:
    """Return task -> score on test data of the only model of a table."""
    test = table[table["split"] == "test"]
    return {str(row["task"]): Score.of_row(row) for row in test.to_dict("records")}


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


def _write_metrics(
    path: Path, table: pd.DataFrame, record: Mapping[str, str], *, several: bool
) -> None:
    """Write the table flat, with the gap from validation to test accuracy, and the gates."""
    flat: dict[str, float | str] = dict(record)
    for row in table.to_dict("records"):
        subject = row["task"] if several else row["model"]
        flat[f"{row['split']}.accuracy.{subject}"] = row["accuracy"]
        flat[f"{row['split']}.loss.{subject}"] = row["loss"]
        if several:
            flat[f"{row['split']}.normalized.{subject}"] = row["normalized"]
            if not isnan(row["ratio"]):
                flat[f"{row['split']}.ratio.{subject}"] = row["ratio"]
    if several:
        for split, rows in table.groupby("split"):
            flat[f"{split}.mean_normalized"] = float(rows["normalized"].mean())
        accuracy = table.set_index(["task", "split"])["accuracy"]
        for task in dict.fromkeys(table["task"]):
            flat[f"gap.{task}"] = float(accuracy[task, "validation"] - accuracy[task, "test"])
    write_text(path, json.dumps(flat, indent=2, sort_keys=True) + "\n")
