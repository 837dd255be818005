"""`taskvec schedule`: when deployments run by themselves, and whether they do."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.deploy import ask, connected
from taskvec.errors import InvalidInput, nearest

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.responses import DeploymentResponse
    from prefect.events.schemas.automations import Automation

MOST = 200  # deployments, automations


@dataclass(frozen=True)
class Entry:
    """One reason for which a deployment runs by itself; a deployment without any has one, too.

    Attributes:
        deployment: its name.
        when: a cron expression, an interval, "inputs change"; empty: by hand only.
        timezone: of the cron expression.
        active: whether it does so now.
        next: the next run, in UTC; empty: not known.
    """

    deployment: str
    when: str
    timezone: str
    active: bool
    next: str


def entries(root: Path) -> list[Entry]:
    """Return when the deployments of a checkout run.

    Raises:
        ServiceUnreachable: no server runs.
    """
    connected(root)
    return ask(_entries(root))


def switch(root: Path, name: str, *, active: bool) -> list[Entry]:
    """Pause or resume all that lets a deployment run by itself; return how it is then.

    Raises:
        InvalidInput: there is no such deployment, or it only runs by hand.
        ServiceUnreachable: no server runs.
    """
    connected(root)
    return ask(_switch(root, name, active=active))


def start(root: Path, name: str) -> tuple[str, str]:
    """Let a deployment run now; return the id and the name of the flow run.

    Raises:
        InvalidInput: there is no such deployment.
        ServiceUnreachable: no server runs.
    """
    connected(root)
    return ask(_start(root, name))


def table(found: list[Entry]) -> str:
    """Return entries as text."""
    if not found:
        return "nothing is deployed from this checkout; `taskvec deploy` does"
    lines = []
    for entry in found:
        state = ("active" if entry.active else "paused") if entry.when else ""
        when = f"{entry.when} {entry.timezone}".strip() or "by hand"
        then = f"next {entry.next}" if entry.next else ""
        lines.append(f"{entry.deployment:12} {when:28} {state:7} {then}".rstrip())
    return "\n".join(lines)


def described(found: list[Entry]) -> list[dict[str, Any]]:
    """Return entries as JSON can hold them."""
    return [asdict(entry) for entry in found]


async def _entries(root: Path) -> list[Entry]:
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        found = []
        for deployment in await deployments(client, root):
            found += await _of(client, deployment)
        return found


async def _switch(root: Path, name: str, *, active: bool) -> list[Entry]:
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        deployment = await _named(client, root, name)
        automations = await _automations(client, deployment)
        if not deployment.schedules and not automations:
            raise InvalidInput(f"{name} runs by hand only; prefect.yaml gives it no time")
        for schedule in deployment.schedules:
            await client.update_deployment_schedule(deployment.id, schedule.id, active=active)
        for automation in automations:
            change = client.resume_automation if active else client.pause_automation
            await change(automation.id)
        return await _of(client, await client.read_deployment(deployment.id))


async def _start(root: Path, name: str) -> tuple[str, str]:
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        deployment = await _named(client, root, name)
        run = await client.create_flow_run_from_deployment(deployment.id)
        return str(run.id), run.name


async def _named(client: "PrefectClient", root: Path, name: str) -> "DeploymentResponse":
    known = {deployment.name: deployment for deployment in await deployments(client, root)}
    if name not in known:
        raise InvalidInput(f"no deployment {name!r}; {nearest(name, known)}")
    return known[name]


async def deployments(client: "PrefectClient", root: Path) -> "list[DeploymentResponse]":
    """Return the deployments that run in a checkout, by name."""
    found = await client.read_deployments(limit=MOST)
    ours = [item for item in found if here(item, root)]
    return sorted(ours, key=lambda deployment: deployment.name)


def here(deployment: "DeploymentResponse", root: Path) -> bool:
    """Return whether a deployment runs in a checkout."""
    steps = [values for step in deployment.pull_steps or [] for values in step.values()]
    return str(root.resolve()) in [str(values.get("directory")) for values in steps]


async def _of(client: "PrefectClient", deployment: "DeploymentResponse") -> list[Entry]:
    coming = await client.get_scheduled_flow_runs_for_deployments([deployment.id], limit=MOST)
    times = sorted(run.next_scheduled_start_time for run in coming if run.next_scheduled_start_time)
    then = times[0].strftime("%Y-%m-%d %H:%M") if times else ""
    found = []
    for schedule in deployment.schedules:
        kind = schedule.schedule
        when = str(getattr(kind, "cron", None) or getattr(kind, "rrule", None) or "")
        when = when or f"every {getattr(kind, 'interval', '')}"
        zone = str(getattr(kind, "timezone", "") or "")
        active = schedule.active and not deployment.paused
        found.append(Entry(deployment.name, when, zone, active, then if active else ""))
    for automation in await _automations(client, deployment):
        found.append(Entry(deployment.name, "inputs change", "", automation.enabled, ""))
    return found or [Entry(deployment.name, "", "", False, then)]


async def _automations(
    client: "PrefectClient", deployment: "DeploymentResponse"
) -> "list[Automation]":
    """Return what starts a deployment at an event."""
    owner = f"prefect.deployment.{deployment.id}"
    return list(await client.read_resource_related_automations(owner))
