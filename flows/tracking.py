"""MLflow: one run a flow run, one child run an executed stage. The only module that imports mlflow.

Everything goes through one thread, so that tracking neither delays a stage nor writes to SQLite
from two places. Checkpoints, vectors and edited models become LoggedModels that point to the
files DVC keeps; no byte is copied.
"""

import json
import logging
import os
import queue
import re
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from flows.dag import Node
from tasks.artifacts import Artifacts
from taskvec import headers

EXPERIMENT = "taskvec"
MODEL_TYPES = {"checkpoints": "checkpoint", "vectors": "task vector", "edits": "edited model"}
FLUSH_SECONDS = 60


def tracking_uri(root: Path) -> str:
    """Return MLFLOW_TRACKING_URI, or the repository's own SQLite file."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Artifacts(root).top / 'mlflow.db'}"


@dataclass(frozen=True)
class StageRecord:
    """What is recorded of one executed stage.

    Attributes:
        how: "run" or "run-cache".
        because: why it was stale, in words.
        prefect_task_run: id, may be empty.
        started: seconds since the epoch.
    """

    node: Node
    how: str
    because: str
    prefect_task_run: str
    started: float = field(default_factory=time.time)


class Tracker:
    """Records a flow run. Methods return at once; `close` waits for what is outstanding."""

    def __init__(self, root: Path, warn: Callable[[str], None]) -> None:
        self._root = root
        self._top = Artifacts(root).top
        self._warn = warn
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._client: Any = None
        self._experiment = ""
        self._parent = ""
        self._runs: dict[str, str] = {}  # address -> MLflow run of the stage
        self._models: dict[str, str] = {}  # md5 -> LoggedModel
        self._broken = False

    def link(self, server: str) -> str:
        """Return the address of the parent run in an MLflow UI; empty if either does not exist."""
        if not server or not self._parent:
            return ""
        return f"{server}/#/experiments/{self._experiment}/runs/{self._parent}"

    def start(self, tags: Mapping[str, str]) -> None:
        """Open the database and the parent run, on the tracking thread."""
        self._thread.start()
        self._queue.put(lambda: self._open(dict(tags)))

    def begin(self, record: StageRecord) -> None:
        """Open the child run of a stage."""
        self._queue.put(lambda: self._begin(record))

    def progress(self, address: str, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of a running stage."""
        now = int(time.time() * 1000)
        self._queue.put(lambda: self._progress(address, step, dict(metrics), now))

    def end(
        self, address: str, status: str, outs: Mapping[str, str], inputs: Mapping[str, str]
    ) -> None:
        """Close the child run of a stage: FINISHED or FAILED, with the digests of its files."""
        self._queue.put(lambda: self._end(address, status, dict(outs), dict(inputs)))

    def edited(self, path: Path, parents: list[str], metrics: Mapping[str, float]) -> None:
        """Record a model that was made outside the graph on the parent run.

        Args:
            path: the file; its header says what it was made of.
            parents: fingerprints of the weights that it was made of.
            metrics: how it does.
        """
        self._queue.put(lambda: self._edited(path, parents, dict(metrics)))

    def close(self, status: str) -> None:
        """Close the parent run and wait for the thread, at most a minute."""
        if not self._thread.is_alive():
            return  # the run failed before it started, so nothing was recorded
        self._queue.put(lambda: self._client.set_terminated(self._parent, status))
        self._queue.put(None)
        self._thread.join(FLUSH_SECONDS)
        if self._thread.is_alive() and not self._broken:
            self._warn("MLflow is too slow; the end of this run is not recorded")

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._broken:
                continue
            try:
                job()
            except Exception as error:  # whatever MLflow raises must not stop the work
                self._broken = True
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                self._warn(f"MLflow does not answer; this run is not recorded ({reason})")

    def _open(self, tags: dict[str, str]) -> None:
        # MLflow sets the variable itself, so ask before it is told where to write.
        own = "MLFLOW_TRACKING_URI" not in os.environ
        uri = tracking_uri(self._root)
        mlflow = _mlflow()
        place = (self._top / "mlartifacts").as_uri()
        # Two processes that create the schema at once destroy it.
        lock = self._top / ".taskvec" / "mlflow.lock"
        lock.parent.mkdir(exist_ok=True)
        with FileLock(lock):
            mlflow.set_tracking_uri(uri)
            self._client = mlflow.MlflowClient()
            found = self._client.get_experiment_by_name(EXPERIMENT)
            self._experiment = (
                found.experiment_id
                if found
                else self._client.create_experiment(EXPERIMENT, place if own else None)
            )
        name = tags.pop("name")
        run = self._client.create_run(self._experiment, tags=tags, run_name=name)
        self._parent = run.info.run_id

    def _begin(self, record: StageRecord) -> None:
        from mlflow.entities import Param

        node = record.node
        tags = {
            "mlflow.parentRunId": self._parent,
            "dvc.stage": node.address,
            "how": record.how,
            "stale.because": record.because,
            "prefect.task_run": record.prefect_task_run,
        }
        run = self._client.create_run(
            self._experiment,
            start_time=int(record.started * 1000),
            tags={key: value for key, value in tags.items() if value},
            run_name=node.name,
        )
        self._runs[node.address] = run.info.run_id
        params = {_key(key): str(value)[:5900] for key, value in _flatten(node.params)}
        self._client.log_batch(
            run.info.run_id, params=[Param(*item) for item in list(params.items())[:200]]
        )

    def _progress(self, address: str, step: int, metrics: dict[str, float], now: int) -> None:
        from mlflow.entities import Metric

        entries = [Metric(name, value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._runs[address], metrics=entries)

    def _end(self, address: str, status: str, outs: dict[str, str], inputs: dict[str, str]) -> None:
        run = self._runs.pop(address)
        for tag, files in (("dvc.outs", outs), ("dvc.deps", inputs)):
            if files:
                self._client.set_tag(run, tag, " ".join(sorted(set(files.values()))))
        if status == "FINISHED":
            self._log_files(run, outs)
            self._log_models(run, outs, inputs)
        self._client.set_terminated(run, status)

    def _log_files(self, run: str, outs: dict[str, str]) -> None:
        """Log small outputs: metrics as metrics, tables and pages as artifacts."""
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        for name in sorted(outs):
            path = self._root / name
            if path.suffix == ".json":
                values = json.loads(path.read_text())
                texts = {k: v for k, v in values.items() if isinstance(v, str)}
                metrics = [Metric(k, float(v), now, 0) for k, v in values.items() if k not in texts]
                params = [Param(_key(k), v) for k, v in texts.items()]  # a chosen option
                self._client.log_batch(run, metrics=metrics, params=params)
            if path.suffix in (".json", ".csv", ".html", ".md", ".svg", ".png"):
                self._client.log_artifact(run, str(path))

    def _log_models(self, run: str, outs: dict[str, str], inputs: dict[str, str]) -> None:
        import mlflow
        from mlflow.entities import LoggedModelInput, LoggedModelOutput

        parents = [
            model
            for name, md5 in sorted(inputs.items())
            if _model_type(name) and (model := self._model(md5))
        ]
        if parents:
            self._client.log_inputs(run, models=[LoggedModelInput(model) for model in parents])
        for name, md5 in sorted(outs.items()):
            kind = _model_type(name)
            if not kind:
                continue
            place = str((self._root / name).relative_to(self._top))
            logged = mlflow.create_external_model(
                name=name.removeprefix("data/").removesuffix(".safetensors").replace("/", "-"),
                source_run_id=run,
                tags={"dvc.path": place, "dvc.md5": md5, **_header_tags(self._root / name)},
                model_type=kind,
                experiment_id=self._experiment,
            )
            self._models[md5] = logged.model_id
            self._client.log_outputs(run, models=[LoggedModelOutput(logged.model_id, 0)])

    def _edited(self, path: Path, parents: list[str], metrics: dict[str, float]) -> None:
        import mlflow
        from mlflow.entities import LoggedModelInput, LoggedModelOutput, Metric

        tags = _header_tags(path)
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._parent, metrics=[Metric(name, value, now, 0) for name, value in metrics.items()]
        )
        for key, value in tags.items():
            self._client.set_tag(self._parent, key, value[:5000])
        found = [model for mark in parents if (model := self._search("taskvec.fingerprint", mark))]
        if found:
            models = [LoggedModelInput(model) for model in found]
            self._client.log_inputs(self._parent, models=models)
        inside = path.absolute().is_relative_to(self._top)
        place = path.absolute().relative_to(self._top) if inside else path.absolute()
        logged = mlflow.create_external_model(
            name=f"edit-{tags['taskvec.digest'][:12]}",
            source_run_id=self._parent,
            tags={"path": str(place), **tags},
            model_type=MODEL_TYPES["edits"],
            experiment_id=self._experiment,
        )
        self._client.log_outputs(self._parent, models=[LoggedModelOutput(logged.model_id, 0)])

    def _model(self, md5: str) -> str:
        """Return the LoggedModel of a file, also from an earlier run; empty if there is none."""
        if md5 not in self._models:
            self._models[md5] = self._search("dvc.md5", md5)
        return self._models[md5]

    def _search(self, tag: str, value: str) -> str:
        found = self._client.search_logged_models(
            [self._experiment], filter_string=f"tags.`{tag}` = '{value}'", max_results=1
        )
        return str(found[0].model_id) if found else ""


