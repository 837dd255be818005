"""The record of runs in this checkout: one append-only log a run, read offline, sent to MLflow.

Everything that happens in a run is appended to ``.taskvec/outbox/RUN.jsonl`` first; what is sent
to a server, and when, is the business of flows/tracking.py. A log is a chain: every line carries
the digest of the line before it and its own, so that a line that was edited, dropped, moved or
repeated is found. The process that writes a log holds it with a lock of the kernel, which ends
with the process: a log without an end that nobody holds is of a run that was killed.

Beside the logs lie two files that only grow. ``closed.json-lines`` has a line for every log that
has ended: how long it is, the digest of its last line, and a summary of its executions.
``sent.json-lines`` says how far logs were sent, and which MLflow runs they became.

A line is JSON; the fields of all events: ``before`` and ``sha256`` (the chain), ``event``,
``at`` (milliseconds since the epoch). Lines are numbered from 0; ``of`` is the number of the
``begin`` that an event belongs to.

    start     name, tags                                   the run
    begin     address, name, command, how, because,        a stage
              prefect_task_run, params
    progress  of, step, metrics
    end       of, status, outs, deps, headers, metrics, params
    edited    path, header, recipe, parents, metrics       a model outside the graph
    exported  path, digest, library, model, md5,           an edited model for others
              fingerprint
    reaped    mlflow_run                                   another run, found dead
    close     status                                       the run
"""

import fcntl
import getpass
import hashlib
import json
import os
import platform
import secrets
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from flows.redaction import cleaned
from flows.store import CONTEXT, recorded_before
from taskvec.atomic import sync

DIRECTORY = Path(".taskvec") / "outbox"
CLOSED = "closed.json-lines"
SENT = "sent.json-lines"
KILLED = "KILLED"
SAME_START_SECONDS = 2.0  # a clock that is set moves the start of every process

# Event of something that no stage made -> its kind, and what is told of it.
OUTSIDE = {
    "edited": ("edit", ("path", "header", "parents", "metrics", "recipe")),
    "exported": ("export", ("path", "digest", "library", "model", "md5", "fingerprint")),
}

_HEAD = b'{"before":"'
_TAIL = b',"sha256":"'
_DIGEST = 64
_TAIL_BYTES = len(_TAIL) + _DIGEST + len(b'"}\n')


def directory(top: Path) -> Path:
    """Return where the logs of a repository lie."""
    return top / DIRECTORY


def logs(top: Path) -> list[Path]:
    """Return all logs, the oldest first."""
    return sorted(directory(top).glob("*.jsonl"))


def closed(top: Path) -> dict[str, dict[str, Any]]:
    """Return the list of closed logs: run -> size in bytes, head (digest), and its summary."""
    return {line["run"]: line for line in _json_lines(directory(top) / CLOSED)}


def hostname() -> str:
    """Return what runs on this machine are marked with."""
    return platform.node()


