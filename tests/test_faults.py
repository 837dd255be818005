"""Every writer leaves the old file or the new one, whatever system call fails or kills it."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows import locking, outbox
from taskvec import headers
from tests.project import ROOT

FAULTS = ("signal=KILL", "error=ENOSPC")
STRACE = shutil.which("strace")
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(STRACE is None, reason="strace is not installed; apt.txt names it"),
]


@dataclass(frozen=True)
class Writer:
    """A program that writes, and what may be there afterwards.

    Attributes:
        code: its Python code; ``sys.argv[1]`` is the directory.
        watched: the files whose system calls are made to fail, relative to the directory.
        state: what is there: "old", "new" or a description of what must never be.
    """

    code: str
    watched: tuple[str, ...]
    state: Callable[[Path], str]


def _text(directory: Path) -> str:
    return {"old\n": "old", "new\n": "new"}.get((directory / "file.txt").read_text(), "torn")


def _log(directory: Path) -> str:
    """A log has one line or two; a torn end is repaired when it is opened again."""
    (path,) = outbox.logs(directory)
    log = outbox.Log.claim(path)
    assert log is not None
    log.release()
    if outbox.broken(path) is not None:
        return "broken"
    return {1: "old", 2: "new"}.get(len(path.read_text().splitlines()), "torn")


def _weights(directory: Path) -> str:
    path = directory / "out.safetensors"
    metadata = headers.read_metadata(headers.read_header(path), path)
    return str(metadata["note"]) if path.stat().st_size > 400 else "torn"


WRITERS = {
    "text": Writer(
        "from taskvec.atomic import write_text\n"
        "write_text(Path(sys.argv[1]) / 'file.txt', 'new\\n')",
        (".", ".writing-file.txt", "file.txt"),
        _text,
    ),
    "log": Writer(
        "from flows import outbox\n"
        "log = outbox.Log.claim(outbox.logs(Path(sys.argv[1]))[0])\n"
        "log.append('edited', path='x', header={}, parents=[], metrics={})",
        (".taskvec/outbox/LOG",),
        _log,
    ),
}


def prepared(name: str, directory: Path) -> Writer:
    """Put the old state into a directory; return the writer with the names that it has there."""
    writer = WRITERS[name]
    if name == "text":
        (directory / "file.txt").write_text("old\n")
        return writer
    log = outbox.Log.create(directory)
    log.append("start", name="run", tags={})
    log.release()
    (path,) = outbox.logs(directory)
    watched = tuple(item.replace("LOG", path.name) for item in writer.watched)
    return Writer(writer.code, watched, writer.state)


def run(writer: Writer, directory: Path, fault: str = "") -> tuple[int, list[str]]:
    """Run a writer under strace; return its exit code and the calls that touched its files.

    Args:
        writer: with the names that its files have there.
        directory: where it writes.
        fault: as strace takes it: which call, what happens, and the how manieth of its kind.
    """
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n{writer.code}"
    trace = directory.parent / "trace.txt"
    words = [STRACE or "", "-f", "-qq", "-o", str(trace)]
    for name in writer.watched:
        words += ["-P", str((directory / name).resolve())]
    if fault:
        words += ["-e", f"inject={fault}"]
    done = subprocess.run(
        [*words, sys.executable, "-B", "-c", code, str(directory)],
        capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "0"},
    )  # fmt: skip
    return done.returncode, re.findall(r"^\d+ +(\w+)\(", trace.read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", WRITERS)
def test_no_fault_at_any_system_call_tears_a_file(name: str, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    reference.mkdir()
    writer = prepared(name, reference)
    code, calls = run(writer, reference)
    assert code == 0 and writer.state(reference) == "new"
    assert len(calls) >= 3, calls
    seen = set()
    for number, call in enumerate(calls):
        for fault in FAULTS:
            place = tmp_path / f"{number}-{fault}"
            place.mkdir()
            one = prepared(name, place)
            occurrence = calls[: number + 1].count(call)
            code, _ = run(one, place, f"{call}:{fault}:when={occurrence}")
            killed = fault.startswith("signal")
            assert code in ((-signal.SIGKILL, 128 + signal.SIGKILL) if killed else (0, 1)), code
            state = one.state(place)
            assert state in ("old", "new"), (call, fault, state)
            assert state == "new" or code != 0, (call, fault)  # no success is claimed for nothing
            seen.add(state)
            again, _ = run(one, place)
            assert again == 0 and one.state(place) in ("new", "torn" if name == "log" else "new")
            shutil.rmtree(place)
    assert seen == {"old", "new"}


def test_what_killed_writers_leave_is_swept(tmp_path: Path) -> None:
    left = tmp_path / "data" / "edits" / "both-0" / ".writing-a1b2"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    (tmp_path / "data" / ".writing-x.csv").write_text("half")
    (tmp_path / "data" / "whole.csv").write_text("whole")
    locking.sweep(tmp_path)
    assert [p.name for p in sorted(tmp_path.rglob("*")) if p.is_file()] == ["whole.csv"]
