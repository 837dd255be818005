"""Tells Prefect which runs were killed: its server shows them as running for ever.

Prefect's own workers do so for the runs that they start; this is for all others.
"""

from pathlib import Path
from typing import Any
from uuid import UUID

from flows import outbox

LAST = 20  # runs that are looked at


async def tell(top: Path) -> None:
    """Mark the flow runs of killed runs as crashed, those that the server knows as running.

    Args:
        top: the repository whose logs say what was killed.
    """
    identifiers = outbox.killed_flow_runs(top, LAST)
    if not identifiers:
        return
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterId,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    living = FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING])
    asked = FlowRunFilter(
        id=FlowRunFilterId(any_=[UUID(identifier) for identifier in identifiers]),
        state=FlowRunFilterState(type=living),
    )
    async with get_client() as client:
        for flow_run in await client.read_flow_runs(flow_run_filter=asked):
            state: Any = Crashed(message="its process was killed; a later run found its log")
            await client.set_flow_run_state(flow_run.id, state, force=True)
