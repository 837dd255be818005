"""`python -m flows.keeper COMMAND...`: run a server that must not outlive whoever started it.

The starter holds the other end of standard input. When it closes, because the starter stopped or
was killed, the server and everything that it started are ended.
"""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil

GRACE_SECONDS = 5


def main(command: list[str]) -> int:
    """Run the command until it ends or standard input closes; return its exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent below to the whole group, this one too
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_default_sigterm)
    threading.Thread(target=_end_with_input, daemon=True).start()
    code = child.wait()
    _end_group()  # what the server started, its own workers, belongs to the group of this process
    return code


def _default_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_with_input() -> None:
    while os.read(0, 4096):  # not sys.stdin: its lock is held here when the interpreter ends
        pass
    _end_group()


def _end_group() -> None:
    """Ask everything in this process's group to end, and after a while make it end."""
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while _others():
        if time.monotonic() > deadline:
            os.killpg(0, signal.SIGKILL)
        time.sleep(0.05)


def _others() -> bool:
    """Return whether anything but this process is alive in its group."""
    for pid in psutil.pids():
        try:
            if (
                pid != os.getpid()
                and os.getpgid(pid) == os.getpgrp()
                and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
            ):
                return True
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
