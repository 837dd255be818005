"""Rows of MLflow's own SQLite file against the log of runs that they were made from."""

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from flows import outbox
from flows.store import KEY, OWN
from flows.tracking import digest_tags, model_type

TOLERANCE = 1e-9  # of a metric, relative: databases round


@dataclass(frozen=True)
class Rows:
    """What MLflow holds of a run, or what it must hold.

    Attributes:
        status: of the run.
        tags: key -> value.
        params: key -> value.
        metrics: (key, step) -> value.
        models: `KEY` of each LoggedModel -> its tags.
    """

    status: str
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[tuple[str, int], float] = field(default_factory=dict)
    models: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def changed(top: Path, runs: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield (node, problem) for every run whose rows are not what its log says.

    Runs that were sent elsewhere, to a server, are left alone: this works offline.

    Args:
        top: the repository.
        runs: executed stages, as `flows.outbox.executions` tells them.
    """
    path, sent = top / "mlflow.db", outbox.marks(top)
    own = [
        run for run in runs
        if run["mlflow_run"] and run["run"] in sent and sent[run["run"]].store == OWN
    ]  # fmt: skip
    if not path.is_file() or not own:
        return
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as opened:
            logs: dict[str, list[dict[str, Any]]] = {}
            for run in own:
                if run["run"] not in logs:
                    log = outbox.directory(top) / f"{run['run']}.jsonl"
                    logs[run["run"]] = [event for event, _ in outbox.read(log)]
                number = int(run["key"].rpartition("/")[2])
                wanted = expected(run["run"], number, logs[run["run"]], top)
                found = _held(opened, run["mlflow_run"])
                if problem := difference(wanted, found):
                    yield f"MLflow run {run['mlflow_run']} ({run['stage']})", problem
    except (sqlite3.DatabaseError, ValueError, OSError) as error:
        yield "mlflow.db", f"it cannot be read ({error})"


def expected(log: str, number: int, events: list[dict[str, Any]], top: Path) -> Rows:
    """Return what MLflow must hold of a stage, by the events of its log.

    Args:
        log: the name of the log.
        number: of the ``begin`` event of the stage.
        events: of the log.
        top: the repository.
    """
    begin = events[number]
    end = next(e for e in events if e["event"] == "end" and e["of"] == number)
    outs, deps = end.get("outs", {}), end.get("deps", {})
    metrics = {
        (key, event["step"]): value
        for event in events
        if event["event"] == "progress" and event["of"] == number
        for key, value in event["metrics"].items()
    } | {(key, 0): value for key, value in end.get("metrics", {}).items()}
    experiment = events[0]["tags"].get("experiment", "")
    prefix = f"experiments/{experiment}/" if experiment else ""
    return Rows(
        end["status"],
        {"dvc.stage": begin["address"], **digest_tags(outs, deps)},
        {**begin["params"], **end.get("params", {})},
        metrics,
        {
            f"{log}/{number}:{name}": {
                "dvc.path": f"{prefix}{name}",
                "dvc.md5": md5,
                **end.get("headers", {}).get(name, {}),
            }
            for name, md5 in outs.items()
            if model_type(name)
        },
    )


def difference(wanted: Rows, found: Rows | None) -> str:
    """Return in words the first thing that differs; empty if nothing does."""
    if found is None:
        return "it is gone"
    if found.status != wanted.status:
        return f"its status is {found.status}, the log of runs says {wanted.status}"
    for kind, one, other in (
        ("tag", wanted.tags, found.tags), ("parameter", wanted.params, found.params),
    ):  # fmt: skip
        for key, value in one.items():
            if other.get(key) != value:
                return f"its {kind} {key} is not what the log of runs says"
    for (name, step), number in wanted.metrics.items():
        held = found.metrics.get((name, step))
        near = held is not None and abs(held - number) <= TOLERANCE * max(1.0, abs(number))
        if isfinite(number) and not near:
            return f"its metric {name} at step {step} is not what the log of runs says"
    for mark, tags in wanted.models.items():
        if mark not in found.models:
            return f"its model {tags['dvc.path']} is gone"
        for key, value in tags.items():
            if found.models[mark].get(key) != value:
                return f"the tag {key} of its model {tags['dvc.path']} is not what the log says"
    return ""


def _held(database: sqlite3.Connection, run: str) -> Rows | None:
    """Return what MLflow holds of a run; None if it has no such run."""

    def ask(question: str) -> list[Any]:
        return database.execute(question, (run,)).fetchall()

    status = ask("SELECT status FROM runs WHERE run_uuid = ? AND lifecycle_stage = 'active'")
    if not status:
        return None
    models: dict[str, dict[str, str]] = {}
    for model, key, value in ask(
        "SELECT t.model_id, t.tag_key, t.tag_value FROM logged_model_tags t "
        "JOIN logged_models m ON m.model_id = t.model_id "
        "WHERE m.source_run_id = ? AND m.lifecycle_stage = 'active'"
    ):
        models.setdefault(model, {})[key] = value
    return Rows(
        status[0][0],
        dict(ask("SELECT key, value FROM tags WHERE run_uuid = ?")),
        dict(ask("SELECT key, value FROM params WHERE run_uuid = ?")),
        {
            (key, step): value
            for key, step, value in ask("SELECT key, step, value FROM metrics WHERE run_uuid = ?")
        },
        {tags[KEY]: tags for tags in models.values() if KEY in tags},
    )
