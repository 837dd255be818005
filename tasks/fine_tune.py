"""Fine-tune one task, or several at once, from theta_pre."""

from dataclasses import asdict

import pandas as pd

from tasks.artifacts import Artifacts
from tasks.inputs import architecture, checkpoint, head, images
from tasks.stages import Emit
from taskvec import tables
from taskvec.checkpoints import save
from taskvec.metrics import Pictures, count_correct
from taskvec.sections import FineTune, Model
from taskvec.training import Lesson, Step
from taskvec.training import fine_tune as train


def fine_tune(
    artifacts: Artifacts,
    *,
    expert: str,
    seed: int,
    tasks: list[str],
    model: Model,
    recipe: FineTune,
    emit: Emit,
) -> None:
    """Write theta_ft and its training curve.

    Args:
        artifacts: where files lie.
        expert: what the result is called: the task, or a variant of how to learn it.
        seed: decides the order of the pictures.
        tasks: what it learns; several are learnt jointly.
        model: architecture.
        recipe: steps, rate and so on.
        emit: is told the progress.

    The header records what the model in memory scores on validation data, so that whoever reads
    the file later can tell whether it is that model.
    """
    tower = architecture(model)
    pretrained = checkpoint(artifacts.pretrained(), tower)
    tower.load(pretrained.tensors)

    def tell(step: Step) -> None:
        emit({**asdict(step), "steps": recipe.stop_after or recipe.steps})

    lessons = [Lesson(head(artifacts, task), *images(artifacts, task, "train")) for task in tasks]
    steps = train(tower, lessons, recipe, seed, on_step=tell)
    curve = pd.DataFrame([asdict(step) for step in steps])
    tables.write(artifacts.training(expert, seed), curve, tables.Training)
    scores = {}
    for task in tasks:
        pictures = Pictures(tower, *images(artifacts, task, "validation"))
        correct = count_correct(tower, head(artifacts, task), pictures)
        scores[task] = {"correct": correct, "items": len(pictures)}
    save(
        artifacts.checkpoint(expert, seed),
        tower.state(),
        kind="checkpoint",
        identity=dict(tower.identity),
        origin=pretrained.fingerprint,
        task=expert,
        tasks=tasks,
        score={"split": "validation", "tasks": scores},
        seed=seed,
    )
