"""`python -m flows.driver`: does the runs of a checkout in a process that has everything imported.

`taskvec services up` starts it; `taskvec run` hands over to it (flows/handover.py). A run that
changes one range then costs little more than its evaluations. The driver holds nothing of the
checkout between runs: each one reads parameters, graph and lock files anew. It starts itself anew
when the code or the installed packages change, so that no stage runs old code.
"""

import gc
import os
import queue
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flows import ending
from flows.fingerprints import state
from flows.handover import DATA, FOUND, environment_digests, reachable, received, send, socket_path
from flows.nodes import Listener, Node, Outcome
from flows.plan import SOURCES
from flows.servers import known_services, running_prefect
from flows.workers import resident
from tasks.artifacts import experiments
from taskvec.errors import Busy, Interrupted, TaskvecError

LOOK_SECONDS = 2.0  # between looks at the code while there is nothing to do
OBJECTS = 50_000  # new ones between collections during a run
KEPT_SECONDS = 600.0  # that models stay loaded while nobody searches
RUNS = 200  # after which it starts anew, whatever a library may have kept by then


class Request:
    """A run that a client asks for, and the line to that client."""

    def __init__(self, connection: socket.socket, content: dict[str, Any]) -> None:
        self.content = content
        self.stopped = 0  # the signal with which the client ends the run
        self._connection = connection
        self._sending = threading.Lock()
        self._stop: Callable[[int], None] | None = None

    def tell(self, event: str, **content: Any) -> None:
        """Tell the client something; if it is gone, the run is being stopped already."""
        with self._sending, suppress(OSError):
            send(self._connection, {"event": event, **content})

    def stoppable(self, stop: Callable[[int], None]) -> None:
        """Take what stops the run."""
        self._stop = stop
        if self.stopped:  # meanwhile
            stop(self.stopped)

    def stop(self, number: int) -> None:
        """Stop the run, now or as soon as it can be stopped."""
        self.stopped = number
        if self._stop:
            self._stop(number)

    def listener(self) -> Listener:
        """Return what tells the client what happens."""
        return Listener(
            planned=lambda stages: self.tell("planned", stages=stages),
            started=lambda node: self.tell("started", node=_described(node)),
            progress=lambda node, progress: self.tell(
                "progress", node=_described(node), progress=progress
            ),
            finished=lambda node, outcome: self.tell(
                "finished", node=_described(node), outcome=asdict(outcome)
            ),
            note=lambda text: self.tell("note", text=text),
            stoppable=self.stoppable,
        )


