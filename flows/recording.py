"""Records a run: appends what happens to its log, and has it sent to MLflow meanwhile.

The log (flows/outbox.py) is written at once; one thread sends it (flows/tracking.py). Whatever
becomes of that thread, the run goes on, and what was not sent is kept.
"""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flows import outbox, tracking
from flows.redaction import reason, without_user
from flows.store import content
from flows.usage import split
from tasks.artifacts import Artifacts
from taskvec import headers
from taskvec.errors import InvalidInput, TaskvecError

WHEN = "TASKVEC_MLFLOW"  # the environment variable that says when a run is sent: now or later
RETRY_SECONDS = 30.0  # after MLflow did not answer
HURRY_SECONDS = 1.0  # that the end of a run that was interrupted waits
QUIET_SECONDS = 7.0  # that the end of a run waits for an answer
FLUSH_SECONDS = 60.0  # that it waits for a database on this machine that keeps answering
OLDER_SECONDS = 5.0  # that it waits for what earlier runs left
MOST_PARAMS, LONGEST_PARAM = 200, 5900  # in one request of MLflow; characters
# What says how a model outside the graph was made.
RECIPE = ("fingerprint", "origin", "operands", "expression", "coefficients", "seed")
_STATED = ("fingerprint", "origin", "expression", "digest", "coefficients", "choice")


@dataclass(frozen=True)
class StageRecord:
    """What is recorded of a stage when it begins.

    Attributes:
        address: as DVC addresses it.
        name: for people.
        command: that it runs.
        params: its parameters, nested.
        how: "run", "run-cache" or "backfill".
        because: why it was stale, in words.
        prefect_task_run: id, may be empty.
        same: tags that an execution on the server has if it is this one; empty: it is new.
        started: seconds since the epoch.
    """

    address: str
    name: str
    command: str
    params: Mapping[str, Any]
    how: str
    because: str = ""
    prefect_task_run: str = ""
    same: Mapping[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.time)


