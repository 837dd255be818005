"""Executions as OpenLineage events: one START and one end for each, a JSON object a line.

Source: OpenLineage 2-0-2 (https://openlineage.io/spec/2-0-2/OpenLineage.json) with the facets
DatasetVersion 1-0-1 and JobType 2-0-3. An execution that no run is recorded of has no time; its
events carry that of the commit which first records it, else the epoch.
"""

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flows.records import Execution
from flows.statement import public
from taskvec.atomic import write_text

PRODUCER = "urn:taskvec:lineage:v1"
NAMESPACE = "taskvec"
SPEC = "https://openlineage.io/spec"
SCHEMA = f"{SPEC}/2-0-2/OpenLineage.json#/$defs/RunEvent"
EPOCH = "1970-01-01T00:00:00+00:00"
# MLflow's status of a run -> the event that ends it
ENDS = {"FINISHED": "COMPLETE", "FAILED": "FAIL", "KILLED": "ABORT", "RUNNING": "ABORT"}


def write(path: Path, executions: Iterable[Execution]) -> None:
    """Write the events of executions, the oldest first, as OpenLineage's file transport does."""
    lines = [json.dumps(event, sort_keys=True) for event in events(executions)]
    write_text(path, "".join(f"{line}\n" for line in lines))


def events(executions: Iterable[Execution]) -> Iterator[dict[str, Any]]:
    """Yield the events of executions, which are given newest first, in the order of time."""
    for execution in reversed(list(executions)):
        yield _event(execution, "START", execution.run.get("started"))
        end = ENDS.get(execution.run.get("status", "FINISHED"), "ABORT")
        yield _event(execution, end, execution.run.get("ended"))


def run_id(execution: Execution) -> str:
    """Return the UUID of an execution: equal executions are one run."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PRODUCER}:{execution.ident}"))


def _event(execution: Execution, kind: str, time: str | None) -> dict[str, Any]:
    outputs = execution.outputs if kind == "COMPLETE" else {}
    return {
        "eventType": kind,
        "eventTime": time or execution.run.get("when") or EPOCH,
        "producer": PRODUCER,
        "schemaURL": SCHEMA,
        "run": {"runId": run_id(execution)},
        "job": {"namespace": NAMESPACE, "name": execution.name, "facets": {"jobType": _job()}},
        "inputs": _datasets(execution.inputs),
        "outputs": _datasets(outputs),
    }


def _job() -> dict[str, Any]:
    own = {"processingType": "BATCH", "integration": "TASKVEC", "jobType": "STAGE"}
    return {**_facet("2-0-3/JobTypeJobFacet"), **own}


def _datasets(files: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "namespace": NAMESPACE,
            "name": public(path),
            "facets": {
                "version": {
                    **_facet("1-0-1/DatasetVersionDatasetFacet"),
                    "datasetVersion": public(mark),
                }
            },
        }
        for path, mark in sorted(files.items())
    ]


def _facet(name: str) -> dict[str, str]:
    version, kind = name.split("/")
    url = f"{SPEC}/facets/{version}/{kind}.json#/$defs/{kind}"
    return {"_producer": PRODUCER, "_schemaURL": url}
