"""Executions in the terms of W3C PROV: files are entities, executions activities.

Source: PROV-DM (https://www.w3.org/TR/prov-dm/) in the notation PROV-JSON
(https://www.w3.org/Submission/prov-json/). Who committed the record is an agent, if git knows.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flows.records import Execution
from flows.statement import public
from taskvec.atomic import write_text

PREFIXES = {"taskvec": "urn:taskvec:lineage:v1:"}
RELATIONS = ("used", "wasGeneratedBy", "wasAssociatedWith")


def write(path: Path, executions: Iterable[Execution]) -> None:
    """Write executions as PROV-JSON."""
    write_text(path, json.dumps(document(executions), indent=1, sort_keys=True) + "\n")


def document(executions: Iterable[Execution]) -> dict[str, Any]:
    """Return executions as a PROV-JSON document; sections without content are left out."""
    found: dict[str, Any] = {"entity": {}, "activity": {}, "agent": {}}
    found |= {relation: {} for relation in RELATIONS}
    for execution in executions:
        activity = f"taskvec:execution-{execution.ident}"
        found["activity"][activity] = {
            "prov:label": execution.name,
            "prov:type": execution.stage,
            "taskvec:command": public(execution.command),
        }
        for path, mark in execution.inputs.items():
            entity = _entity(found, path, mark)
            _relate(found, "used", {"prov:activity": activity, "prov:entity": entity})
        for path, mark in execution.outputs.items():
            entity = _entity(found, path, mark)
            _relate(found, "wasGeneratedBy", {"prov:entity": entity, "prov:activity": activity})
        # a user name, but no host
        if who := execution.run.get("who", "").partition("@")[0]:
            agent = _name("agent", who)
            found["agent"][agent] = {"prov:label": who}
            _relate(found, "wasAssociatedWith", {"prov:activity": activity, "prov:agent": agent})
    return {"prefix": PREFIXES, **{key: items for key, items in found.items() if items}}


def _entity(found: dict[str, Any], path: str, mark: str) -> str:
    """Return the name of a version of a file; the same bytes under two names are two entities."""
    entity = _name("file", f"{path} {mark}")
    found["entity"][entity] = {
        "prov:label": public(path),
        "taskvec:digest": public(mark),
    }
    return entity


def _relate(found: dict[str, Any], relation: str, ends: dict[str, str]) -> None:
    label = hashlib.sha256(json.dumps(ends, sort_keys=True).encode()).hexdigest()[:16]
    found[relation][f"_:{relation}-{label}"] = ends


def _name(kind: str, content: str) -> str:
    return f"taskvec:{kind}-{hashlib.sha256(content.encode()).hexdigest()[:32]}"
