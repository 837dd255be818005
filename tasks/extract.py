"""Extract a task vector: tau = theta_ft - theta_pre."""

from tasks.artifacts import Artifacts
from tasks.inputs import check_origin
from tasks.stages import Emit
from taskvec.checkpoints import load, save
from taskvec.vectors import TaskVector


def extract(artifacts: Artifacts, *, task: str, seed: int, emit: Emit) -> None:
    """Write the task vector with its origin (arXiv:2212.04089, section 2)."""
    del emit
    pretrained = load(artifacts.pretrained(), "checkpoint")
    finetuned = load(artifacts.checkpoint(task, seed), "checkpoint")
    check_origin(finetuned, pretrained.fingerprint, f"the checkpoint of {task}")
    vector = TaskVector.between(
        pretrained.tensors,
        finetuned.tensors,
        origin=pretrained.fingerprint,
        names=pretrained.metadata["edited"],
    )
    save(
        artifacts.vector(task, seed),
        vector.tensors,
        kind="vector",
        origin=vector.origin,
        identity=pretrained.metadata["identity"],
        finetuned=finetuned.fingerprint,
        task=task,
        seed=seed,
    )
