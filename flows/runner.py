"""Where stages run, as this machine's environment says: here, or on the hosts of a Ray cluster.

It is no parameter of an experiment, and no file that DVC or git see: the outputs are the same.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from taskvec.errors import InvalidInput, nearest

if TYPE_CHECKING:
    from flows.dag import Dag
    from flows.nodes import Node
    from flows.slots import Slots
    from flows.workers import Workers

RUNNER = "TASKVEC_RUNNER"
RUNNERS = ("local", "ray")


def chosen() -> str:
    """Return the runner that $TASKVEC_RUNNER names; local if it is unset.

    Raises:
        InvalidInput: there is no such runner.
    """
    name = os.environ.get(RUNNER) or RUNNERS[0]
    if name not in RUNNERS:
        raise InvalidInput(f"{RUNNER}={name}: no such runner; {nearest(name, RUNNERS)}")
    return name


def graph(root: Path) -> "Dag":
    """Return the graph of a checkout, which need not have every file if stages run elsewhere."""
    if chosen() == "local":
        from flows.dag import Dag

        return Dag(root)
    from flows.sparse import SparseDag

    return SparseDag(root)


def workers(
    root: Path, slots: "Slots", dag: "Dag", stale: "list[Node]", note: Callable[[str], None]
) -> "Workers":
    """Return what runs stages; `start` it.

    Args:
        root: the checkout.
        slots: of this machine.
        dag: of `graph`.
        stale: the stages that may run.
        note: is told what a person should know.
    """
    from flows.sparse import SparseDag
    from flows.workers import Workers

    if not isinstance(dag, SparseDag):
        return Workers(root, slots, {node.stage for node in stale})
    from flows.cluster import RayWorkers

    return RayWorkers(root, slots, dag, stale, note)
