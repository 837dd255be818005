"""One run at a time in a checkout."""

import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from flows import outbox
from taskvec.errors import Busy

STAGES = Path(".taskvec") / "stages"  # a file for every driver, held by all that run its stages
END_SECONDS = 20.0  # that a killed stage may take to end


@contextmanager
def held(
    root: Path, command: str, *, wait: bool, say: Callable[[str], None] = lambda text: None
) -> Iterator[None]:
    """Hold the checkout.

    The lock is the kernel's and ends with its process, however that ends.

    Args:
        root: the checkout.
        command: that others are told of.
        wait: until whoever holds it lets go.
        say: is told for whom this waits.

    Raises:
        Busy: somebody holds it and ``wait`` is false; the message names the process.
    """
    directory = root / ".taskvec"
    directory.mkdir(exist_ok=True)
    holder = directory / "run.json"
    lock = FileLock(directory / "run.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = f"{_describe(holder)} works in this checkout"
        if not wait:
            raise Busy(f"{who}; wait for it, or add --wait") from None
        say(f"{who}; waiting for its end")
        lock.acquire()
    try:
        holder.write_text(
            json.dumps({"pid": os.getpid(), "host": platform.node(), "command": command})
        )
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def mark_stages(root: Path) -> None:
    """Mark this process and all that it forks as ones that run stages for its parent."""
    driver = os.getppid()
    directory = root / STAGES
    directory.mkdir(parents=True, exist_ok=True)
    mark = directory / f"{driver}-{psutil.Process(driver).create_time():.2f}"
    # Never closed: the kernel lets go of it when the last of them has ended.
    fcntl.flock(os.open(mark, os.O_RDWR | os.O_CREAT, 0o644), fcntl.LOCK_SH)


def sweep(root: Path) -> None:
    """End the stages of runs that were killed and remove what their writers left; while `held`.

    Raises:
        Busy: such a stage does not end.
    """
    for mark in (root / STAGES).glob("*-*"):
        pid, _, started = mark.name.partition("-")
        if not outbox.alive(int(pid), float(started)):
            _end_stages(mark)
            mark.unlink(missing_ok=True)
    for path in (root / "data").rglob(".writing-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _end_stages(mark: Path) -> None:
    """Kill whoever still holds the mark of a run that is no more, and wait until they are gone."""
    deadline = time.monotonic() + END_SECONDS
    with mark.open("r+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                left = list(_holders(mark))
            for process in left:
                process.kill()
            if time.monotonic() > deadline:
                raise Busy(
                    f"a stage of a run that was killed does not end: process "
                    f"{', '.join(str(process.pid) for process in left)}; end it, and run again"
                )
            time.sleep(0.02)


def _holders(mark: Path) -> Iterator[psutil.Process]:
    """Yield the other processes that have a file open."""
    path = str(mark.resolve())
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # ended meanwhile, or somebody else's
            if process.pid != os.getpid() and any(f.path == path for f in process.open_files()):
                yield process


def _describe(holder: Path) -> str:
    try:
        who = json.loads(holder.read_text())
        return f"`{who['command']}` (process {who['pid']} on {who['host']})"
    except (OSError, ValueError, KeyError):
        return "another run"