class Tracker:
    """Records a flow run. Methods return at once and never fail; `close` waits for seconds."""

    def __init__(self, root: Path, warn: Callable[[str], None]) -> None:
        """Record what is done below ``root``, the directory of params.yaml.

        Args:
            root: where the names of files begin.
            warn: is told in one line what stays unrecorded, or unsent.
        """
        self._root = root
        self._top = Artifacts(root).top
        self._warn = warn
        self._connection = tracking.Connection(root)
        self._log: outbox.Log | None = None
        self._delivery: tracking.Delivery | None = None
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._later = sends_later()
        self._mutex = threading.RLock()  # nothing follows the last event of a log
        self._begun: dict[str, int] = {}  # address -> number of its event
        self._unwritten = ""
        self._trouble = ""
        self._news = threading.Event()
        self._closed = threading.Event()
        self._until = float("inf")  # by the monotonic clock, for what earlier runs left

    def link(self, server: str) -> str:
        """Return the address of the parent run in an MLflow UI; empty if either does not exist."""
        run = self._delivery.mark.ids.get(0, "") if self._delivery else ""
        experiment = self._connection.experiment
        place = without_user(server)
        return f"{place}/#/experiments/{experiment}/runs/{run}" if server and run else ""

    def start(self, tags: Mapping[str, str]) -> None:
        """Begin a log, and send it to MLflow as it grows, unless that is to be done later.

        Args:
            tags: of the run; ``name`` is for people. Who runs what here is added.
        """
        self.keep(tags)
        if self._log and self._later:
            self._settle()
        elif self._log:
            self._thread.start()

    def keep(self, tags: Mapping[str, str]) -> None:
        """Begin a log that somebody sends later; tags as for `start`."""
        known = {**outbox.identity(self._root), **tags}
        if self._root != self._top:
            known["experiment"] = self._root.name
        try:
            self._log = outbox.Log.create(self._top)
        except OSError as error:
            self._fail(error)
            return
        mark = outbox.Mark()
        self._delivery = tracking.Delivery(self._connection, self._log.path, mark)
        self._append("start", name=known.pop("name"), tags=known)

    def begin(self, record: StageRecord) -> None:
        """Open the child run of a stage."""
        with self._mutex:
            number = self._append(
                "begin",
                at=record.started,
                address=record.address,
                name=record.name,
                command=record.command,
                how=record.how,
                because=record.because,
                prefect_task_run=record.prefect_task_run,
                params=_params(record.params),
                same=dict(record.same),
            )
            if number is not None:
                self._begun[record.address] = number

    def progress(self, address: str, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of a running stage."""
        if address in self._begun:
            of = self._begun[address]
            self._append("progress", durable=False, of=of, step=step, metrics=dict(metrics))

    def end(
        self,
        address: str,
        status: str,
        outs: Mapping[str, str],
        inputs: Mapping[str, str],
        usage: Mapping[str, float | str] = MappingProxyType({}),
        said: Mapping[str, Any] | None = None,
    ) -> None:
        """Close the child run of a stage.

        Args:
            address: as DVC addresses it.
            status: FINISHED or FAILED.
            outs: digests of its outputs, by path.
            inputs: digests of its file dependencies, by path.
            usage: what it used of the machine; see `flows.usage`.
            said: what `described` returned where the outputs are; None if they are here.
        """
        if (number := self._begun.get(address)) is not None:
            held: dict[str, Any] = {}
            if status == "FINISHED":
                held = dict(said or described(self._root, outs))
            if usage:
                figures, texts = split(usage)
                held["metrics"] = {**held["metrics"], **figures}
                held["params"] = {**held["params"], **texts}
            files = {"outs": dict(outs), "deps": dict(inputs)}
            with self._mutex:
                self._append("end", of=number, status=status, **files, **held)
                del self._begun[address]

    def edited(self, path: Path, parents: list[str], metrics: Mapping[str, float]) -> None:
        """Record a model that was made outside the graph on the parent run.

        Args:
            path: the file; its header says what it was made of.
            parents: fingerprints of the weights that it was made of.
            metrics: how it does.
        """
        place = path.absolute()
        inside = place.is_relative_to(self._top)
        self._append(
            "edited",
            path=str(place.relative_to(self._top) if inside else place),
            header=stated(path),
            recipe=recipe(path),
            parents=list(parents),
            metrics=dict(metrics),
        )

    def exported(
        self, weights: Path, digest: str, library: str, model: str, md5: str, fingerprint: str
    ) -> None:
        """Record an edited model that was written for others.

        Args:
            weights: the file; somebody may move it at any time.
            digest: sha256 of its bytes.
            library: that loads it.
            model: the edited model in it; a path, or what else it is called.
            md5: of the edited model; empty if no stage made it.
            fingerprint: of the edited model.
        """
        self._append(
            "exported",
            path=str(weights),
            digest=digest,
            library=library,
            model=model,
            md5=md5,
            fingerprint=fingerprint,
        )

    def close(self, status: str, *, hurry: bool = False) -> None:
        """End the log, and wait a few seconds for what is not sent yet.

        Stages that have not ended are ended as KILLED.

        Args:
            status: FINISHED or FAILED.
            hurry: wait a second at most.
        """
        if self._log is None or self._closed.is_set():
            return
        with self._mutex:
            for number in self._begun.values():
                self._append("end", of=number, status=outbox.KILLED)
            try:
                self._log.close(status)
            except OSError as error:
                self._fail(error)
            self._closed.set()
        if self._thread.ident is None:  # somebody sends the log later
            self._log.release()
            return
        began = time.monotonic()
        self._until = began + OLDER_SECONDS
        self._news.set()
        while self._thread.is_alive() and time.monotonic() < self._limit(began, hurry):
            self._thread.join(0.02)
        late = self._delivery is not None and not self._delivery.mark.done
        if late and not self._unwritten and not hurry:
            self._warn(
                f"MLflow does not answer ({self._trouble or 'in time'}); the record of this run is "
                f"kept in {outbox.DIRECTORY}; the next run or `taskvec backfill` sends it"
            )

    def _append(self, event: str, **values: Any) -> int | None:
        """Append an event to the log; return its number, None if it could not be written."""
        with self._mutex:
            if self._log is None or self._closed.is_set():
                return None
            try:
                number = self._log.append(event, **values)
            except OSError as error:
                self._fail(error)
                return None
        self._news.set()
        return number

    def _fail(self, error: OSError) -> None:
        if not self._unwritten:
            self._unwritten = reason(error)
            self._warn(
                f"the record of this run cannot be written to {outbox.DIRECTORY} "
                f"({self._unwritten}); free space or the directory's permissions, and run again"
            )

    def _limit(self, began: float, hurry: bool) -> float:
        """Return until when the end of a run, which began at a time, waits for MLflow."""
        if hurry:
            return began + HURRY_SECONDS
        last = began + FLUSH_SECONDS
        connection = self._connection
        if connection.loading:
            return last
        # A database on this machine is worth waiting for while it answers, a slow server is not.
        quiet_since = connection.alive if connection.local else connection.loaded
        return min(last, max(began, quiet_since) + QUIET_SECONDS)

    def _work(self) -> None:
        """Send the log as it grows, then what earlier runs left."""
        self._settle()
        assert self._log is not None and self._delivery is not None
        older = self._older()
        while True:
            self._news.clear()
            last, self._trouble = self._closed.is_set(), ""
            try:
                self._delivery.advance()
                next(older, None)
            except Exception as error:  # whatever MLflow raises must not stop the work
                self._trouble = reason(error)
                older = self._older()
            if last:
                break
            if self._trouble:
                self._closed.wait(RETRY_SECONDS)
            else:
                self._news.wait()
        self._log.release()

    def _settle(self) -> None:
        """Close the logs of killed runs."""
        with suppress(OSError, ValueError, KeyError):
            outbox.settle(self._top)

    def _older(self) -> Iterator[None]:
        """Send what earlier runs left; pauses when this run has news."""
        for run in tracking.dead_runs(self._connection):
            self._append("reaped", mlflow_run=run)
        while tracking.send_all(self._connection, self._busy).left and self._news.is_set():
            yield

    def _busy(self) -> bool:
        """Return whether what earlier runs left has to wait."""
        return self._news.is_set() or time.monotonic() > self._until


def sends_later() -> bool:
    """Return whether the environment says that runs are sent to MLflow later, by `backfill`.

    Raises:
        InvalidInput: it says something else.
    """
    value = os.environ.get(WHEN, "now")
    if value not in ("now", "later"):
        raise InvalidInput(
            f"{WHEN} is {value!r}; set it to `now`, or to `later` to send the record of runs to "
            "MLflow with `taskvec backfill`"
        )
    return value == "later"


def recipe(path: Path) -> dict[str, Any]:
    """Return what a model outside the graph was made of, by fingerprint, and how."""
    metadata = _header(path)
    return {key: metadata[key] for key in RECIPE if key in metadata}


def described(root: Path, outs: Mapping[str, str]) -> dict[str, Any]:
    """Return what the outputs of a stage say of themselves: headers, metrics and chosen options.

    Args:
        root: where the names begin.
        outs: name -> md5.
    """
    result: dict[str, Any] = {"headers": {}, "metrics": {}, "params": {}}
    for name, md5 in sorted(outs.items()):
        weights = tracking.model_type(name)
        if not weights and not name.endswith(".json"):
            continue
        path = content(root, name, md5)
        if path is not None and weights:
            result["headers"][name] = stated(path)
        elif path is not None:
            with suppress(OSError, ValueError, AttributeError, TypeError):
                for key, value in json.loads(path.read_text()).items():
                    if isinstance(value, str):  # an option that a search chose
                        result["params"][_key(key)] = value
                    else:
                        result["metrics"][key] = float(value)
    return result


def stated(path: Path) -> dict[str, str]:
    """Return what a weights file states of itself in its header, as tags; nothing if it cannot."""
    metadata = _header(path)
    return {f"taskvec.{key}": str(metadata[key]) for key in _STATED if metadata.get(key)}


def _header(path: Path) -> dict[str, Any]:
    try:
        return headers.read_metadata(headers.read_header(path), path)
    except (OSError, TaskvecError):
        return {}


def _params(params: Mapping[str, Any]) -> dict[str, str]:
    """Return parameters as MLflow takes them: flat, text, not too many."""
    flat = list(_flatten(params))[:MOST_PARAMS]
    return {_key(key): str(value)[:LONGEST_PARAM] for key, value in flat}


def _key(name: str) -> str:
    """Return a parameter's name in the characters and the length that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", name.replace(":", "/"))[:250]


def _flatten(params: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    result = []
    for key, value in params.items():
        name = f"{prefix}{key}"
        result += _flatten(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return result
