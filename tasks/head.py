"""Make the frozen classifier of a task: prompts through the text tower, or class prototypes."""

from tasks.artifacts import Artifacts
from tasks.inputs import architecture, checkpoint, images
from tasks.stages import Emit
from taskvec import plugins
from taskvec.checkpoints import save
from taskvec.heads import prototype_head
from taskvec.sections import Head, Model

PROTOTYPE_SCALE = 20.0


def head(artifacts: Artifacts, *, task: str, head: Head, model: Model, emit: Emit) -> None:
    """Write the classifier (classes, D); it is never fine-tuned (arXiv:2212.04089, appendix B)."""
    del emit
    if head.kind == "text":
        family = plugins.load("models", model.family)
        weights = family.text_head(head.classes, head.templates, **model.options)
    else:
        tower = architecture(model)
        tower.load(checkpoint(artifacts.pretrained(), tower).tensors)
        weights = prototype_head(tower, *images(artifacts, task, "train"), scale=PROTOTYPE_SCALE)
    save(artifacts.head(task), {"head": weights}, kind="head", task=task, classes=head.classes)