class Log:
    """A log that this process writes; nobody else can, until it is released.

    Attributes:
        path: of the log; its stem names the run.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._mutex = threading.Lock()
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(descriptor, whole)  # the end of a line that a crash tore
        self._lines = content.count(b"\n")
        self._digest = _digest_of(content[:whole]) if whole else _origin(path)

    @classmethod
    def create(cls, top: Path) -> Self:
        """Open a new log.

        Raises:
            OSError: the directory cannot be written.
        """
        place = directory(top)
        place.mkdir(parents=True, exist_ok=True)
        while True:
            run = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
            path = place / f"{run}.jsonl"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if path.exists():  # nobody took it for the empty log of a killed run meanwhile
                break
            os.close(descriptor)
        sync(place)
        return cls(path, descriptor)

    @classmethod
    def claim(cls, path: Path) -> Self | None:
        """Open a log that another run wrote, and repair its end; None if somebody holds it."""
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return cls(path, descriptor)

    def append(
        self, event: str, *, durable: bool = True, at: float | None = None, **content: Any
    ) -> int:
        """Append an event and return its number.

        Args:
            event: what happened.
            durable: wait until it has reached the disk.
            at: seconds since the epoch; default: now.
            **content: of the event; passwords in it are cut out.

        Raises:
            OSError: it cannot be written; the log is as before.
        """
        when = int(1000 * (time.time() if at is None else at))
        with self._mutex:
            line, digest = _line({"event": event, "at": when, **cleaned(content)}, self._digest)
            _write(self._descriptor, line)
            if durable:
                os.fsync(self._descriptor)
            self._digest = digest
            self._lines += 1
            return self._lines - 1

    def close(self, status: str) -> None:
        """End the log: append its last event and enter it into the list of closed logs."""
        self.append("close", status=status)
        enter(self.path)

    def release(self) -> None:
        """Let go of the log."""
        os.close(self._descriptor)


def read(path: Path, offset: int = 0) -> list[tuple[dict[str, Any], int]]:
    """Return the events of a log's whole lines from an offset on, each with the offset after it.

    Raises:
        ValueError: a line is no JSON.
    """
    with path.open("rb") as file:
        file.seek(offset)
        events = []
        for line in file:
            if not line.endswith(b"\n"):
                break
            offset += len(line)
            events.append((json.loads(line), offset))
    return events


def broken(path: Path, entry: Mapping[str, Any] | None = None) -> int | None:
    """Return the number of the first line, from 1, that is not what was written; None if all are.

    A last line without its end is no fault, unless the log was closed: a crash tore it.

    Args:
        path: a log.
        entry: what the list of closed logs says of it; default: look there.
    """
    if entry is None:
        entry = closed(path.parents[2]).get(path.stem, {})
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    before, size = _origin(path), 0
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n") and not entry:
            break
        if (digest := _checked(line, before)) is None:
            return number
        before, size = digest, size + len(line)
        if size > entry.get("size", size):
            return number
    if size < entry.get("size", 0):
        return len(lines) + 1
    return len(lines) if entry and before != entry["head"] else None


def damages(top: Path) -> dict[str, int]:
    """Return the logs that are not what was written, also missing ones: run -> first bad line."""
    place, ended = directory(top), closed(top)
    names = sorted({path.stem for path in logs(top)} | ended.keys())
    found = {run: broken(place / f"{run}.jsonl", ended.get(run, {})) for run in names}
    return {run: line for run, line in found.items() if line is not None}


def settle(top: Path) -> list[str]:
    """Close the logs of runs on this host that were killed; return their names.

    Stages that were running are ended, too, as KILLED.
    """
    killed = []
    ended = closed(top)
    for path in logs(top):
        if path.stem in ended or (log := Log.claim(path)) is None:
            continue
        try:
            if broken(path, {}) is None and _end(log):
                killed.append(path.stem)
        finally:
            log.release()
    return killed


def killed_flow_runs(top: Path, last: int) -> list[str]:
    """Return the Prefect flow runs of those of the last runs that were killed and settled.

    Args:
        top: the repository.
        last: how many runs are looked at.
    """
    ended = closed(top)
    found = []
    for path in logs(top)[-last:]:
        flow_run = ended.get(path.stem, {}).get("context", {}).get("prefect_flow_run")
        if flow_run and json.loads(path.read_bytes().splitlines()[-1]).get("status") == KILLED:
            found.append(flow_run)
    return found


def _end(log: Log) -> bool:
    """Close a log that nobody holds; return whether its run was killed."""
    events = [event for event, _ in read(log.path)]
    if not events:  # killed before the first line
        log.path.unlink()
        return False
    if events[-1]["event"] == "close":
        enter(log.path)
        return False
    if events[0]["tags"].get("host") != hostname():
        return False
    ended = {event["of"] for event in events if event["event"] == "end"}
    for number, event in enumerate(events):
        if event["event"] == "begin" and number not in ended:
            log.append("end", of=number, status=KILLED)
    log.close(KILLED)
    return True


def enter(path: Path) -> None:
    """Enter a log that has ended into the list of closed logs, with a summary."""
    content = path.read_bytes()
    _add(
        path.with_name(CLOSED),
        {
            "run": path.stem,
            "size": len(content),
            "head": _digest_of(content),
            **_summary([event for event, _ in read(path)]),
        },
    )


@dataclass
class Mark:
    """How far a log was sent.

    Attributes:
        store: where to; without passwords.
        lines: how many lines of it.
        ids: number of a `start` or `begin` event -> MLflow run.
        done: the log has ended and is sent as a whole.
    """

    store: str = ""
    lines: int = 0
    ids: dict[int, str] = field(default_factory=dict)
    done: bool = False


def note(top: Path, run: str, mark: Mark) -> None:
    """Note how far a log was sent; ``ids`` are added to those that were noted before."""
    ids = {str(number): run_id for number, run_id in mark.ids.items()}
    content = {"run": run, "store": mark.store, "lines": mark.lines, "ids": ids, "done": mark.done}
    _add(directory(top) / SENT, content)


def marks(top: Path) -> dict[str, Mark]:
    """Return how far each log was sent: run -> mark."""
    found: dict[str, Mark] = {}
    for line in _json_lines(directory(top) / SENT):
        mark = found.setdefault(line["run"], Mark(line["store"]))
        if mark.store != line["store"]:
            mark = found[line["run"]] = Mark(line["store"])
        mark.lines, mark.done = line["lines"], line["done"]
        mark.ids |= {int(number): run_id for number, run_id in line["ids"].items()}
    return found


def unsent(top: Path) -> list[str]:
    """Return the runs whose logs have ended and were not sent up to their end, the oldest first."""
    sent, ended = marks(top), closed(top)
    return [
        path.stem
        for path in logs(top)
        if path.stem in ended and not sent.get(path.stem, Mark()).done
    ]


def executions(top: Path) -> Iterator[dict[str, Any]]:
    """Yield what was executed in this checkout, the oldest run first. Imports nothing heavy.

    Every one has ``kind`` ("stage", "edit" or "export"), ``key`` (RUN/number), ``run``, ``status``
    (RUNNING, FINISHED, FAILED or KILLED), ``started`` and ``ended`` (seconds since the epoch, or
    None), ``host``, ``pid``, ``user``, ``commit``, ``dirty`` ("True" or "False"), ``experiment``
    (empty: the repository's own), ``prefect_flow_run``, ``mlflow_parent`` and ``mlflow_run`` (ids;
    empty while not sent).

    A stage has ``stage`` (its address), ``name``, ``command``, ``how``, ``because``,
    ``prefect_task_run``, ``outs`` and ``deps`` (path, as in the lock file -> md5), ``made`` and
    ``read`` (the md5s of both) and ``fingerprints`` (path -> fingerprint of each weights file).

    An edit has ``path`` (relative to the repository if it lies inside), ``header`` (what the file
    states of itself), ``recipe`` (what it was made of, and how), ``parents`` (fingerprints) and
    ``metrics``.

    An export has ``path`` and ``digest`` (sha256) of its weights, ``library``, and ``model``,
    ``md5`` and ``fingerprint`` of the edited model in it.

    Runs that were recorded before there was a log come from MLflow's own SQLite file; of their
    files only ``made`` and ``read`` are known.
    """
    sent, ended = marks(top), closed(top)
    for earlier in recorded_before(top):
        yield {**_STAGE, **earlier}
    for path in logs(top):
        summary = ended.get(path.stem)
        if summary is None or summary["size"] != path.stat().st_size:
            with suppress(ValueError, KeyError):  # damaged; `damages` tells
                summary = _summary([event for event, _ in read(path)])
        if summary is None:
            continue
        ids = sent.get(path.stem, Mark()).ids
        context = {**summary["context"], "run": path.stem, "mlflow_parent": ids.get(0, "")}
        for item in summary["executions"]:
            key = f"{path.stem}/{item['number']}"
            run = ids.get(0 if "kind" in item else item["number"], "")
            yield {**_STAGE, **context, "key": key, "mlflow_run": run, **item}


def identity(root: Path) -> dict[str, str]:
    """Return who runs what here: the tags of a run that everything it does inherits."""
    import psutil

    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container without an entry for the user
        user = str(os.getuid())
    tags = {
        "host": hostname(),
        "pid": str(os.getpid()),
        "process.started": f"{psutil.Process().create_time():.2f}",
        "user": user,
        "mlflow.source.git.commit": _git(root, "rev-parse", "HEAD"),
    }
    if tags["mlflow.source.git.commit"]:
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
        tags["git.dirty"] = str(bool(changes))
    return {key: value for key, value in tags.items() if value}


def alive(pid: int, started: float | None) -> bool:
    """Return whether a process of this host lives; another with the same number does not count.

    Args:
        pid: its number.
        started: when it started, seconds since the epoch; None if nobody knows.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return started is None or abs(process.create_time() - started) < SAME_START_SECONDS
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


