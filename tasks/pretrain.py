"""Make theta_pre: load the family's weights, or align its towers."""

from tasks.artifacts import Artifacts
from tasks.inputs import architecture
from tasks.stages import Emit
from taskvec import checkpoints, plugins
from taskvec.checkpoints import load, save
from taskvec.sections import Model
from taskvec.towers import Alignment


def pretrain(artifacts: Artifacts, *, model: Model, emit: Emit) -> None:
    """Write the pre-trained vision tower.

    Its metadata names the parameters that are fine-tuned and edited, and the identity of the model.
    """
    del emit
    family = plugins.load("models", model.family)
    pictures = [_alignment(artifacts, task) for task in model.align_tasks]
    state = family.pretrained(model.image_size, pictures, **model.options)
    tower = architecture(model)
    tower.load(state)
    save(
        artifacts.pretrained(),
        state,
        kind="checkpoint",
        edited=tower.edited(),
        identity=dict(tower.identity),
        task="pretrained",
    )


def _alignment(artifacts: Artifacts, task: str) -> Alignment:
    loaded: checkpoints.Weights = load(artifacts.images(task, "alignment"), "images")
    return Alignment(
        images=loaded.tensors["images"],
        labels=loaded.tensors["labels"],
        classes=loaded.metadata["classes"],
        templates=loaded.metadata["templates"],
    )
