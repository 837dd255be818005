"""Fine-tune one task from theta_pre."""

from dataclasses import asdict

import pandas as pd

from tasks.artifacts import Artifacts
from tasks.inputs import architecture, checkpoint, head, images
from tasks.stages import Emit
from taskvec import tables
from taskvec.checkpoints import save
from taskvec.params import FineTune, Model
from taskvec.training import Step
from taskvec.training import fine_tune as train


def fine_tune(
    artifacts: Artifacts, *, task: str, seed: int, model: Model, recipe: FineTune, emit: Emit
) -> None:
    """Write theta_ft and its training curve."""
    tower = architecture(model)
    pretrained = checkpoint(artifacts.pretrained(), tower)
    tower.load(pretrained.tensors)

    def tell(step: Step) -> None:
        emit({**asdict(step), "steps": recipe.steps})

    steps = train(
        tower, head(artifacts, task), *images(artifacts, task, "train"), recipe, seed, on_step=tell
    )
    curve = pd.DataFrame([asdict(step) for step in steps])
    tables.write(artifacts.training(task, seed), curve, tables.Training)
    save(
        artifacts.checkpoint(task, seed),
        tower.state(),
        kind="checkpoint",
        identity=dict(tower.identity),
        origin=pretrained.fingerprint,
        task=task,
        seed=seed,
    )
