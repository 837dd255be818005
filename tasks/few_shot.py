"""Fine-tune edited models and the pre-trained one on a few labelled images a class."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tasks.artifacts import Artifacts
from tasks.inputs import architecture, checkpoint, head, images
from tasks.stages import Emit
from taskvec import tables
from taskvec.errors import InvalidData
from taskvec.metrics import Pictures, count_correct
from taskvec.params import FewShot
from taskvec.random_masks import lanes
from taskvec.sections import FineTune, Model
from taskvec.study_tables import EVALUATED, FewShotTable, shares
from taskvec.training import Lesson, fine_tune


def few_shot(
    artifacts: Artifacts,
    *,
    name: str,
    seed: int,
    model: Model,
    few: FewShot,
    recipe: FineTune,
    emit: Emit,
) -> None:
    """Write the accuracy of every start after fine-tuning on every number of images a class.

    Every start learns from the same images in the same order; more images hold the fewer.

    Args:
        artifacts: where files lie.
        name: of the study.
        seed: of the edits; decides the images and the order of the batches.
        model: architecture.
        few: task, starts and numbers of images a class; 0 is the start as it is.
        recipe: how to fine-tune; a batch is at most what there is.
        emit: is told the progress.

    Raises:
        InvalidData: a class has too few training images.

    Source: arXiv:2212.04089, section 5 (analogies, few labelled samples).
    """
    tower = architecture(model)
    pretrained = checkpoint(artifacts.pretrained(), tower)
    weights = head(artifacts, few.task)
    train, labels = images(artifacts, few.task, "train")
    rows = {shots: drawn(labels, shots, seed, few.task) for shots in few.shots}
    data = {split: Pictures(tower, *images(artifacts, few.task, split)) for split in EVALUATED}
    results: list[dict[str, object]] = []
    for start in ["pretrained", *few.edits]:
        state = pretrained.tensors
        if start != "pretrained":
            state = checkpoint(artifacts.edited(start, seed), tower, pretrained.fingerprint).tensors
        for shots in sorted(rows):
            tower.load(state)
            if shots:
                lesson = Lesson(weights, train[rows[shots]], labels[rows[shots]])
                fine_tune(tower, [lesson], _fitted(recipe, len(lesson.labels)), seed)
            for split, pictures in data.items():
                correct = count_correct(tower, weights, pictures)
                results.append(
                    {
                        "start": start,
                        "shots": shots,
                        "split": split,
                        **shares(correct, len(pictures)),
                    }
                )
            emit({"step": len(results) // len(data), "steps": (1 + len(few.edits)) * len(rows)})
    tables.write(artifacts.few_shot(name, seed), pd.DataFrame(results), FewShotTable)


def drawn(labels: Tensor, shots: int, seed: int, task: str) -> Tensor:
    """Return the positions of some images of each class, in the order in which they are drawn.

    Classes of the head that have no training images at all are left out.

    Args:
        labels: (N,) of the training images.
        shots: images a class; the positions of more hold those of fewer.
        seed: decides which.
        task: whose images they are.

    Raises:
        InvalidData: a class has fewer.
    """
    keys = lanes(seed, "few_shot", task, 0, len(labels))
    order = torch.from_numpy(np.argsort(keys, kind="stable"))
    taken = []
    for label in labels.unique().tolist():
        own = order[labels[order] == label][:shots]
        if len(own) < shots:
            raise InvalidData(
                f"{task} has {len(own)} training images of class {label}, but few_shots asks for "
                f"{shots} a class; raise tasks.{task}.data.train or lower shots in params.yaml"
            )
        taken.append(own)
    chosen = torch.isin(order, torch.cat(taken))
    return order[chosen]


def _fitted(recipe: FineTune, items: int) -> FineTune:
    return recipe.model_copy(update={"batch_size": min(recipe.batch_size, items)})
