"""Fine-tune one task, or several at once, from theta_pre."""

from tasks.artifacts import Artifacts
from tasks.learning import learn
from tasks.ranks import lead, processes
from tasks.stages import Emit
from taskvec.sections import FineTune, Model


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
    """Write theta_ft and its training curve; with several devices, in a process for each.

    Args:
        artifacts: where files lie.
        expert: what the result is called: the task, or a variant of how to learn it.
        seed: decides the order of the pictures.
        tasks: what it learns; several are learnt jointly.
        model: architecture.
        recipe: steps, rate and so on.
        emit: is told the progress.
    """
    size = min(processes(), recipe.batch_size)
    if size == 1:
        learn(
            artifacts,
            expert=expert,
            seed=seed,
            tasks=tasks,
            model=model,
            recipe=recipe,
            emit=emit,
        )
        return
    job = {
        "root": str(artifacts.root.resolve()),
        "expert": expert,
        "seed": seed,
        "tasks": tasks,
        "model": model.model_dump(mode="json"),
        "recipe": recipe.model_dump(mode="json"),
    }
    lead(job, size, emit)