class Driver:
    """Takes requests in a thread, and does one at a time in the main thread."""

    def __init__(self, top: Path) -> None:
        """Serve the checkout ``top``."""
        self._top = top
        self._environment = dict(os.environ)
        self._digests = environment_digests(os.environ)
        self._code = _code()
        self._prefect = known_services(top).get("prefect")
        self._runs = 1
        self._requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._free = threading.Lock()  # held from a request on until its run has ended

    def warm(self) -> None:
        """Import what a run needs, and start the fork server.

        Prefect takes the address of its server when it is imported: without one it is not.
        """
        from flows import edit_models, recording, slots, tracking, workers

        with _environment(os.environ.get(DATA)):
            workers.Workers(self._top, slots.find_slots()).start()
            if server := running_prefect(self._top):
                edit_models.use(server)
                import prefect.task_runners  # noqa: F401

                self._runs = RUNS
            with suppress(Exception):  # whoever runs is told what is wrong with MLflow
                if not recording.sends_later():
                    tracking.Connection(self._top).client  # noqa: B018
        gc.set_threshold(OBJECTS)
        gc.freeze()  # what was imported is no garbage, and looking for it takes a second

    def serve(self, listening: socket.socket) -> None:
        """Do runs until something changes, or there were so many that a fresh start is due."""
        threading.Thread(target=self._accept, args=(listening,), daemon=True).start()
        for _ in range(self._runs):
            request = self._next()
            if request is None:
                return
            ended = self._run(request)
            self._free.release()  # before the client hears of the end, and may ask again
            request.tell("end", **ended)
            if ending.given_up():  # some thread waits for a server that is gone
                break
        self._free.acquire()  # whoever asks now works without a driver

    def start_anew(self) -> None:
        """Replace this process by a new one."""
        command = [sys.executable, "-m", "flows.driver", str(self._top)]
        os.execve(sys.executable, command, self._environment)

    def _next(self) -> Request | None:
        """Return the next request; None if something has changed before there is one."""
        tidy = False
        while True:
            with suppress(queue.Empty):
                return self._requests.get(timeout=LOOK_SECONDS)
            if not tidy:  # now nobody waits for it
                gc.collect()
                gc.freeze()
                tidy = True
            resident.retire(KEPT_SECONDS)
            if self._changed() and self._free.acquire(blocking=False):
                return None

    def _changed(self) -> str:
        """Return what has changed so that this process must start anew; empty if nothing has."""
        try:
            same = _code() == self._code
        except OSError:  # a file has just gone
            same = False
        if not same:
            return "code or packages"
        return (
            ""
            if known_services(self._top).get("prefect") == self._prefect
            else "the Prefect server"
        )

    def _accept(self, listening: socket.socket) -> None:
        while True:
            connection, _ = listening.accept()
            threading.Thread(target=self._receive, args=(connection,), daemon=True).start()

    def _receive(self, connection: socket.socket) -> None:
        """Read a request, queue or refuse it, then listen for the client's wish to stop."""
        with connection, suppress(OSError, ValueError, KeyError):
            if _peer(connection) != os.getuid():
                return
            messages = received(connection)
            content = next(messages, None)
            if content is None:
                return
            request = Request(connection, content)
            if (why := self._objection(content)) is not None:
                request.tell("refused", why=why)
                return
            self._requests.put(request)
            for message in messages:
                request.stop(int(message["stop"]))
            request.stop(signal.SIGHUP)  # the client is gone, or has heard the end

    def _objection(self, content: dict[str, Any]) -> str | None:
        """Return why a request is not taken, None if it is; empty if there is nothing to say."""
        if changed := self._changed():
            return f"{changed} changed since the resident driver was started, which starts anew"
        theirs = content["environment"]
        unlike = {name for name, _ in theirs.items() ^ self._digests.items()}
        names = sorted(name for name in unlike if name in theirs or name not in FOUND)
        if names:
            return f"the resident driver was started with other values of {', '.join(names)}"
        known = [self._top, *experiments(self._top).values()]
        if Path(content["root"]) not in known:
            return f"the resident driver does not know {content['root']}"
        # Whoever runs meanwhile holds the checkout: the client finds out by itself, or waits.
        return None if self._free.acquire(blocking=False) else ""

    def _run(self, request: Request) -> dict[str, Any]:
        """Do a run; return how it ended."""
        content = request.content
        root = Path(content["root"])
        os.chdir(root)
        nodes: list[Node] = []
        outcomes: list[Outcome] = []
        error, code = "", 0
        try:
            with _environment(content["data"]):
                from flows.running import bring_up_to_date

                nodes, outcomes = bring_up_to_date(
                    root,
                    content["targets"],
                    slots=content["slots"],
                    wait=False,
                    listener=request.listener(),
                    say=lambda text: request.tell("say", text=text),
                )
        except Interrupted as interrupted:
            if not request.stopped:  # the driver itself was asked to end
                request.tell("end", error=str(interrupted), exit_code=interrupted.exit_code)
                raise SystemExit(0) from None
            error, code = str(interrupted), interrupted.exit_code
        except TaskvecError as raised:
            error, code = str(raised), raised.exit_code
        except Exception:
            error, code = traceback.format_exc(), 1
        return {
            "error": error,
            "exit_code": code,
            "nodes": [_described(node) for node in nodes],
            "outcomes": [asdict(outcome) for outcome in outcomes],
        }


def _described(node: Node) -> dict[str, Any]:
    """Return what a client needs of a stage; parameters may be long."""
    return asdict(replace(node, params={}, deps=[], reasons=[]))


def _peer(connection: socket.socket) -> int:
    """Return the user at the other end."""
    credentials = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
    )
    return int(struct.unpack("3i", credentials)[1])


def _code() -> list[tuple[str, int, int]]:
    """Return what changes when code or installed packages change: names, times and sizes."""
    found = list(state(SOURCES))
    for path in [Path(entry) for entry in sys.path if entry.endswith("site-packages")]:
        with suppress(OSError):
            info = path.stat()
            found.append((str(path), info.st_mtime_ns, info.st_size))
    return found


@contextmanager
def _environment(data: str | None) -> Iterator[None]:
    """Set the client's data root, and undo whatever a run sets in the environment."""
    before = dict(os.environ)
    os.environ.pop(DATA, None)
    if data is not None:
        os.environ[DATA] = data
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def main(top: Path) -> int:
    """Serve a checkout until SIGTERM; return the exit code."""
    path = socket_path(top)
    path.parent.mkdir(exist_ok=True)
    lock = FileLock(path.with_suffix(".lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        sys.stderr.write(f"another driver serves {top}\n")
        return Busy.exit_code
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    driver = Driver(top)
    driver.warm()
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening, reachable(path) as address:
        before = os.umask(0o177)  # nobody else may open it, from the first moment on
        try:
            listening.bind(address)
        finally:
            os.umask(before)
        listening.listen()
        sys.stderr.write(f"ready: {path}\n")
        try:
            driver.serve(listening)
        finally:
            path.unlink(missing_ok=True)
    driver.start_anew()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else Path.cwd()))
