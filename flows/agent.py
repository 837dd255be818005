"""`python -m flows.agent HOME`: does stages in a host's checkout, as standard input asks for them.

A job is a line of JSON, and so is every event that it answers with. The life of a stage is that of
flows/dag.py, but that its files come from the DVC remote and go back to it. When standard input
closes the process ends, and what it has started with it.
"""

import base64
import json
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from configparser import RawConfigParser
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from flows import plan
from flows.nodes import Node
from flows.sharing import Shared, work
from flows.slots import Slots
from flows.sparse import HostDag
from flows.workers import StageCrashed, Workers, without_main
from tasks.artifacts import Artifacts
from tasks.stages import Progress
from taskvec import params as parameters
from taskvec.errors import MissingArtifact, StaleRendering, TaskvecError

SMALL = 1_000_000  # bytes; outputs up to this size go to the driver as well
SHARE_SECONDS = 0.5  # between two looks at what is answered here
PROGRESS_SECONDS = 0.25  # at most one event a stage in this time; the last step always

Event = dict[str, Any]
Send = Callable[[Event], None]


def main(home: Path) -> None:
    """Do the jobs that standard input names, one after another, until it closes."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to the log
    jobs: SimpleQueue[Event] = SimpleQueue()
    told: SimpleQueue[Event] = SimpleQueue()
    threading.Thread(target=_read, args=(jobs, told), daemon=True).start()
    writing = threading.Lock()

    def send(event: Event) -> None:
        with writing:
            out.write(f"{json.dumps(event)}\n")
            out.flush()

    host: Host | None = None
    while True:
        job = jobs.get()
        try:
            host = host or Host(Path.cwd(), home, job)
            with _sharing(Artifacts(Path.cwd()).memo(), job, told, host, send):
                reply = host.perform(job, send)
            send(reply)
        except StageCrashed as error:
            send({"kind": "crashed", "message": str(error)})
        except TaskvecError as error:
            send({"kind": "failed", "message": str(error), "code": error.exit_code})
        except Exception:
            send({"kind": "failed", "message": traceback.format_exc(), "code": 1})


def _read(jobs: "SimpleQueue[Event]", told: "SimpleQueue[Event]") -> None:
    for line in sys.stdin:
        message = json.loads(line)
        (told if "answers" in message else jobs).put(message)
    os._exit(0)  # the processes of stages end with this one


@contextmanager
def _sharing(
    memo: Path, job: Event, told: "SimpleQueue[Event]", host: "Host", send: Send
) -> Iterator[None]:
    """Send what is answered here while a job is done, and take what is answered elsewhere."""
    if not job["shared"]:
        yield
        return
    ended = threading.Event()

    def share() -> None:
        shared = Shared(memo)
        while not ended.wait(SHARE_SECONDS):
            if rows := shared.new():
                send({"kind": "answers", "rows": rows})
            while not told.empty():
                message = told.get()
                shared.receive(message["answers"])
                if message["stop"]:
                    host.stop_assisting()
        shared.close()

    thread = threading.Thread(target=share, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        while not told.empty():
            told.get()


class _Workers(Workers):
    """Runs a stage alone: who assists, and where, is up to the driver."""

    @contextmanager
    def _assisted(self, node: Node) -> Iterator[None]:
        del node
        yield

    def assistant(self, node: Node, devices: list[str], part: int, parts: int) -> Any:
        """Return the process that answers a part of what a stage asks."""
        log = self._logs / f"{node.name.replace('@', '-')}-assistant.log"
        process = self._context.Process(
            target=work,
            args=(node.stage, node.item, str(self._root), devices, str(log), part, parts),
            daemon=True,
        )
        with self._starting, without_main():
            process.start()
        return process


class Host:
    """A checkout of the driver's code on this host."""

    def __init__(self, root: Path, home: Path, job: Event) -> None:
        """Configure DVC as a job says, and load the graph.

        Args:
            root: the directory of params.yaml.
            home: what checkouts of this host share: DVC's cache and the memory of answers.
            job: says which remote there is.

        Raises:
            StaleRendering: the packages of this host are not those of the driver.
        """
        self._root = root
        self._workers = _Workers(root, Slots(1, []))
        self._assistant: Any = None
        self._enough = False
        self._workers.start()
        _configure(root, home, job["remote"], job["settings"])
        try:
            plan.check(root, parameters.load(root / "params.yaml"))
        except StaleRendering as error:
            raise StaleRendering(
                f"{platform.node()} has other packages or another Python than the driver, so that "
                f"its results would be recorded under the wrong versions ({error}); install "
                "constraints.txt on every host"
            ) from None
        self._dag = HostDag(root)

    def perform(self, job: Event, send: Send) -> Event:
        """Do a stage; return what the driver must know of it.

        Args:
            job: ``address``, ``deps`` (path -> md5 of what other stages made), ``devices``,
                ``shared`` (whether other hosts work on it); ``part`` of ``parts`` to assist.
            send: takes the progress.
        """
        address, deps = job["address"], job["deps"]
        node = self._dag.node(address)
        if "part" in job:
            return self._assist(node, job)
        self._place(address, deps)
        try:
            self._dag.begin(address)
            with self._dag.guard(address, owner="taskvec agent"):
                usage = self._workers.run(node, job["devices"], _throttled(send))
            outs = self._dag.commit(address)
            entry, cached = self._dag.made(address)
            self._dag.remote.push(set(cached.values()))
            from flows.recording import described

            return {
                "kind": "done",
                "entry": entry,
                "files": self._files(node.outs, cached),
                "described": described(self._root, outs),
                "usage": {**usage, "host": platform.node()},
            }
        finally:
            self._dag.clear(address, deps)

    def stop_assisting(self) -> None:
        """End the assistant, also one that is about to start."""
        self._enough = True
        if self._assistant is not None:
            self._assistant.kill()

    def _assist(self, node: Node, job: Event) -> Event:
        """Answer a part of what a stage asks on another host."""
        self._enough = False
        self._place(node.address, job["deps"])
        try:
            self._assistant = self._workers.assistant(
                node, job["devices"], job["part"], job["parts"]
            )
            if self._enough:  # meanwhile
                self._assistant.kill()
            self._assistant.join()
        finally:
            self._assistant = None
            self._dag.clear(node.address, job["deps"])
        return {"kind": "assisted"}

    def _place(self, address: str, deps: dict[str, str]) -> None:
        if absent := self._dag.remote.fetch(set(deps.values())):
            paths = [path for path, md5 in deps.items() if md5 in absent]
            raise MissingArtifact(f"{paths[0]} is not in {self._dag.remote}")
        self._dag.place(address, deps)

    def _files(self, outs: list[str], cached: dict[str, str]) -> dict[str, str]:
        """Return path -> content, in base64, of small outputs and of those that no cache holds."""
        found = {}
        for out in outs:
            place = self._root / out
            below = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else []
            for path in below or [place]:
                if out not in cached or path.stat().st_size <= SMALL:
                    name = str(path.relative_to(self._root))
                    found[name] = base64.b64encode(path.read_bytes()).decode()
        return found


def _configure(root: Path, home: Path, remote: str, settings: dict[str, Any]) -> None:
    """Say where DVC finds its remote and its cache; give searches the memory of this host."""
    config = RawConfigParser()
    config["core"] = {"remote": remote, "site_cache_dir": str(home / "site")}
    config["cache"] = {"dir": str(home / "cache")}
    config[f"'remote \"{remote}\"'"] = {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in settings.items()
    }
    path = root / ".dvc" / "config.local"
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        config.write(file)
    memo = Artifacts(root).memo()
    memo.parent.mkdir(parents=True, exist_ok=True)
    if not memo.is_symlink():
        memo.unlink(missing_ok=True)
        memo.symlink_to(home / memo.name)


def _throttled(send: Send) -> Callable[[Progress], None]:
    last = 0.0

    def emit(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_SECONDS or progress["step"] >= progress["steps"]:
            last = now
            send({"kind": "progress", "progress": progress})

    return emit


if __name__ == "__main__":
    main(Path(sys.argv[1]))
