"""`python -m flows.keeper COMMAND...`: run a server that must not outlive whoever started it.

The starter holds the other end of standard input. When it closes, because the starter stopped or
was killed, the server and everything that it started are ended: what is in the process group of
the keeper, and what carries its mark in the environment, whatever its group.
"""

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil

GRACE_SECONDS = 5
MARK = "TASKVEC_KEPT_BY"  # marks of all keepers above a process, separated by colons


def main(command: list[str]) -> int:
    """Run the command until it ends or standard input closes; return its exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent below to the whole group, this one too
    mark = os.environ.get(MARK, "").rpartition(":")[2] or new_mark()
    os.environ.setdefault(MARK, mark)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_default_sigterm)
    threading.Thread(target=_end_with_input, args=(mark,), daemon=True).start()
    code = child.wait()
    end(mark, os.getpgrp())
    return code


def new_mark() -> str:
    """Return a mark that no other process carries."""
    return secrets.token_hex(8)


def marked(above: str, mark: str) -> dict[str, str]:
    """Return the environment that marks a keeper and all that it will run.

    Args:
        above: the marks of whoever starts it.
        mark: its own.
    """
    return {MARK: f"{above}:{mark}" if above else mark}


def end(mark: str, group: int | None = None) -> None:
    """Ask everything with a mark, or of a process group, to end; after a while make it end."""
    if not mark:
        raise ValueError("an empty mark is carried by everything")
    began = time.monotonic()
    sent: set[int] = set()
    while kept := list(_kept(mark, group)):
        late = time.monotonic() > began + GRACE_SECONDS
        if time.monotonic() > began + 2 * GRACE_SECONDS:
            return  # the kernel holds it, or it is not ours to kill
        for process in kept:
            with suppress(psutil.Error):
                if late:
                    process.kill()
                elif process.pid not in sent:
                    process.terminate()
        sent.update(process.pid for process in kept)
        time.sleep(0.05)


def _kept(mark: str, group: int | None) -> Iterator[psutil.Process]:
    """Yield what lives and is of the group or carries the mark, but this process."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if os.getpgid(process.pid) == group or _carries(process, mark):
                yield process


def _carries(process: psutil.Process, mark: str) -> bool:
    try:
        return mark in process.environ().get(MARK, "").split(":")
    except (psutil.Error, OSError):  # somebody else's, or gone
        return False


def _default_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_with_input(mark: str) -> None:
    while os.read(0, 4096):  # not sys.stdin: its lock is held here when the interpreter ends
        pass
    end(mark, os.getpgrp())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
