"""Completes the record: stages that a bare `dvc repro` ran, and what could not be sent."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from flows import outbox, tracking
from flows.recording import StageRecord, Tracker
from tasks.artifacts import Artifacts

HOW = "backfill"


@dataclass(frozen=True)
class Found:
    """What a lock file says of a stage: md5s of what it wrote and read, command and parameters."""

    address: str
    entry: Mapping[str, Any]

    @property
    def outs(self) -> dict[str, str]:
        """Path -> md5 of each file that it wrote."""
        return _files(self.entry, "outs")

    @property
    def deps(self) -> dict[str, str]:
        """Path -> md5 of each file that it read."""
        return _files(self.entry, "deps")

    @property
    def params(self) -> dict[str, Any]:
        """Its parameters; those that are not of params.yaml under ``file:key``."""
        return {
            key if file == "params.yaml" else f"{file}:{key}": value
            for file, values in (self.entry.get("params") or {}).items()
            for key, value in values.items()
        }

    @property
    def record(self) -> StageRecord:
        """What is recorded of it."""
        return StageRecord(
            self.address,
            self.address.rpartition(":")[2],
            str(self.entry["cmd"]),
            self.params,
            HOW,
            same=tracking.digest_tags(self.outs, self.deps),
        )


def unrecorded(root: Path, entries: Mapping[str, Mapping[str, Any]]) -> list[Found]:
    """Return the stages whose lock entry no recorded execution left, after those they depend on.

    Args:
        root: the directory of the experiment.
        entries: `Dag.entries`: address -> entry of the lock file.
    """
    top = Artifacts(root).top
    experiment = "" if top == root else root.name
    known = {
        (item["stage"], tuple(item["made"]), tuple(item["read"]))
        for item in outbox.executions(top)
        if item["experiment"] == experiment and item["status"] == "FINISHED"
    }
    found = [Found(address, entry) for address, entry in entries.items()]
    return [
        item
        for item in _ordered(found)
        if (item.address, _digests(item.outs), _digests(item.deps)) not in known
    ]


def record(root: Path, found: list[Found], warn: Callable[[str], None]) -> None:
    """Record stages as one run that was filled in; nothing is known of who ran them, or when.

    Args:
        root: the directory of the experiment.
        found: `unrecorded`.
        warn: is told if it cannot be written.
    """
    if not found:
        return
    tracker = Tracker(root, warn)
    tracker.keep({"name": f"taskvec backfill ({len(found)} stages)", "how": HOW})
    for item in found:
        tracker.begin(item.record)
        tracker.end(item.address, "FINISHED", item.outs, item.deps)
    tracker.close("FINISHED")


def backfill(
    root: Path, entries: Mapping[str, Mapping[str, Any]], warn: Callable[[str], None]
) -> Iterator[str]:
    """Record what was not, send what was kept; yield what was done, in words.

    Args:
        root: the directory of the experiment.
        entries: `Dag.entries`.
        warn: is told if the record cannot be written.

    Raises:
        ServiceUnreachable: MLflow does not answer; everything is kept.
    """
    found = unrecorded(root, entries)
    record(root, found, warn)
    yield f"{len(found)} of {len(entries)} stages were not recorded" + "; now they are" * bool(
        found
    )
    sent = tracking.send_kept(root)
    if sent.runs:
        yield f"{sent.runs} {'run was' if sent.runs == 1 else 'runs were'} sent to MLflow"
    if sent.left:
        yield f"{sent.left} more will be sent by the processes that write them now"
    for run in sent.damaged:
        yield f"{outbox.DIRECTORY}/{run}.jsonl is not what was written, so it was not sent"


def _ordered(found: list[Found]) -> list[Found]:
    """Return stages after those whose files they read."""
    makers = {path: item.address for item in found for path in item.outs}
    graph = {item.address: {makers[d] for d in item.deps if d in makers} for item in found}
    by_address = {item.address: item for item in found}
    return [by_address[address] for address in TopologicalSorter(graph).static_order()]


def _files(entry: Mapping[str, Any], kind: str) -> dict[str, str]:
    return {item["path"]: item["md5"] for item in entry.get(kind) or [] if "md5" in item}


def _digests(files: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(sorted(set(files.values())))
