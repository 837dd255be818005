"""The flows that prefect.yaml deploys. A worker runs each in a process of its own, in a checkout.

They do what the commands do, in this process, and wait for whoever works in the checkout. The
stages appear in a flow run below (flows/edit_models.py). A flow returns a state whose message says
what happened, so that whoever is told of a failure also reads why.
"""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed

from flows.nodes import Listener, Node, Outcome
from flows.redaction import redacted
from flows.running import bring_up_to_date, experiment_root
from flows.worker import close_below
from taskvec.errors import Interrupted, TaskvecError

Scalar = bool | int | float | str | None
MOST_FAILURES = 3  # that a message tells in full


@flow(name="taskvec", persist_result=False)
def edit_models(
    targets: list[str] | None = None,
    experiment: str = "",
    overrides: dict[str, Scalar] | None = None,
) -> State[Any]:
    """Bring stages up to date: run what is stale, and nothing else.

    Args:
        targets: stages, tasks, edits or ``results``; none: all of dvc.yaml.
        experiment: a directory of experiments/; empty: none.
        overrides: dotted keys of params.yaml -> values; the run then happens in a worktree.
    """
    return _told(lambda: _update(targets or [], experiment, overrides or {}))


@flow(name="taskvec-verify", persist_result=False)
def verify_and_rerun(repair: bool = False) -> State[Any]:
    """Hash everything anew; if nothing is damaged, or it could be repaired, run what is stale.

    Args:
        repair: replace damaged copies, or remove them so that they are made again.
    """
    return _told(lambda: _verify(Path.cwd(), repair=repair) + _update([], "", {}))


@flow(name="taskvec-study", persist_result=False)
def study(name: str) -> State[Any]:
    """Bring a study of experiments/ up to date.

    Args:
        name: of its directory.
    """
    return _told(lambda: _update([], name, {}))


def _told(work: Callable[[], str]) -> State[Any]:
    """Do some work and return its end as a state: what it says, or why it failed."""
    with suppress(Exception), get_client(sync_client=True) as client:
        close_below(client)  # of a run that was killed
    try:
        return Completed(message=work())
    except Interrupted:
        # Whoever stopped this process decides what has become of the run: crashed or cancelled.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        raise
    except TaskvecError as error:
        text = redacted(str(error))
        get_run_logger().error(text)
        return Failed(message=text)


def _update(targets: list[str], experiment: str, overrides: dict[str, Scalar]) -> str:
    say = get_run_logger().info
    root = experiment_root(Path.cwd(), experiment)
    where = ""
    if overrides:
        from flows.overrides import checkout

        root = checkout(root, overrides)
        os.chdir(root)
        where = f"; the results lie in {root}"
    nodes, outcomes = bring_up_to_date(root, targets, wait=True, listener=_listener(), say=say)
    failed = [outcome for outcome in outcomes if outcome.how == "failed"]
    if failed:
        lines = [outcome.error for outcome in failed[:MOST_FAILURES]]
        names = ", ".join(outcome.name for outcome in failed)
        raise TaskvecError("\n".join([f"{len(failed)} stages failed: {names}", *lines]))
    if not outcomes:
        return f"{len(nodes)} stages were up to date{where}"
    return f"{len(outcomes)} of {len(nodes)} stages were stale and are up to date now{where}"


def _verify(root: Path, *, repair: bool) -> str:
    """Return what was verified, to be followed by more.

    Raises:
        TaskvecError: something is damaged, and was not to be repaired.
    """
    from flows import verify
    from flows.lineage import Lineage

    with Lineage(root) as lineage:
        found = verify.verify(lineage)
        if not found.findings:
            return f"nothing wrong in {found.files} files; "
        text = verify.render(found)
        if not repair:
            raise TaskvecError(f"{text}\nnothing was run; `taskvec verify --repair` mends it")
        done = verify.repair(lineage, found)
    get_run_logger().warning(text)
    return "\n".join(["repaired:", *done, ""])


def _listener() -> Listener:
    logger = get_run_logger()

    def finished(node: Node, outcome: Outcome) -> None:
        logger.info(f"{outcome.how} {node.name} ({outcome.seconds:.1f} s)")

    return Listener(finished=finished, note=logger.warning)
