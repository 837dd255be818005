"""What `taskvec run` does: check, plan, and run what is stale while nobody else works here."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flows.dag import Dag, Node
    from flows.edit_models import Listener, Outcome


def bring_up_to_date(
    root: Path,
    targets: list[str],
    *,
    slots: int | None = None,
    wait: bool = False,
    listener: "Listener | None" = None,
    say: Callable[[str], None],
) -> "tuple[list[Node], list[Outcome]]":
    """Run the stale stages that targets need; return the plan and what became of its stale stages.

    Args:
        root: the directory of params.yaml and the working directory.
        targets: as for `Dag.plan`.
        slots: how many stages run at once on the CPU; None: one a core.
        wait: for another run in this checkout to end.
        listener: is told what happens; None: a terminal shows it.
        say: is told what concerns the whole run.

    Raises:
        Busy: somebody works in this checkout and ``wait`` is false.
        TaskvecError: what is asked for cannot be run, or was interrupted.
    """
    from flows import locking

    with locking.held(root, "taskvec run", wait=wait):
        locking.sweep(root)
        dag, nodes = planned(root, targets, repair=True, say=say)
        stale = [node for node in nodes if node.reasons]
        if not stale:
            say(f"nothing to do: {len(nodes)} stages are up to date")
            _tell_unsent(root, say)
            return nodes, []
        from flows.edit_models import run_flow
        from flows.terminal import Terminal
        from flows.workers import check_command, find_slots

        for node in stale:
            check_command(node)
        _check_data(root, stale)
        if listener:
            return nodes, run_flow(root, dag, nodes, find_slots(slots), listener)
        with Terminal(len(stale)) as terminal:
            return nodes, run_flow(root, dag, nodes, find_slots(slots), terminal.listener())


def planned(
    root: Path, targets: list[str], *, repair: bool, say: Callable[[str], None]
) -> "tuple[Dag, list[Node]]":
    """Check the parameters, render what follows from them, and ask DVC what is stale."""
    from flows import plan, rendering
    from taskvec import params as parameters

    if not rendering.is_fresh(root):
        params = parameters.load(root / "params.yaml")
        for path in plan.write(root, params):
            say(f"rendered {path.relative_to(root)}")
        rendering.remember(root)
    from flows.dag import Dag

    dag = Dag(root)
    if repair:
        dag.repair()
    return dag, dag.plan(targets)


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


def _check_data(root: Path, stale: list["Node"]) -> None:
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


def _tell_unsent(root: Path, say: Callable[[str], None]) -> None:
    """Close the logs of killed runs, and say which wait to be sent: that takes seconds."""
    from flows import outbox
    from tasks.artifacts import Artifacts

    top = Artifacts(root).top
    outbox.settle(top)
    if runs := outbox.unsent(top):
        say(f"runs not sent to MLflow yet: {len(runs)}; `taskvec backfill` sends them")
