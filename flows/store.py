"""Where MLflow's record lies, and what it held before there were logs; without importing mlflow."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from flows import databases
from flows.records import Records, md5_of
from flows.services_file import known_services
from tasks.artifacts import Artifacts

KEY = "taskvec.key"  # the tag that says which line of which log a run or a model came from
# What every execution has in common with its run -> the tag of the run that holds it.
CONTEXT = {
    "host": "host", "pid": "pid", "user": "user", "commit": "mlflow.source.git.commit",
    "dirty": "git.dirty", "experiment": "experiment", "prefect_flow_run": "prefect.flow_run",
}  # fmt: skip
OWN = "own"  # what the repository's own file is called where stores are told apart
_SQLITE = "sqlite:///"


def tracking_uri(root: Path) -> str:
    """Return where runs are recorded.

    That is MLFLOW_TRACKING_URI, or else the database of flows/databases.py, or the one that
    `taskvec services up` serves, or the repository's own SQLite file.
    """
    return (
        os.environ.get("MLFLOW_TRACKING_URI")
        or databases.mlflow()
        or known_services(root).get("mlflow", {}).get("store")
        or own_uri(root)
    )


def own_uri(root: Path) -> str:
    """Return the address of the repository's own SQLite file."""
    return f"{_SQLITE}{Artifacts(root).top / 'mlflow.db'}"


def database(uri: str) -> Path | None:
    """Return the SQLite file that an address means; None if it is no SQLite file."""
    if not uri.startswith(_SQLITE):
        return None
    whole = uri.removeprefix(_SQLITE)  # a name may hold a ? that begins no options
    return Path(whole) if Path(whole).is_file() else Path(whole.partition("?")[0])


def recorded_before(top: Path) -> Iterator[dict[str, Any]]:
    """Yield the executed stages that MLflow's SQLite file has and no log, the oldest first.

    Fields as in `flows.outbox.executions`. Reads the file itself, because importing mlflow takes
    seconds; yields nothing if runs are recorded elsewhere.
    """
    path = database(tracking_uri(top))
    if path is None or not path.is_file():
        return
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as opened:
            rows = opened.execute(
                "SELECT r.run_uuid, r.status, r.start_time, r.end_time, t.key, t.value "
                "FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid "
                "WHERE r.lifecycle_stage = 'active' AND r.run_uuid NOT IN "
                "(SELECT run_uuid FROM tags WHERE key = ?) ORDER BY r.end_time, r.run_uuid",
                (KEY,),
            ).fetchall()
    except sqlite3.DatabaseError:  # a first run may be creating the tables just now
        return
    runs: dict[str, dict[str, Any]] = {}
    for run, status, started, ended, key, value in rows:
        known = runs.setdefault(run, {"status": status, "started": started, "ended": ended})
        known.setdefault("tags", {})[key] = value
    for run, known in runs.items():
        tags = known["tags"]
        parent = tags.get("mlflow.parentRunId", "")
        if "dvc.stage" in tags:
            above = runs[parent]["tags"] if parent in runs else {}
            yield {
                **{name: above.get(tag, "") for name, tag in CONTEXT.items()},
                "key": "",
                "run": "",
                "stage": tags["dvc.stage"],
                "name": tags.get("mlflow.runName", ""),
                "how": tags.get("how", ""),
                "because": tags.get("stale.because", ""),
                "prefect_task_run": tags.get("prefect.task_run", ""),
                "status": known["status"],
                "started": known["started"] / 1000 if known["started"] else None,
                "ended": known["ended"] / 1000 if known["ended"] else None,
                "made": tags.get("dvc.outs", "").split(),
                "read": tags.get("dvc.deps", "").split(),
                "mlflow_run": run,
                "mlflow_parent": parent,
            }


def content(root: Path, name: str, md5: str) -> Path | None:
    """Return a file that holds what an output held when it was recorded; None if there is none.

    Args:
        root: the directory of the experiment.
        name: of the output, relative to it.
        md5: of its content.
    """
    cached = Records(Artifacts(root).top).cached(md5)
    if cached.is_file():
        return cached
    path = root / name
    try:
        return path if md5_of(path) == md5 else None
    except OSError:
        return None
