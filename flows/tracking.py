"""MLflow: sends what the logs of runs hold (flows/outbox.py). The only module that imports mlflow.

A run becomes an MLflow run, each executed stage a child run of it. Checkpoints, vectors and edited
models become LoggedModels that point to the files DVC keeps; no byte is copied.

Everything sent carries the tag ``taskvec.key``: the log and the line that it came from. What a
server already has is looked up by it before anything is sent again, so a process may die between
sending and noting that it did.
"""

import logging
import os
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from filelock import FileLock

from flows import outbox
from flows.redaction import reason, redacted
from flows.store import KEY, OWN, content, database, own_uri, tracking_uri
from tasks.artifacts import EXPERIMENTS, Artifacts
from taskvec.errors import ServiceUnreachable

EXPERIMENT = "taskvec"
MODEL_TYPES = {"checkpoints": "checkpoint", "vectors": "task vector", "edits": "edited model"}
ANSWER_SECONDS = 5
CREATE_SECONDS = 20  # for the tables of a new SQLite file, which another process may create
NOTE_SECONDS = 10.0
MOST_DIGESTS = 240  # MLflow takes 8,000 characters a tag; the log has them all
LONGEST = 5000  # characters of a tag that is text
MOST_METRICS = 1000  # in one request
MOST_RUNS = 10_000
_SHOWN = (".json", ".csv", ".html", ".md", ".svg", ".png")


class Connection:
    """An MLflow server or database.

    Attributes:
        store: what it is called in notes; holds no password.
        local: it is a SQLite file.
        loading: mlflow is being imported, or tables are being created.
        loaded: when that was done, by the monotonic clock.
        alive: when it last answered, by the monotonic clock.
    """

    def __init__(self, root: Path) -> None:
        uri = tracking_uri(root)  # before mlflow is imported, which sets the variable
        named = "MLFLOW_TRACKING_URI" in os.environ
        self._own = not named and uri == own_uri(root)
        # Whoever names a server decides where it keeps artifacts.
        self._place = None if named else (Artifacts(root).top / "mlartifacts").as_uri()
        self._top = Artifacts(root).top
        self._uri = uri
        self._client: Any = None
        self._imported = False
        self.store = OWN if self._own else redacted(uri)
        self.local = database(uri) is not None
        self.loading = False
        self.alive = self.loaded = time.monotonic()
        self.experiment = ""

    @property
    def top(self) -> Path:
        """The repository."""
        return self._top

    @property
    def client(self) -> Any:
        """MLflow's client, connected at the first use.

        Raises:
            Exception: whatever MLflow raises if it cannot be reached.
        """
        if self._client is None:
            self._client = self._connected()
        return self._client

    def answered(self) -> None:
        """Note that it lives."""
        self.alive = time.monotonic()

    def model(self, tag: str, value: str) -> Any:
        """Return the LoggedModel with a tag; None if there is none."""
        found = self.client.search_logged_models(
            [self.experiment], filter_string=f"tags.`{tag}` = '{value}'", max_results=1
        )
        return found[0] if found else None

    def add_parents(self, run: str, tag: str, values: Iterable[str]) -> None:
        """Make LoggedModels, by a tag, inputs of a run, unless they are already."""
        from mlflow.entities import LoggedModelInput

        known = {item.model_id for item in self.client.get_run(run).inputs.model_inputs}
        found = [self.model(tag, value) for value in values]
        models = [LoggedModelInput(m.model_id) for m in found if m and m.model_id not in known]
        if models:
            self.client.log_inputs(run, models=models)

    def running(self, host: str) -> list[Any]:
        """Return the runs that are said to be running on a host, without those of stages."""
        found = self.client.search_runs(
            [self.experiment],
            filter_string=f"attributes.status = 'RUNNING' AND tags.host = '{host}'",
        )
        return [run for run in found if "mlflow.parentRunId" not in run.data.tags]

    def _connected(self) -> Any:
        path = database(self._uri)
        if path is not None:
            _check_unlocked(path)
        self.loading = True
        try:
            mlflow = _mlflow()
            if not self._imported:
                self._imported, self.loaded = True, time.monotonic()
            if path is None:
                self.loading = False
                return self._open(mlflow)
            # Two processes that create the schema at once destroy it.
            lock = self._top / ".taskvec" / "mlflow.lock"
            if not self._own:
                lock = path.with_name(f"{path.name}.lock")
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock, timeout=CREATE_SECONDS):
                client = self._open(mlflow)
            self.answered()
            return client
        finally:
            self.loading = False

    def _open(self, mlflow: Any) -> Any:
        before = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(self._uri)
        if before is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)  # set by MLflow for child processes
        client = mlflow.MlflowClient()
        found = client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            try:
                self.experiment = client.create_experiment(EXPERIMENT, self._place)
            except mlflow.MlflowException:  # somebody else was faster
                self.experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
        else:
            self.experiment = found.experiment_id
        return client


