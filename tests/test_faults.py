"""Every writer leaves the old file or the new one, whatever system call fails or kills it."""

import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from flows import locking, outbox
from taskvec import checkpoints

CHANGES = {"mkdir", "openat", "write", "pwrite64", "fallocate", "ftruncate", "fsync", "fdatasync",
           "close", "chmod", "rename", "unlink", "unlinkat", "rmdir", "flock"}  # fmt: skip
WAITS = {"openat", "read", "write", "pwrite64", "fallocate", "fsync", "fdatasync", "flock", "close"}
STRACE = shutil.which("strace")
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(STRACE is None, reason="strace is not installed; apt.txt names it"),
]


@dataclass(frozen=True)
class Writer:
    """A program that writes, and what may be there afterwards.

    Attributes:
        code: its Python code; ``root`` is the directory.
        watched: the files whose system calls are made to fail, relative to the directory.
        state: what is there: "old", "new" or a description of what must never be.
        before: puts the old state into a directory.
        states: what must be seen over all faults.
    """

    code: str
    watched: tuple[str, ...]
    state: Callable[[Path], str]
    before: Callable[[Path], None]
    states: frozenset[str] = frozenset({"old", "new"})


def _old_text(directory: Path) -> None:
    (directory / "data").mkdir()
    (directory / "data/file.txt").write_text("old\n")


def _text(directory: Path) -> str:
    return {"old\n": "old", "new\n": "new"}.get((directory / "data/file.txt").read_text(), "torn")


def _old_log(directory: Path) -> None:
    log = outbox.Log.create(directory)
    log.append("start", name="run", tags={})
    log.release()


def _log(directory: Path) -> str:
    """A log has one line or two; a torn end is repaired when it is opened again."""
    (path,) = outbox.logs(directory)
    log = outbox.Log.claim(path)
    assert log is not None
    log.release()
    if outbox.broken(path) is not None:
        return "broken"
    return {1: "old", 2: "new"}.get(len(path.read_text().splitlines()), "new")


def _old_weights(directory: Path) -> None:
    source = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5)}
    checkpoints.save(directory / "source.safetensors", source, "vector", note="new")
    old = {name: -tensor for name, tensor in source.items()}
    checkpoints.save(directory / "data/out.safetensors", old, "vector", note="old")


def _weights(directory: Path) -> str:
    found = checkpoints.load(directory / "data/out.safetensors", "vector")  # every byte is checked
    return str(found.metadata["note"])


def _free(directory: Path) -> str:
    """A lock is free whatever became of who held it."""
    with locking.held(directory, "test", wait=False):
        return "new"


WRITERS = {
    "text": Writer(
        "from taskvec.atomic import write_text\n"
        "write_text(root / 'data/file.txt', 'new\\n')",
        ("data", "data/.writing-file.txt", "data/file.txt"),
        _text,
        _old_text,
    ),
    "weights": Writer(
        "import itertools, tempfile\n"
        "tempfile._name_sequence = (f'trial{n}' for n in itertools.count())\n"
        "from taskvec.lazy import set_workers\n"
        "from taskvec.mapped import open_weights\n"
        "from taskvec.streaming import write\n"
        "set_workers(1)\n"  # strace counts the calls of each thread
        "source = open_weights(root / 'source.safetensors')\n"
        "write(root / 'data/out.safetensors', source.tensors, kind='vector',\n"
        "      metadata={'note': 'new'})",
        ("data", "data/.writing-trial0", "data/.writing-trial0/out.safetensors",
         "data/out.safetensors"),
        _weights,
        _old_weights,
    ),
    "log": Writer(
        "from flows import outbox\n"
        "log = outbox.Log.claim(outbox.logs(root)[0])\n"
        "log.append('edited', path='x', header={}, parents=[], metrics={})",
        (".taskvec/outbox/*.jsonl",),
        _log,
        _old_log,
    ),
    "lock": Writer(
        "from flows.locking import held\n"
        "with held(root, 'trial', wait=False):\n"
        "    pass",
        (".taskvec", ".taskvec/run.lock", ".taskvec/run.json"),
        _free,
        lambda directory: None,
        frozenset({"new"}),
    ),
}  # fmt: skip