def runs_by_output(root: Path) -> dict[str, dict[str, str]]:
    """Return md5 -> tags (with ``run_id``) of the latest recorded run that made that output.

    Reads MLflow's own SQLite file directly, because importing mlflow takes seconds; empty if runs
    are recorded elsewhere.
    """
    uri = tracking_uri(root)
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or not path.is_file():
        return {}
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            rows = database.execute(
                "SELECT r.run_uuid, t.key, t.value FROM runs r JOIN tags t "
                "ON t.run_uuid = r.run_uuid WHERE r.lifecycle_stage = 'active' "
                "AND r.status = 'FINISHED' ORDER BY r.end_time"
            ).fetchall()
    except sqlite3.DatabaseError:  # a first run may be creating the tables just now
        return {}
    runs: dict[str, dict[str, str]] = {}
    for run, key, value in rows:
        runs.setdefault(run, {"run_id": run})[key] = value
    return {md5: tags for tags in runs.values() for md5 in tags.get("dvc.outs", "").split()}


def server_command(root: Path, port: int) -> list[str]:
    """Return the command of an MLflow server on loopback that refuses foreign hosts."""
    return [
        sys.executable, "-m", "mlflow", "server",
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--allowed-hosts", f"127.0.0.1:{port},localhost:{port}",
        "--backend-store-uri", tracking_uri(root),
        "--default-artifact-root", (Artifacts(root).top / "mlartifacts").as_uri(),
    ]  # fmt: skip


def _mlflow() -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    # A dead server is noticed within seconds; MLflow's own 7 retries take minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


def _model_type(name: str) -> str:
    parts = Path(name).parts
    if not name.endswith(".safetensors") or len(parts) < 2 or parts[-1] == "basis.safetensors":
        return ""
    return MODEL_TYPES.get(parts[1], "")


def _header_tags(path: Path) -> dict[str, str]:
    """Return what a weights file states of itself in its header."""
    metadata = headers.read_metadata(headers.read_header(path), path)
    return {
        f"taskvec.{key}": str(metadata[key])
        for key in ("fingerprint", "origin", "expression", "digest", "coefficients", "choice")
        if metadata.get(key)
    }


def _key(name: str) -> str:
    """Return a parameter's name in the characters and the length that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", name.replace(":", "/"))[:250]


def _flatten(params: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    result = []
    for key, value in params.items():
        name = f"{prefix}{key}"
        result += _flatten(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return result
