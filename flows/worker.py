"""`python -m flows.worker POOL NAME`: close the runs that an earlier worker left, then be a worker.

A run whose process was ended together with its worker stays "Running" for Prefect, and later runs
of its deployment wait for it. Only a worker on a server of this checkout does that: what runs on a
server of somebody else may be somebody else's.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from flows.redaction import reason
from flows.schedule import here

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

OWN = "TASKVEC_OWN_PREFECT"  # set for a worker whose server belongs to the checkout
BELOW = "edit-models"  # the flow below a deployed one
MOST = 200


def main(pool: str, name: str) -> None:
    """Become a process worker."""
    if os.environ.get(OWN):
        try:
            close_left(Path.cwd())
        except Exception as error:  # work goes on whatever Prefect says
            sys.stderr.write(f"runs of an earlier worker are not closed: {reason(error)}\n")
    words = [
        "--pool", pool, "--name", name, "--type", "process", "--with-healthcheck",
        "--install-policy", "never",
    ]  # fmt: skip
    os.execv(sys.executable, [sys.executable, "-m", "prefect", "worker", "start", *words])


def close_left(root: Path) -> None:
    """Set the unfinished runs of this checkout's deployments to Crashed; no worker may live."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterDeploymentId,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import StateType

    begun = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    with get_client(sync_client=True) as client:
        ours = [item.id for item in client.read_deployments(limit=MOST) if here(item, root)]
        if ours:
            wanted = FlowRunFilter(
                deployment_id=FlowRunFilterDeploymentId(any_=ours),
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=begun)),
            )
            for run in client.read_flow_runs(flow_run_filter=wanted, limit=MOST):
                _crash(client, run)
        close_below(client)


def close_below(client: "SyncPrefectClient") -> None:
    """Set runs of stages to Crashed that stayed when the run above them ended."""
    from prefect.client.schemas.filters import (
        FlowFilter,
        FlowFilterName,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import StateType

    running = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING]))
    found = client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=[BELOW])),
        flow_run_filter=FlowRunFilter(state=running),
        limit=MOST,
    )
    for run in found:
        if run.parent_task_run_id is None:  # `taskvec run`
            continue
        above = client.read_task_run(run.parent_task_run_id).flow_run_id
        parent = client.read_flow_run(above) if above else None
        if parent and parent.state and parent.state.is_final():
            _crash(client, run)


def _crash(client: "SyncPrefectClient", run: "FlowRun") -> None:
    from prefect.states import Crashed

    with suppress(Exception):
        client.set_flow_run_state(run.id, Crashed(message="its process is gone"), force=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