_STAGE = {
    "kind": "stage", "stage": "", "name": "", "command": "", "how": "", "because": "",
    "prefect_task_run": "", "outs": {}, "deps": {}, "made": [], "read": [], "fingerprints": {},
}  # fmt: skip


def _summary(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what `executions` tells of a run: what they have in common, and each."""
    found: dict[int, dict[str, Any]] = {}
    tags = events[0]["tags"] if events else {}
    for number, event in enumerate(events):
        if event["event"] == "begin":
            found[number] = {
                "number": number,
                "stage": event["address"],
                **{
                    key: event[key]
                    for key in ("name", "command", "how", "because", "prefect_task_run")
                },
                "status": "RUNNING",
                "started": event["at"] / 1000,
                "ended": None,
            }
        elif event["event"] == "end":
            outs, deps = event.get("outs", {}), event.get("deps", {})
            headers = event.get("headers", {})
            found[event["of"]] |= {
                "status": event["status"],
                "ended": event["at"] / 1000,
                "outs": outs,
                "deps": deps,
                "made": sorted(set(outs.values())),
                "read": sorted(set(deps.values())),
                "fingerprints": {
                    path: header["taskvec.fingerprint"]
                    for path, header in headers.items()
                    if "taskvec.fingerprint" in header
                },
            }
        elif event["event"] in OUTSIDE:
            kind, keys = OUTSIDE[event["event"]]
            found[number] = {
                "kind": kind,
                "number": number,
                "name": events[0]["name"],
                "status": "FINISHED",
                "started": events[0]["at"] / 1000,
                "ended": event["at"] / 1000,
                **{key: event.get(key, {}) for key in keys},
            }
    context = {name: tags.get(tag, "") for name, tag in CONTEXT.items()}
    return {"context": context, "executions": list(found.values())}


def _line(content: Mapping[str, Any], before: str) -> tuple[bytes, str]:
    """Return a line of a log and its digest."""
    assert not content.keys() & {"before", "sha256"}, "fields of the chain"
    body = json.dumps({"before": before, **content}, separators=(",", ":")).encode()
    digest = hashlib.sha256(body).hexdigest()
    return body[:-1] + _TAIL + digest.encode() + b'"}\n', digest


def _checked(line: bytes, before: str) -> str | None:
    """Return the digest of a line if it is whole and follows on ``before``, else None."""
    body, tail = line[:-_TAIL_BYTES] + b"}", line[-_TAIL_BYTES:]
    digest = hashlib.sha256(body).hexdigest()
    follows = body.startswith(_HEAD + before.encode() + b'"')
    return digest if follows and tail == _TAIL + digest.encode() + b'"}\n' else None


def _origin(path: Path) -> str:
    """Return what the first line of a log follows on: it belongs to this run only."""
    return hashlib.sha256(path.stem.encode()).hexdigest()


def _digest_of(content: bytes) -> str:
    """Return the digest that the last line of a log carries."""
    return content[-(_DIGEST + 3) : -3].decode(errors="replace")


def _write(descriptor: int, line: bytes) -> None:
    """Append a line as a whole or not at all."""
    size = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, line)
        while written < len(line):
            written += os.write(descriptor, line[written:])
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def _add(path: Path, content: Mapping[str, Any]) -> None:
    """Append a line to a file that several processes write."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        line = json.dumps(content, separators=(",", ":")).encode()
        _write(descriptor, b"\n" * torn + line + b"\n")
    finally:
        os.close(descriptor)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file that can be read; the list is rebuilt from the logs if need be."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            with suppress(ValueError):
                yield json.loads(line)


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
