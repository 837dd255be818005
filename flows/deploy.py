"""`taskvec deploy`: check prefect.yaml against this checkout, then have Prefect deploy it."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar
from zoneinfo import available_timezones

from flows.redaction import reason, redacted
from flows.running import plan
from flows.servers import Prefect, running_prefect
from flows.watcher import CHECKOUT, checkout_id
from tasks.artifacts import experiments
from taskvec.errors import InvalidInput, ServiceUnreachable, TaskvecError, nearest
from taskvec.yaml_file import plain, read

FILE = "prefect.yaml"
ENTRYPOINT = "flows/deployed.py:"
PARAMETERS = {
    "edit_models": {"targets", "experiment", "overrides"},
    "verify_and_rerun": {"repair"},
    "study": {"name"},
}
Answer = TypeVar("Answer")
KINDS = ("cron", "interval", "rrule")


def deploy(root: Path, say: Callable[[str], None]) -> None:
    """Check everything, deploy, and create what tells of failures.

    Raises:
        InvalidInput: prefect.yaml names something that is not there.
        ServiceUnreachable: no server runs.
        TaskvecError: Prefect refuses.
    """
    found = running_prefect(root)
    os.environ.update(found.environment if found else {})  # before Prefect is imported
    names = check(root)
    server = connected(root)
    words = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(
        words, cwd=root, env={**os.environ, CHECKOUT: checkout_id(root)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        last = redacted("\n".join((done.stdout + done.stderr).strip().splitlines()[-8:]))
        raise TaskvecError(f"Prefect does not deploy {FILE}:\n{last}")
    say(f"deployed to {server.url}: {', '.join(names)}")
    from flows import automations

    say(automations.create(root, names))


def connected(root: Path) -> Prefect:
    """Return the Prefect server that is to be used, and make it that of this process.

    Raises:
        ServiceUnreachable: there is none.
    """
    server = running_prefect(root)
    if server is None:
        raise ServiceUnreachable(
            "no Prefect server runs; `taskvec services up` starts one, PREFECT_API_URL names one"
        )
    os.environ.update(server.environment)
    return server


def ask(question: Coroutine[Any, Any, Answer]) -> Answer:
    """Return what Prefect answers to a client's coroutine.

    Raises:
        ServiceUnreachable: it refuses, or does not answer.
    """
    import httpx

    try:
        return asyncio.run(question)
    except httpx.HTTPError as error:
        raise ServiceUnreachable(f"Prefect does not do it: {reason(error)}") from None


def check(root: Path) -> list[str]:
    """Return the names of the deployments of prefect.yaml, all of which can be run.

    Raises:
        InvalidInput: a flow, a parameter, a target, an experiment, a key of params.yaml or a time
            is not known; the message names the nearest.
    """
    path = root / FILE
    content = plain(read(path))
    deployments = content.get("deployments") if isinstance(content, dict) else None
    if not isinstance(deployments, list) or not deployments:
        raise InvalidInput(f"{path}: no deployments; expected a list of that name")
    names: list[str] = []
    for number, item in enumerate(deployments, 1):
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise InvalidInput(f"{path}: deployment {number} has no name")
        name = item["name"]
        if name in names:
            raise InvalidInput(f"{path}: two deployments are called {name!r}; rename one")
        names.append(name)
        try:
            _check(root, item)
        except TaskvecError as error:
            raise type(error)(f"{path}: deployment {name}: {error}") from None
    return names


def _check(root: Path, item: Mapping[str, Any]) -> None:
    entrypoint = str(item.get("entrypoint", ""))
    flow = entrypoint.removeprefix(ENTRYPOINT)
    if flow not in PARAMETERS:
        flows = [f"{ENTRYPOINT}{name}" for name in PARAMETERS]
        raise InvalidInput(f"no flow {entrypoint!r}; {nearest(entrypoint, flows)}")
    parameters = _mapping(item, "parameters")
    for key in parameters:
        if key not in PARAMETERS[flow]:
            raise InvalidInput(f"no parameter {key!r}; {nearest(key, PARAMETERS[flow])}")
    if _mapping(item, "work_pool").get("name") is None:
        raise InvalidInput("no work pool; expected work_pool: {name: taskvec}")
    if flow == "study" and "name" not in parameters:
        raise InvalidInput(f"no name of a study; {nearest('', experiments(root))}")
    experiment = parameters.get("name" if flow == "study" else "experiment") or ""
    known = experiments(root)
    if experiment and experiment not in known:
        raise InvalidInput(f"no experiment {experiment!r}; {nearest(str(experiment), known)}")
    place = known[experiment] if experiment else root
    if overrides := _mapping(parameters, "overrides"):
        from flows.overrides import applied

        applied(place / "params.yaml", overrides)
    targets = parameters.get("targets") or []
    if not isinstance(targets, list):
        raise InvalidInput(f"targets are {targets!r}; expected a list of names")
    if targets:
        before = Path.cwd()
        os.chdir(place)
        try:
            plan(place, [str(t) for t in targets], repair=False, say=lambda text: None)
        finally:
            os.chdir(before)
    for schedule in item.get("schedules") or []:
        _check_schedule(schedule)


def _check_schedule(schedule: Any) -> None:
    if not isinstance(schedule, dict) or sum(kind in schedule for kind in KINDS) != 1:
        raise InvalidInput(f"schedule {schedule!r}: expected exactly one of {', '.join(KINDS)}")
    zone = schedule.get("timezone")
    if "interval" not in schedule and not zone:
        raise InvalidInput(f"schedule {schedule!r} has no timezone, such as Etc/UTC")
    if zone and zone not in available_timezones():
        close = [name for name in available_timezones() if str(zone).lower() in name.lower()]
        hint = nearest(str(zone), close or ["Etc/UTC", "Europe/Berlin"])
        raise InvalidInput(f"no time zone {zone!r}; {hint}")
    if "cron" in schedule:
        from prefect.client.schemas.schedules import CronSchedule
        from pydantic import ValidationError

        try:
            CronSchedule(cron=schedule["cron"], timezone=zone)
        except ValidationError as error:
            why = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise InvalidInput(
                f"cron {schedule['cron']!r}: {why}; expected five fields such as '0 3 * * *'"
            ) from None


def _mapping(item: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = item.get(key) or {}
    if not isinstance(found, dict):
        raise InvalidInput(f"{key} is {found!r}; expected a mapping")
    return found
