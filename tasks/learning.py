"""What fine-tuning does, in one process or in each of several that train together."""

import time
from dataclasses import asdict

import pandas as pd

from tasks.artifacts import Artifacts
from tasks.inputs import architecture, checkpoint, head, images
from tasks.stages import Emit
from taskvec import tables
from taskvec.checkpoints import save
from taskvec.metrics import Pictures, count_correct
from taskvec.parallel import Alone, Group
from taskvec.passes import Passage
from taskvec.sections import FineTune, Model
from taskvec.training import Lesson, Step, fine_tune


def learn(
    artifacts: Artifacts,
    *,
    expert: str,
    seed: int,
    tasks: list[str],
    model: Model,
    recipe: FineTune,
    emit: Emit,
    group: Group | None = None,
) -> None:
    """Train, and write theta_ft and its training curve if this is the first process.

    Args:
        artifacts: where files lie.
        expert: what the result is called: the task, or a variant of how to learn it.
        seed: decides the order of the pictures.
        tasks: what it learns; several are learnt jointly.
        model: architecture.
        recipe: steps, rate and so on.
        emit: is told the progress.
        group: the processes that train together.

    The header records what the model in memory scores on validation data, so that whoever reads
    the file later can tell whether it is that model.
    """
    group = group or Alone()
    tower = architecture(model)
    passage = Passage(tower, recipe, group)
    pretrained = checkpoint(artifacts.pretrained(), tower)
    tower.load(pretrained.tensors)
    before = time.monotonic()

    def tell(step: Step) -> None:
        nonlocal before
        now = time.monotonic()
        speed = recipe.batch_size / max(now - before, 1e-9)
        before = now
        progress = {**asdict(step), "steps": recipe.stop_after or recipe.steps}
        if passage.micro_batch:
            progress["micro_batch"] = passage.micro_batch
        emit({**progress, "items_per_second": speed})

    lessons = [Lesson(head(artifacts, task), *images(artifacts, task, "train")) for task in tasks]
    steps = fine_tune(tower, lessons, recipe, seed, on_step=tell, passage=passage)
    if group.rank:
        return
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
        **passage.record(),
    )
