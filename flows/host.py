"""What a worker of Ray does on its host: keeps a checkout and an agent, and hands the agent stages.

Ray sends this module to the hosts by value, so that they need no taskvec of their own, only its
packages; it imports nothing but the standard library. The agent (flows/agent.py) is a process of
the checkout, runs the code that the driver has, and dies with the worker.
"""

import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

HOME = "TASKVEC_HOST_DIRECTORY"  # of a host's environment
DEFAULT_HOME = "~/.cache/taskvec"
TAIL = 15  # lines of an agent's log that an error shows
EXCHANGE_SECONDS = 1.0  # between two looks at what others have answered

Event = dict[str, Any]
_here: dict[str, "Agent"] = {}  # one agent a worker; a worker does one stage at a time


class Exchange:
    """An actor of Ray: what the hosts that work on one stage have answered, until it is stopped."""

    def __init__(self) -> None:
        self._rows: dict[str, list[tuple[str, list[str]]]] = {}  # stage -> sender, key and content
        self._stopped: set[str] = set()

    def put(self, stage: str, sender: str, rows: list[list[str]]) -> None:
        """Take rows of key and content."""
        self._rows.setdefault(stage, []).extend((sender, row) for row in rows)

    def take(self, stage: str, receiver: str, since: int) -> tuple[int, list[list[str]], bool]:
        """Return how many rows there are, those of others since a number, and whether to stop."""
        rows = self._rows.get(stage, [])
        new = [row for sender, row in rows[since:] if sender != receiver]
        return len(rows), new, stage in self._stopped

    def stop(self, stage: str) -> None:
        """Tell the assistants of a stage to stop."""
        self._stopped.add(stage)

    def forget(self, stage: str) -> None:
        """Drop what was answered for a stage that has ended."""
        self._rows.pop(stage, None)


def perform(job: Event, packs: list[Any], exchange: Any = None) -> Iterator[Event]:
    """Do a stage; yield that it began, its progress and how it ended.

    Args:
        job: what flows.agent.Host.perform takes, and ``commit`` (of the code) and ``project``.
        packs: a reference to the pack of the commit; only fetched if the host lacks the commit.
        exchange: an `Exchange` if several hosts may work on the stage.
    """
    import ray

    yield {"kind": "began"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") if job["gpus"] else ""
    devices = [device for device in visible.split(",") if device]
    try:
        agent = _agent(job, lambda: ray.get(packs[0]))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or b""
        words = f"{error} {said.decode(errors='replace')}".strip()
        yield {"kind": "failed", "message": f"the host cannot make a checkout: {words}", "code": 1}
        return
    sender = ray.get_runtime_context().get_task_id()
    ended = threading.Event()
    if exchange is not None:
        threading.Thread(
            target=_exchange, args=(agent, exchange, job["address"], sender, ended), daemon=True
        ).start()
    try:
        for event in agent.perform({**job, "devices": devices}):
            if event["kind"] == "answers":
                exchange.put.remote(job["address"], sender, event["rows"])
                continue
            yield event
            if event["kind"] == "died":
                _here.clear()
    finally:
        ended.set()


def _exchange(
    agent: "Agent", exchange: Any, stage: str, receiver: str, ended: threading.Event
) -> None:
    """Hand an agent what other hosts have answered, and whether it shall stop to assist."""
    import ray

    since, stopped = 0, False
    while not ended.wait(EXCHANGE_SECONDS):
        try:
            since, rows, stop = ray.get(exchange.take.remote(stage, receiver, since))
            if ended.is_set():
                return
            if rows or stop != stopped:
                agent.tell({"answers": rows, "stop": stop})
            stopped = stop
        except (ray.exceptions.RayError, OSError):  # nobody needs them any more
            return


def _agent(job: Event, fetch: Callable[[], bytes]) -> "Agent":
    """Return the running agent of this worker, with the code of a job."""
    agent = _here.get("agent")
    if agent is not None and agent.serves(job):
        return agent
    if agent is not None:
        agent.stop()
        _here.clear()
    home = Path(os.environ.get(HOME) or DEFAULT_HOME).expanduser()
    slot, lock = agent.slot if agent else _free_slot(home / "checkouts" / job["project"])
    _check_out(slot, job["commit"], fetch)
    _here["agent"] = Agent(home, slot, lock, job)
    return _here["agent"]


def _free_slot(place: Path) -> tuple[Path, int]:
    """Return a directory that no other worker of this host uses, and its lock."""
    place.mkdir(parents=True, exist_ok=True)
    for number in count():
        lock = os.open(place / f"{number}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        return place / str(number), lock
    raise AssertionError


def _check_out(place: Path, commit: str, fetch: Callable[[], bytes]) -> None:
    """Put the files of a commit into a checkout; what git ignores there stays."""
    place.mkdir(exist_ok=True)
    if not (place / ".git").is_dir():
        _git(place, "init", "--quiet")
    known = subprocess.run(
        ["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=place, capture_output=True
    )
    if known.returncode:
        _git(place, "index-pack", "--stdin", content=fetch())
    _git(place, "checkout", "--quiet", "--force", "--detach", commit)
    _git(place, "clean", "-ffdq")


def _git(place: Path, *arguments: str, content: bytes = b"") -> None:
    subprocess.run(
        ["git", "-c", "core.autocrlf=false", *arguments],
        cwd=place, input=content, capture_output=True, check=True,
    )  # fmt: skip


class Agent:
    """The process that does stages in a checkout."""

    def __init__(self, home: Path, place: Path, lock: int, job: Event) -> None:
        """Start it; it imports while the first job comes."""
        self.slot = (place, lock)
        self._writing = threading.Lock()
        self._commit, self._project = job["commit"], job["project"]
        root = place / job["root"]
        self._log = place / ".taskvec" / "logs" / "agent.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "PYTHONPATH": str(place),
            "CUDA_VISIBLE_DEVICES": "",  # a stage is given its own
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "flows.agent", str(home)],
                cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log,
            )  # fmt: skip

    def serves(self, job: Event) -> bool:
        """Return whether it runs and has the code of a job."""
        same = (self._commit, self._project) == (job["commit"], job["project"])
        return same and self._process.poll() is None

    def perform(self, job: Event) -> Iterator[Event]:
        """Hand it a job; yield what it says of it, up to the event that ends it."""
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # told below
            self.tell(job)
        for line in self._process.stdout:
            event = json.loads(line)
            yield event
            if event["kind"] not in ("progress", "answers"):
                return
        code = self._process.wait()
        tail = "\n  ".join(self._log.read_text(errors="replace").splitlines()[-TAIL:])
        yield {"kind": "died", "message": f"its agent died with exit code {code}\n  {tail}"}

    def tell(self, message: Event) -> None:
        """Write it a line."""
        assert self._process.stdin is not None
        with self._writing:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def stop(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
