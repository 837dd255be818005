"""What a command costs as a whole process: its wall time and its private memory.

Private memory is ``RssAnon`` of /proc/PID/status, summed over the process and its descendants: what
the program keeps to itself. Pages of mapped files are left out, since the kernel may drop them at
any time. It is read every 5 ms while the command runs, so a shorter peak can be missed; the reading
takes about half a percent of one core.
"""

import os
import select
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measuring import ROOT

INTERVAL = 5  # milliseconds between two looks at the memory
FAMILY = 10  # looks at the memory for one look for new processes


@dataclass(frozen=True)
class Cost:
    """What one run of a command cost.

    Attributes:
        seconds: wall time, from the start of the process to its end.
        private: the largest sum of ``RssAnon`` seen, in bytes.
        output: what it wrote to stdout.
    """

    seconds: float
    private: int
    output: str = ""


def run(command: Sequence[str | Path], directory: Path = ROOT) -> Cost:
    """Run a command to its end; raise RuntimeError with what it said if it fails."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            list(map(str, command)), cwd=directory, env=_environment(), stdout=out, stderr=log
        )
        try:
            private = _watch(process.pid)
            seconds = time.perf_counter() - started
        finally:
            process.kill()  # nothing, if it has ended
            code = process.wait()
        log.seek(0)
        out.seek(0)
        if code:
            said = log.read().decode(errors="replace")
            raise RuntimeError(f"{' '.join(map(str, command))} ended with {code}: {said[-2000:]}")
        return Cost(seconds, private, out.read().decode())


def _watch(pid: int) -> int:
    """Wait for a process to end; return the largest private memory of it and its descendants."""
    ended = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        family, largest, looks = [pid], 0, 0
        while True:
            if looks % FAMILY == 0:
                family = [pid, *_descendants(pid)]
            largest = max(largest, sum(map(_private, family)))
            looks += 1
            if poll.poll(INTERVAL):
                return largest
    finally:
        os.close(ended)


def _private(pid: int) -> int:
    """Return the private memory of a process in bytes; 0 if there is none."""
    try:
        status = Path(f"/proc/{pid}/status").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    _, found, rest = status.partition(b"\nRssAnon:")
    return int(rest.split(maxsplit=1)[0]) * 1024 if found else 0


def _descendants(pid: int) -> Iterator[int]:
    """Yield the processes that any thread of a process started, and theirs."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in map(int, children):
            yield child
            yield from _descendants(child)


def _environment() -> dict[str, str]:
    """Return an environment in which Python keeps its bytecode, as a user's does."""
    environment = dict(os.environ)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment
