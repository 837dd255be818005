"""Bringing stages up to date: what `taskvec run`, the resident driver and scheduled runs do."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flows.nodes import Listener, Node, Outcome

if TYPE_CHECKING:
    from flows.dag import Dag

Say = Callable[[str], None]
HOW = {
    "run": "run",
    "run-cache": "restored from the run cache",
    "unchanged": "unchanged",
    "failed": "failed",
    "not run": "not run",
}


def bring_up_to_date(
    root: Path,
    targets: list[str],
    *,
    slots: int | None = None,
    wait: bool = False,
    listener: Listener | None = None,
    say: Say,
) -> tuple[list[Node], list[Outcome]]:
    """Run the stages that are stale, and nothing else.

    Args:
        root: the directory of params.yaml; also the working directory.
        targets: stages, tasks, edits or ``results``; none: all of dvc.yaml.
        slots: on the CPU; None: one a core.
        wait: for another run in this checkout to end.
        listener: is told what happens.
        say: is told in lines what was rendered, and that there is nothing to do.

    Returns:
        The stages that the targets need, and what became of those that were stale.

    Raises:
        TaskvecError: parameters are wrong, data is missing, or somebody else holds the checkout.
    """
    from flows import locking

    listener = listener or Listener()
    with locking.held(root, "taskvec run", wait=wait, say=say):
        locking.sweep(root)
        dag, nodes = plan(root, targets, repair=True, say=say)
        stale = [node for node in nodes if node.reasons]
        if not stale:
            say(f"nothing to do: {len(nodes)} stages are up to date")
            _tell_unsent(root, say)
            return nodes, []
        from flows.edit_models import run_flow
        from flows.slots import find_slots
        from flows.workers import check_command

        for node in stale:
            check_command(node)
        _check_data(root, stale)
        listener.planned(len(stale))
        return nodes, run_flow(root, dag, nodes, find_slots(slots), listener)


def plan(root: Path, targets: list[str], *, repair: bool, say: Say) -> tuple["Dag", list[Node]]:
    """Check the parameters, render what follows from them, and ask DVC what is stale.

    Args:
        root: the directory of params.yaml.
        targets: as for `bring_up_to_date`.
        repair: what a killed DVC command left; only while the checkout is held.
        say: is told what was rendered.
    """
    from flows import plan as planning
    from flows import rendering
    from taskvec import params as parameters

    if not rendering.is_fresh(root):
        params = parameters.load(root / "params.yaml")
        for path in planning.write(root, params):
            say(f"rendered {path.relative_to(root)}")
        rendering.remember(root)
    from flows import runner

    dag = runner.graph(root)
    if repair:
        dag.repair()
    return dag, dag.plan(targets)


def report(root: Path, nodes: list[Node], outcomes: list[Outcome], *, say: Say) -> int:
    """Tell in lines what became of the stages; return the exit code."""
    if not outcomes:
        return 0
    counts = {how: sum(outcome.how == how for outcome in outcomes) for how in HOW}
    say(", ".join(f"{count} {HOW[how]}" for how, count in counts.items() if count))
    failed = [outcome for outcome in outcomes if outcome.how == "failed"]
    if failed:
        for outcome in failed:
            say(f"error: {outcome.error}")
        say("the rest is kept; `taskvec run` goes on where this stopped")
        return max(outcome.exit_code for outcome in failed)
    for out in [out for node in nodes if node.stage == "report" for out in node.outs]:
        say(f"report: {root / out}")
    return 0


def experiment_root(top: Path, experiment: str) -> Path:
    """Return the directory of an experiment's params.yaml, and make it the working directory.

    Args:
        top: the checkout.
        experiment: a directory of experiments/; empty: the checkout itself.

    Raises:
        InvalidInput: there is no such experiment.
    """
    from tasks.artifacts import experiments
    from taskvec.errors import InvalidInput, nearest

    known = {"": top, **experiments(top)} if experiment else {"": top}
    if experiment not in known:
        del known[""]
        raise InvalidInput(f"no experiment {experiment!r}; {nearest(experiment, known)}")
    os.chdir(known[experiment])
    return known[experiment]


def _check_data(root: Path, stale: list[Node]) -> None:
    """Raise MissingArtifact if external data that a stale stage reads is not there."""
    wanted = {node.item for node in stale if node.stage == "prepare"}
    if not wanted:
        return
    from taskvec import params as parameters
    from taskvec.datasets import external
    from taskvec.errors import MissingArtifact

    tasks = parameters.load(root / "params.yaml").tasks
    lines = external.missing({name: tasks[name] for name in wanted if name in tasks})
    if lines:
        raise MissingArtifact("\n".join(["data is missing:", *lines]))


def _tell_unsent(root: Path, say: Say) -> None:
    """Close the logs of killed runs, and say which wait to be sent: that takes seconds."""
    from flows import outbox
    from tasks.artifacts import Artifacts

    top = Artifacts(root).top
    outbox.settle(top)
    if runs := outbox.unsent(top):
        say(f"runs not sent to MLflow yet: {len(runs)}; `taskvec backfill` sends them")
