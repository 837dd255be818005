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

GRACE_SECONDS = 5


def main(command: list[str]) -> int:
    """Run the command until it ends or standard input closes; return its exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent below to the whole group, this one too
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_default_sigterm)
    threading.Thread(target=_end_with_input, args=(child,), daemon=True).start()
    code = child.wait()
    # What the server started (its own workers) belongs to the group of this process.
    os.killpg(0, signal.SIGTERM)
    return code


def _default_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_with_input(child: subprocess.Popen[bytes]) -> None:
    while sys.stdin.buffer.read(4096):
        pass
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if child.poll() is None:
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
