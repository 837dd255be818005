"""Extract a task vector: tau = theta_ft - theta_pre."""

from tasks.artifacts import Artifacts
from tasks.inputs import check_origin, mapped
from tasks.stages import Emit
from taskvec import streaming


def extract(artifacts: Artifacts, *, expert: str, seed: int, emit: Emit) -> None:
    """Write the task vector with its origin (arXiv:2212.04089, section 2)."""
    del emit
    pretrained = mapped(artifacts.pretrained(), "checkpoint")
    finetuned = mapped(artifacts.checkpoint(expert, seed), "checkpoint")
    check_origin(finetuned, pretrained.fingerprint, f"the checkpoint of {expert}")
    streaming.extract(
        pretrained,
        finetuned,
        artifacts.vector(expert, seed),
        names=pretrained.metadata["edited"],
        identity=pretrained.metadata["identity"],
        task=expert,
        seed=seed,
    )
