"""Who is told when a deployment fails, crashes, or works again: a webhook, called by Prefect.

The address comes from TASKVEC_WEBHOOK_URL at `taskvec deploy`. It is a secret: Prefect keeps it
encrypted in a block, and nothing prints it.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flows.deploy import ask
from flows.watcher import checkout_id
from taskvec.errors import InvalidInput

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient

VARIABLE = "TASKVEC_WEBHOOK_URL"
FAILED = {f"prefect.flow-run.{state}" for state in ("Failed", "Crashed", "TimedOut")}
COMPLETED = {"prefect.flow-run.Completed"}
REMEMBERED = timedelta(days=30)  # a failure that long ago is no news when it is over
# What chats show as it is, and the parts of it for programs.
PAYLOAD = """{
  "text": {{ ("%(what)s: " ~ flow.name ~ "/" ~ deployment.name ~ " (" ~ flow_run.name ~ ") is "
             ~ flow_run.state.name ~ ". " ~ (flow_run.state.message or "")) | tojson }},
  "deployment": {{ (flow.name ~ "/" ~ deployment.name) | tojson }},
  "state": {{ flow_run.state.name | tojson }},
  "message": {{ (flow_run.state.message or "") | tojson }},
  "flow_run": {{ (flow_run.id | string) | tojson }}
}"""


def create(root: Path, names: Sequence[str]) -> str:
    """Let Prefect call the webhook for the deployments of a checkout; return what is so now.

    Args:
        root: the checkout.
        names: of its deployments.

    Raises:
        InvalidInput: the address is none; the message does not repeat it.
    """
    url = os.environ.get(VARIABLE)
    if url:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidInput(f"{VARIABLE} is no address; expected https://HOST/...")
    return ask(_create(root, names, url))


async def _create(root: Path, names: Sequence[str], url: str | None) -> str:
    from prefect.client.orchestration import get_client

    ours = {what: f"taskvec {checkout_id(root)}: {what}" for what in ("failure", "recovery")}
    async with get_client() as client:
        existing = []
        for name in ours.values():
            existing += await client.read_automations_by_name(name)
        if url is None:
            if existing:
                return "the webhook is told of failures as before"
            return f"nobody is told of failures; set {VARIABLE} and deploy again to change that"
        for automation in existing:
            await client.delete_automation(automation.id)
        if not url:
            return "nobody is told of failures any more"
        block = await _webhook(f"taskvec-{checkout_id(root)}", url)
        identifiers = await _deployments(client, root, names)
        for what, name in ours.items():
            await client.create_automation(_automation(what, name, block, identifiers))
    return "the webhook is told of failures, crashes and recoveries"


async def _webhook(name: str, url: str) -> Any:
    from prefect.blocks.webhook import Webhook
    from prefect.types import SecretDict
    from pydantic import SecretStr

    headers = SecretDict({"Content-Type": "application/json"})
    saving: Any = Webhook(url=SecretStr(url), headers=headers).save(name, overwrite=True)
    return await saving


async def _deployments(client: "PrefectClient", root: Path, names: Sequence[str]) -> list[str]:
    from flows.schedule import deployments

    found = await deployments(client, root)
    return [f"prefect.deployment.{item.id}" for item in found if item.name in names]


def _automation(what: str, name: str, block: Any, deployments: list[str]) -> Any:
    from prefect.automations import AutomationCore
    from prefect.events.actions import CallWebhook
    from prefect.events.schemas.automations import EventTrigger, Posture

    related: Any = {"prefect.resource.role": "deployment", "prefect.resource.id": deployments}
    times: dict[str, Any] = {"expect": FAILED}
    if what == "recovery":
        times = {"after": FAILED, "expect": COMPLETED, "within": REMEMBERED}
    trigger = EventTrigger(
        match_related=related,
        for_each={"related:deployment:prefect.resource.id"} if what == "recovery" else set(),
        posture=Posture.Reactive,
        threshold=1,
        **times,
    )
    payload = PAYLOAD % {"what": what}
    action = CallWebhook(block_document_id=block, payload=payload)
    return AutomationCore(name=name, trigger=trigger, actions=[action])