def faults(call: str) -> list[str]:
    """Return what can happen at a system call.

    A process that is killed at a question leaves what it leaves at the next change.
    """
    return [
        "error=EIO",
        *(["signal=KILL", "error=ENOSPC"] if call in CHANGES else []),
        *(["error=EINTR"] if call in WAITS else []),
    ]


def run(writer: Writer, directory: Path, *strace: str) -> tuple[int, list[str]]:
    """Run a writer under strace; return its exit code and what strace saw.

    Args:
        writer: what to run.
        directory: where it writes.
        strace: which calls to watch, and what to do at one of them.
    """
    code = (
        f"import sys\nfrom pathlib import Path\nsys.path[:0] = {sys.path!r}\n"
        f"root = Path({str(directory)!r})\n{writer.code}"
    )
    trace = directory.parent / "trace.txt"
    done = subprocess.run(
        [STRACE or "", "-f", "-y", "-qq", "-o", str(trace), *strace,
         sys.executable, "-I", "-S", "-B", "-c", code],
        capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, trace.read_text().splitlines()


def points(writer: Writer, directory: Path, lines: list[str]) -> list[tuple[str, int]]:
    """Return (call, the how manieth of its kind) of all calls that touched a writer's files.

    As strace does when it injects a fault, count the calls of each thread by themselves.
    """
    files = [re.escape(str(directory.resolve() / name)) for name in writer.watched]
    patterns = [re.compile('[<"]' + name.replace(r"\*", "[^/]*") + '[>"]') for name in files]
    counts: Counter[tuple[str, str]] = Counter()
    found = []
    for line in lines:
        if match := re.match(r"(\d+) +(\w+)\(", line):
            counts[match[1], match[2]] += 1
            if any(pattern.search(line) for pattern in patterns):
                found.append((match[2], counts[match[1], match[2]]))
    return found


@pytest.mark.parametrize("name", WRITERS)
def test_no_fault_at_any_system_call_tears_a_file(name: str, tmp_path: Path) -> None:
    writer = WRITERS[name]
    reference = tmp_path / "reference"
    reference.mkdir()
    writer.before(reference)
    code, lines = run(writer, reference)
    assert code == 0 and writer.state(reference) == "new"
    calls = points(writer, reference, lines)
    assert len(calls) >= 3, calls
    seen = set()
    for call, number in calls:
        for fault in faults(call):
            place = tmp_path / "trial"
            place.mkdir()
            writer.before(place)
            inject = f"inject={call}:{fault}:when={number}"
            killed = fault.startswith("signal")
            quick = [] if killed else ["--seccomp-bpf"]  # which cannot send signals
            code, lines = run(writer, place, *quick, "-e", f"trace={call}", "-e", inject)
            assert killed or any("(INJECTED)" in line for line in lines)
            assert code in ((-signal.SIGKILL, 128 + signal.SIGKILL) if killed else (0, 1)), code
            state = writer.state(place)
            assert state in ("old", "new"), (call, fault, state)
            assert state == "new" or code != 0, (call, fault)  # no success is claimed for nothing
            seen.add(state)
            if killed:  # the next one is not in the way of what this one left
                again, _ = run(writer, place)
                assert again == 0 and writer.state(place) == "new"
                locking.sweep(place)
                assert not list(place.rglob("data/**/.writing-*"))
            shutil.rmtree(place)
    assert seen == writer.states


def test_what_killed_writers_leave_is_swept(tmp_path: Path) -> None:
    left = tmp_path / "data" / "edits" / "both-0" / ".writing-a1b2"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    (tmp_path / "data" / ".writing-x.csv").write_text("half")
    (tmp_path / "data" / "whole.csv").write_text("whole")
    locking.sweep(tmp_path)
    assert [p.name for p in sorted(tmp_path.rglob("*")) if p.is_file()] == ["whole.csv"]
