"""One run at a time in a checkout."""

import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from taskvec.errors import Busy


@contextmanager
def held(root: Path, command: str, *, wait: bool) -> Iterator[None]:
    """Hold the checkout.

    The lock is the kernel's and ends with its process, however that ends.

    Raises:
        Busy: somebody holds it and ``wait`` is false; the message names the process.
    """
    directory = root / ".taskvec"
    directory.mkdir(exist_ok=True)
    holder = directory / "run.json"
    lock = FileLock(directory / "run.lock", timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        raise Busy(
            f"{_describe(holder)} works in this checkout; wait for it, or add --wait"
        ) from None
    try:
        holder.write_text(
            json.dumps({"pid": os.getpid(), "host": platform.node(), "command": command})
        )
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def sweep(root: Path) -> None:
    """Remove what writers that were killed have left below data/; call it while `held`."""
    for path in (root / "data").rglob(".writing-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _describe(holder: Path) -> str:
    try:
        who = json.loads(holder.read_text())
        return f"`{who['command']}` (process {who['pid']} on {who['host']})"
    except (OSError, ValueError, KeyError):
        return "another run"
