"""Stage prepare: from the files of a source to resized pictures in three splits."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from tasks.artifacts import Artifacts
from tasks.stages import Emit
from taskvec import checkpoints, plugins, tables
from taskvec.atomic import write_text
from taskvec.datasets import sources
from taskvec.datasets.items import SPLITS, Items
from taskvec.datasets.splitting import (
    assign,
    digests,
    near_duplicates,
    order,
    resize,
    stratify,
)
from taskvec.errors import InvalidData
from taskvec.sections import Data, Source


def prepare(
    artifacts: Artifacts,
    *,
    task: str,
    data: Data,
    classes: list[str],
    templates: list[str],
    image_size: int,
    shots: int,
    emit: Emit,
) -> None:
    """Write the pictures of each split, the alignment pictures, the table of items and a summary.

    Pictures count as equal when they are after resizing. Each split is in the drawing order, which
    mixes the classes, and every beginning of validation has them in nearly equal proportions, since
    searches ask the first items first; the alignment pictures are the first of each class of train.

    Args:
        artifacts: where the files go.
        task: the name of the task.
        data: adapter, source and sizes.
        classes: names in label order, and
        templates: prompts; they go with the alignment pictures, which are fitted to them.
        image_size: side of the pictures in pixels.
        shots: the alignment pictures a class; with 0 none is marked as such, and the file, which
            nobody reads then, has one a class.
        emit: is told the progress.

    Raises:
        MissingDependency: the package that ships the data is not installed.
        MissingArtifact: an external file is not below the data root.
        InvalidData: the data is not what is declared, or there is too little.
    """
    del emit
    files = sources.locate(data.source)
    items = plugins.load("datasets", data.dataset).load(files, **data.options)
    _check_classes(items, classes, task)
    items = replace(items, images=resize(items.images, image_size))
    sizes = {"train": data.train, "validation": data.validation, "test": data.test}
    splits = assign(items, sizes, data.seed)
    rows = {split: [i for i in order(items, data.seed) if splits[i] == split] for split in SPLITS}
    rows["validation"] = stratify(items, rows["validation"])
    aligned = _first_of_each_class(items, rows["train"], max(1, shots), task)
    table = tables.check(_table(items, rows, aligned if shots else []), tables.Items, task)
    _save(artifacts, task, "alignment", items, aligned, classes=classes, templates=templates)
    for split, positions in rows.items():
        _save(artifacts, task, split, items, positions)
    tables.write(artifacts.items(task), table, tables.Items)
    summary = _summary(items, rows, data.source)
    text = json.dumps(summary, indent=2, sort_keys=True) + "\n"
    write_text(artifacts.summary(task), text)


def _check_classes(items: Items, classes: list[str], task: str) -> None:
    found = items.classes or int(items.labels.max()) + 1
    if found != len(classes):
        raise InvalidData(
            f"{task} has {found} classes, but tasks.{task}.head.classes names {len(classes)}"
        )


def _first_of_each_class(items: Items, train: Sequence[int], shots: int, task: str) -> list[int]:
    """Return the positions of the first ``shots`` training items of each class."""
    seen: Counter[int] = Counter()
    chosen = []
    for i in train:
        label = int(items.labels[i])
        seen[label] += 1
        if seen[label] <= shots:
            chosen.append(i)
    for label in sorted(set(items.labels.tolist())):
        if seen[label] < shots:
            raise InvalidData(
                f"{task} has {seen[label]} training items of class {label}, but {shots} a class "
                "align the base; raise data.train or lower model.shots in params.yaml"
            )
    return chosen


def _save(
    artifacts: Artifacts, task: str, name: str, items: Items, rows: Sequence[int], **extra: object
) -> None:
    positions: NDArray[np.int64] = np.array(rows, dtype=np.int64)
    tensors = {
        "images": torch.from_numpy(items.images[positions]),  # (n, 3, S, S)
        "labels": torch.from_numpy(items.labels[positions]),  # (n,)
    }
    checkpoints.save(
        artifacts.images(task, name), tensors, kind="images", task=task, split=name, **extra
    )


def _table(items: Items, rows: Mapping[str, list[int]], aligned: Sequence[int]) -> pd.DataFrame:
    marks, chosen = digests(items.images), set(aligned)
    records = [
        (place, split, items.groups[i], int(items.labels[i]), marks[i], i in chosen)
        for split, positions in rows.items()
        for place, i in enumerate(positions)
    ]
    columns = ["item", "split", "group", "label", "digest", "alignment"]
    table = pd.DataFrame.from_records(records, columns=columns)
    return table if items.classes is None else table.assign(classes=items.classes)


def _summary(items: Items, rows: Mapping[str, list[int]], source: Source) -> dict[str, object]:
    used = [i for positions in rows.values() for i in positions]
    splits = [split for split, positions in rows.items() for _ in positions]
    return {
        **{split: len(positions) for split, positions in rows.items()},
        "duplicates_removed": len(items.labels) - len(set(digests(items.images))),
        "near_duplicates": near_duplicates(items.images[used], splits),
        **sources.recorded(source),
    }