@dataclass
class Delivery:
    """Sends a log to MLflow, from where it was sent to before.

    Attributes:
        path: the log; nobody else may be sending it.
        mark: how far it was sent.
    """

    connection: Connection
    path: Path
    mark: outbox.Mark
    _offset: int = -1  # in the log; -1: what the server has is to be looked up first
    _root: Path = field(default_factory=Path)
    _noted: float = 0.0  # when, by the monotonic clock
    _known: outbox.Mark = field(default_factory=outbox.Mark)  # as it was noted

    def advance(self, pause: Callable[[], bool] = lambda: False) -> bool:
        """Send what is new in the log; return whether it is sent up to its end.

        Args:
            pause: asked before each event, whether to go on later.

        Raises:
            Exception: whatever MLflow raises; nothing is lost, call again later.
        """
        if self.mark.done:
            return True
        try:
            if self._offset < 0 and not self._look():
                return False
            for events, offset in self._new():
                if pause():
                    return False
                self._send(events)
                self.connection.answered()
                self._offset, self.mark.lines = offset, events[-1][0] + 1
                self.mark.done = events[-1][1]["event"] == "close"
                self._note(NOTE_SECONDS)
        except BaseException:
            self._offset = -1
            raise
        finally:
            self._note(0)
        return self.mark.done

    def _new(self) -> Iterator[tuple[list[tuple[int, dict[str, Any]]], int]]:
        """Yield the events that were not sent as (number, event), and the offset after them.

        Events that follow one another and only hold metrics come together.
        """
        found = outbox.read(self.path, self._offset)
        numbered = [(self.mark.lines + i, event, end) for i, (event, end) in enumerate(found)]
        batches = groupby(numbered, lambda x: -1 if x[1]["event"] == "progress" else x[0])
        for _, batch in batches:
            items = list(batch)
            yield [(number, event) for number, event, _ in items], items[-1][2]

    def _look(self) -> bool:
        """Find out which runs of this log the server has; return whether the log has begun."""
        events = outbox.read(self.path)
        if not events:
            return False
        experiment = events[0][0]["tags"].get("experiment", "")
        top = self.connection.top
        self._root = top / EXPERIMENTS / experiment if experiment else top
        parent = self._search(f"tags.`{KEY}` = '{self._key(0)}'").get(0)
        children = self._search(f"tags.mlflow.parentRunId = '{parent}'") if parent else {}
        ids = {0: parent, **children} if parent else {}
        same = self.mark.store == self.connection.store and parent is not None
        self.mark = outbox.Mark(self.connection.store, self.mark.lines if same else 0, ids)
        self._offset = events[self.mark.lines - 1][1] if self.mark.lines else 0
        return True

    def _search(self, condition: str) -> dict[int, str]:
        """Return number of the event -> run, of this log; runs that were made twice are deleted."""
        runs: dict[int, str] = {}
        client = self.connection.client
        found = client.search_runs(
            [self.connection.experiment], filter_string=condition, max_results=MOST_RUNS
        )
        for run in sorted(found, key=lambda run: str(run.info.run_id)):
            log, _, number = run.data.tags.get(KEY, "").rpartition("/")
            if log != self.path.stem:
                continue
            if int(number) in runs:  # an answer was lost, and the request was not
                client.delete_run(run.info.run_id)
            else:
                runs[int(number)] = run.info.run_id
        return runs

    def _note(self, at_most_every: float) -> None:
        now, mark, known = time.monotonic(), self.mark, self._known
        if mark.lines == known.lines or now - self._noted < at_most_every:
            return
        fresh = dict(mark.ids.items() - known.ids.items())
        outbox.note(self.connection.top, self.path.stem, replace(mark, ids=fresh))
        self._known, self._noted = replace(mark, ids=dict(mark.ids)), now

    def _send(self, events: list[tuple[int, dict[str, Any]]]) -> None:
        number, event = events[0]
        match event["event"]:
            case "start":
                self._create(number, event, event["tags"])
            case "begin":
                self._begin(number, event)
            case "progress":
                self._progress([event for _, event in events])
            case "end":
                self._end(event)
            case "edited":
                self._edited(number, event)
            case "exported":
                self._exported(event)
            case "reaped":
                self._reap(event["mlflow_run"], event["at"])
            case "close":
                self._terminate(self.mark.ids.get(0), event)

    def _key(self, number: int, name: str = "") -> str:
        return f"{self.path.stem}/{number}" + f":{name}" * bool(name)

    def _create(self, number: int, event: dict[str, Any], tags: Mapping[str, str]) -> None:
        if number in self.mark.ids:
            return
        run = self.connection.client.create_run(
            self.connection.experiment,
            start_time=event["at"],
            tags={**tags, KEY: self._key(number)},
            run_name=event["name"],
        )
        self.mark.ids[number] = run.info.run_id

    def _begin(self, number: int, event: dict[str, Any]) -> None:
        from mlflow.entities import Param

        experiment = self._root.name if self._root != self.connection.top else ""
        known = {"dvc.stage": event["address"], **event.get("same", {})}
        if event.get("same") and self._recorded(known, experiment):
            return
        tags = {
            "mlflow.parentRunId": self.mark.ids[0],
            "dvc.stage": event["address"],
            "experiment": experiment,
            "how": event["how"],
            "stale.because": event["because"][:LONGEST],
            "prefect.task_run": event["prefect_task_run"],
        }
        self._create(number, event, {key: value for key, value in tags.items() if value})
        with _lenient():
            params = [Param(name, value) for name, value in event["params"].items()]
            self.connection.client.log_batch(self.mark.ids[number], params=params)

    def _recorded(self, tags: Mapping[str, str], experiment: str) -> bool:
        """Return whether a server that others use, too, has an execution of a stage already."""
        found = self.connection.client.search_runs(
            [self.connection.experiment],
            filter_string=" AND ".join(f"tags.`{tag}` = '{tags[tag]}'" for tag in sorted(tags)),
        )
        return any(
            run.data.tags.get("experiment", "") == experiment
            and run.data.tags.get(KEY, "").partition("/")[0] != self.path.stem
            for run in found
        )

    def _progress(self, events: list[dict[str, Any]]) -> None:
        for of in sorted({event["of"] for event in events}):
            metrics = [
                metric
                for event in events
                if event["of"] == of
                for metric in _metrics(event["metrics"], event["at"], event["step"])
            ]
            if run := self.mark.ids.get(of):
                for start in range(0, len(metrics), MOST_METRICS):
                    with _lenient():
                        self.connection.client.log_batch(
                            run, metrics=metrics[start : start + MOST_METRICS]
                        )

    def _end(self, event: dict[str, Any]) -> None:
        from mlflow.entities import Param, RunTag

        run = self.mark.ids.get(event["of"])
        if not run:
            return
        outs, deps = event.get("outs", {}), event.get("deps", {})
        with _lenient():
            self.connection.client.log_batch(
                run,
                metrics=_metrics(event.get("metrics", {}), event["at"], 0),
                params=[Param(name, value) for name, value in event.get("params", {}).items()],
                tags=[RunTag(tag, value) for tag, value in digest_tags(outs, deps).items()],
            )
        for name, md5 in sorted(outs.items()):
            with _lenient():
                self._log_file(run, name, md5)
        self._read_models(run, [md5 for name, md5 in sorted(deps.items()) if model_type(name)])
        for name, md5 in sorted(outs.items()):
            if kind := model_type(name):
                place = str((self._root / name).relative_to(self.connection.top))
                tags = {"dvc.path": place, "dvc.md5": md5, **event.get("headers", {}).get(name, {})}
                key = self._key(event["of"], name)
                self._make_model(run, key, _model_name(name), kind, tags)
        self._terminate(run, event)

    def _log_file(self, run: str, name: str, md5: str) -> None:
        """Log a small output, a table or a page, as it was then."""
        path = content(self._root, name, md5) if Path(name).suffix in _SHOWN else None
        if path is None:
            return
        if path.name == Path(name).name:
            self.connection.client.log_artifact(run, str(path))
            return
        with tempfile.TemporaryDirectory() as directory:
            copy = shutil.copy(path, Path(directory) / Path(name).name)
            self.connection.client.log_artifact(run, str(copy))

    def _read_models(self, run: str, digests: list[str], tag: str = "dvc.md5") -> None:
        from mlflow.entities import LoggedModelInput

        found = [self.connection.model(tag, digest) for digest in digests]
        models = [LoggedModelInput(model.model_id) for model in found if model]
        if models:
            with _lenient():
                self.connection.client.log_inputs(run, models=models)

    def _make_model(
        self, run: str, key: str, name: str, kind: str, tags: Mapping[str, str]
    ) -> None:
        import mlflow
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        client = self.connection.client
        model = self.connection.model(KEY, key)
        if model and model.status != LoggedModelStatus.READY:  # cut off while it was created
            client.delete_logged_model(model.model_id)
            model = None
        if model is None:
            model = mlflow.create_external_model(
                name=name,
                source_run_id=run,
                tags={**tags, KEY: key},
                model_type=kind,
                experiment_id=self.connection.experiment,
            )
        known = {output.model_id for output in client.get_run(run).outputs.model_outputs}
        if model.model_id not in known:
            client.log_outputs(run, models=[LoggedModelOutput(model.model_id, 0)])

    def _edited(self, number: int, event: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        run = self.mark.ids[0]
        header = event["header"]
        with _lenient():
            self.connection.client.log_batch(
                run,
                metrics=_metrics(event["metrics"], event["at"], 0),
                tags=[RunTag(key, value[:LONGEST]) for key, value in header.items()],
            )
        self._read_models(run, event["parents"], "taskvec.fingerprint")
        name = f"edit-{header.get('taskvec.digest', '')[:12]}"
        tags = {"path": event["path"], **header}
        self._make_model(run, self._key(number), name, MODEL_TYPES["edits"], tags)

    def _exported(self, event: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        run = self.mark.ids[0]
        tags = {key: event[key] for key in ("path", "digest", "library")}
        with _lenient():
            self.connection.client.log_batch(
                run, tags=[RunTag(f"export.{key}", value[:LONGEST]) for key, value in tags.items()]
            )
        tag = "dvc.md5" if event["md5"] else "taskvec.fingerprint"
        self._read_models(run, [event["md5"] or event["fingerprint"]], tag)

    def _reap(self, run: str, at: int) -> None:
        client = self.connection.client
        children = client.search_runs(
            [self.connection.experiment],
            filter_string=f"attributes.status = 'RUNNING' AND tags.mlflow.parentRunId = '{run}'",
            max_results=MOST_RUNS,
        )
        for identifier in [*(child.info.run_id for child in children), run]:
            with _lenient():
                client.set_terminated(identifier, outbox.KILLED, at)

    def _terminate(self, run: str | None, event: dict[str, Any]) -> None:
        if run:
            with _lenient():
                self.connection.client.set_terminated(run, event["status"], event["at"])


@dataclass
class Sent:
    """What `send_all` did.

    Attributes:
        runs: how many logs were sent up to their end.
        damaged: names of logs that are not what was written; they are not sent.
        left: how many logs wait, because a run writes them now or there was no time.
    """

    runs: int = 0
    damaged: list[str] = field(default_factory=list)
    left: int = 0


def send_all(connection: Connection, pause: Callable[[], bool] = lambda: False) -> Sent:
    """Send every log that was not sent up to its end and that nobody holds, the oldest first.

    Args:
        connection: where to.
        pause: asked before each event, whether to stop.

    Raises:
        Exception: whatever MLflow raises; the rest waits.
    """
    marks, closed = outbox.marks(connection.top), outbox.closed(connection.top)
    result = Sent()
    for path in outbox.logs(connection.top):
        mark = marks.get(path.stem, outbox.Mark())
        if mark.done:
            continue
        if outbox.broken(path, closed.get(path.stem, {})) is not None:
            result.damaged.append(path.stem)
            continue
        log = None if pause() else outbox.Log.claim(path)
        if log is None:
            result.left += 1
            continue
        try:
            done = Delivery(connection, path, mark).advance(pause)
        finally:
            log.release()
        result.runs += done
        result.left += not done
    return result


def send_kept(root: Path) -> Sent:
    """Send what could not be sent before.

    Raises:
        ServiceUnreachable: MLflow does not answer; what was not sent is kept.
    """
    connection = Connection(root)
    try:
        return send_all(connection)
    except Exception as error:  # whatever MLflow raises
        raise ServiceUnreachable(
            f"MLflow does not answer ({reason(error)}); the record is kept in {outbox.DIRECTORY}; "
            "start the server, or set MLFLOW_TRACKING_URI, and run `taskvec backfill` again"
        ) from None


def dead_runs(connection: Connection) -> list[str]:
    """Return the MLflow runs that processes of this host left when they were killed.

    Only runs without a log here: a log says itself that its run ended (`outbox.settle`).
    """
    here = {path.stem for path in outbox.logs(connection.top)}
    host = outbox.hostname()
    dead = []
    for run in connection.running(host):
        tags = run.data.tags
        known = tags.get(KEY, "").partition("/")[0] in here
        started = tags.get("process.started")
        pid = tags.get("pid", "")
        if known or not pid.isdigit():
            continue
        if not outbox.alive(int(pid), float(started) if started else None):
            dead.append(run.info.run_id)
    return dead


def digest_tags(outs: Mapping[str, str], deps: Mapping[str, str]) -> dict[str, str]:
    """Return the tags that hold the md5s of a stage's files."""
    tags = {"dvc.outs": outs, "dvc.deps": deps}
    return {
        tag: " ".join(sorted(set(files.values()))[:MOST_DIGESTS])
        for tag, files in tags.items()
        if files
    }


def model_type(name: str) -> str:
    """Return the kind of model that an output is; empty if it is none."""
    parts = Path(name).parts
    if not name.endswith(".safetensors") or len(parts) < 2 or parts[-1] == "basis.safetensors":
        return ""
    return MODEL_TYPES.get(parts[1], "")


def server_command(root: Path, port: int) -> list[str]:
    """Return the command of an MLflow server on loopback that refuses foreign hosts."""
    uri = tracking_uri(root)
    file = ["--backend-store-uri", uri] if database(uri) is not None else []  # no password
    return [
        sys.executable, "-m", "mlflow", "server",
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--allowed-hosts", f"127.0.0.1:{port},localhost:{port}",
        "--default-artifact-root", (Artifacts(root).top / "mlartifacts").as_uri(),
        *file,
    ]  # fmt: skip


def server_environment(root: Path) -> dict[str, str]:
    """Return what an MLflow server finds in its environment: its database, maybe a password."""
    return {
        "MLFLOW_BACKEND_STORE_URI": tracking_uri(root),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes that nothing here uses
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
    }


def _mlflow() -> Any:
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        # It holds the password of the server, and standard output is ours.
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        # What is sent again is looked up first; MLflow's own retries would make runs twice.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(ANSWER_SECONDS),
    }.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # failures are told once, by the caller
    return mlflow


def _check_unlocked(path: Path) -> None:
    """Raise sqlite3.OperationalError if somebody keeps a SQLite file locked.

    MLflow itself would wait for minutes.
    """
    if path.is_file():
        with closing(sqlite3.connect(path, timeout=ANSWER_SECONDS)) as opened:
            opened.execute("BEGIN IMMEDIATE")
            opened.rollback()


@contextmanager
def _lenient() -> Iterator[None]:
    """Go on if MLflow refuses a value or has lost the run: sending it again would not help."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.get_http_status_code() not in (400, 404):
            raise


def _metrics(values: Mapping[str, Any], at: int, step: int) -> list[Any]:
    from mlflow.entities import Metric

    return [Metric(name, float(value), at, step) for name, value in values.items()]


def _model_name(name: str) -> str:
    return name.removeprefix("data/").removesuffix(".safetensors").replace("/", "-")
