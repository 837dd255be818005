"""`python -m tests.soak [ROW ...] [--minutes N]`: faults in numbers that no suite has time for.

Each row has a target. Trials add up over invocations and checkouts (docs/reliability.json), and
docs/reliability.md has the sums. A trial that fails is printed and noted with the number that
repeats it. Several rows may be done at once, one by each process.
"""

import argparse
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from flows import outbox, verify
from flows.lineage import Lineage
from flows.servers import started_prefect
from taskvec import checkpoints, streaming
from taskvec.atomic import write_text
from taskvec.mapped import open_weights
from tests import soak_runs
from tests.project import ROOT, Project, Result
from tests.soak_rows import ROWS, RUNS, Trial

PAGE = ROOT / "docs" / "reliability.md"
STATE = PAGE.with_suffix(".json")
NOTING = ROOT / ".taskvec" / "soak.lock"
DAMAGES = ("bit", "page", "cut", "swap")
DIGITS = tuple(bytes([digit]) for digit in b"0123456789")
MUTATIONS = ("digest", "parameter", "command", "drop", "log", "header", "row")


def main() -> None:
    """Do trials of some rows until they are done or the time is up; write the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], default=[])
    parser.add_argument("--minutes", type=float, default=60.0)
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    state = _state()
    names = arguments.rows or list(ROWS)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        with started_prefect(place / "server", ui=False) as server:
            for own in (False, True):
                rows = [name for name in names if (name in RUNS) == own]
                if any(state.get(n, {}).get("trials", 0) < ROWS[n].target for n in rows):
                    made = soak_runs.Runs if own else _finished
                    subject = made(place / f"own-{own}", server.environment)
                    for name in rows:
                        _try(name, subject, state.get(name, {"trials": 0, "failures": []}), end)
    write_text(PAGE, page(_state()))


def _try(name: str, subject: Any, found: dict[str, Any], end: float) -> None:
    """Do trials of a row until they are done or it is late; ``found`` is what came out so far."""
    target = ROWS[name].target
    with trials(name, subject) as trial:
        while found["trials"] < target and time.monotonic() < end:
            seed = found["calls"] = found.get("calls", found["trials"]) + 1
            number, wrong = trial(random.Random(f"{name} {seed}"))
            if wrong:
                found["failures"].append(f"{seed}: {wrong}")
                _say(f"{name} {seed}: {wrong}")
            found["trials"] += number
            if seed % ROWS[name].note == 0:
                _note(name, found)
                _say(f"{name}: {found['trials']} of {target}")
    _note(name, found)


def _state() -> dict[str, Any]:
    return json.loads(STATE.read_text()) if STATE.is_file() else {}


def _note(name: str, found: dict[str, Any]) -> None:
    """Write down what came out of a row; another process may be doing another one."""
    NOTING.parent.mkdir(exist_ok=True)
    with FileLock(NOTING):
        write_text(STATE, json.dumps({**_state(), name: found}, indent=2) + "\n")


def page(state: dict[str, Any]) -> str:
    """Return docs/reliability.md: the sums, and what failed."""
    lines = [
        "# Reliability",
        "",
        "Written by `make soak`; do not edit. The same faults in small numbers are in `make test`.",
        "",
        "`make test` has in full: SIGKILL, ENOSPC, EIO and EINTR at every system call of the",
        "writers of texts, weights and logs and of the lock, after which the old file or the new",
        "one is there (tests/test_faults.py); 1,000 changes of received exports, all found, and",
        "nothing in 200 that nobody touched (tests/test_provenance.py); secrets in the environment",
        "of every command that a test runs, found in no output, log or database, nor among the",
        "arguments of processes (tests/project.py).",
        "",
        "| row | what is done | what must hold | trials | failures |",
        "|---|---|---|---:|---:|",
    ]
    told = []
    for row in ROWS.values():
        found = state.get(row.name, {"trials": 0, "failures": []})
        failures = found["failures"]
        assert isinstance(failures, list)
        lines.append(
            f"| {row.name} | {row.what} | {row.must} | {found['trials']} of {row.target} "
            f"| {len(failures)} |"
        )
        told += [f"- {row.name} {' '.join(failure.split())}" for failure in failures]
    return "\n".join([*lines, *(["", "What failed:", "", *told] if told else []), ""])


def _finished(directory: Path, server: dict[str, str]) -> Project:
    """Return a project in which everything has run and is committed."""
    project = Project.create(directory, server)
    done = project.taskvec("run")
    assert done.code == 0, done.err
    project.command("git", "add", "-A")
    project.command("git", "-c", "user.name=t", "-c", "user.email=t@b", "commit", "-qm", "-")
    return project


@contextmanager
def trials(name: str, subject: Any) -> Iterator[Trial]:
    """Yield what does trials of a row.

    Args:
        name: of the row.
        subject: a finished project, or `soak_runs.Runs`.
    """
    match name:
        case "rebuild":
            yield lambda draw: (1, rebuilt(subject, draw))
        case "race":
            yield lambda draw: (1, raced(draw))
        case _ if name in RUNS:
            yield lambda draw: RUNS[name](subject, draw)
        case _:
            with Lineage(subject.root) as lineage:
                match name:
                    case "bytes":
                        yield lambda draw: (1, damaged(lineage, draw))
                    case "clean":
                        yield lambda draw: (1, clean(lineage, draw))
                    case _:
                        yield lambda draw: (1, mutated(subject.root, draw))


def damaged(lineage: Lineage, draw: random.Random) -> str:
    """Damage a cached object, and see whether `verify` names it; put it back."""
    files = sorted({(p, m) for e in lineage.recorded() for p, m in e.outputs.items()})
    path, digest = draw.choice(files)
    cached = lineage.records.cached(digest)
    before, how = cached.read_bytes(), draw.choice(DAMAGES)
    if how == "swap":
        other = lineage.records.cached(draw.choice([m for _, m in files if m != digest]))
        after = other.read_bytes()
    else:
        after = damage(before, how, draw)
    if after == before:
        return ""
    _write(cached, after)
    try:
        found = verify.verify(lineage, [lineage.artifact(digest)])
        named = {finding.md5 for finding in found.findings}
        return "" if digest in named else f"{how} of {path} was not found"
    finally:
        _write(cached, before)


def damage(content: bytes, how: str, draw: random.Random) -> bytes:
    """Return what is left of a file after a fault of hardware."""
    if not content:
        return b"\0"
    place = draw.randrange(len(content))
    match how:
        case "bit":
            changed = bytes([content[place] ^ (1 << draw.randrange(8))])
            return content[:place] + changed + content[place + 1 :]
        case "page":
            start = place // 4096 * 4096
            return (
                content[:start] + bytes(min(4096, len(content) - start)) + content[start + 4096 :]
            )
        case _:
            return content[:place]


def clean(lineage: Lineage, draw: random.Random) -> str:
    """Verify the chain of some artifact that nobody touched."""
    digests = sorted({md5 for e in lineage.recorded() for md5 in e.outputs.values()})
    found = verify.verify(
        lineage, [lineage.artifact(draw.choice(digests))], deep=draw.random() < 0.2
    )
    return "; ".join(f"{f.node}: {f.problem}" for f in found.findings)


def mutated(root: Path, draw: random.Random) -> str:
    """Change a record, and see whether `verify` says so; put it back."""
    how = draw.choice(MUTATIONS)
    if how == "log":
        target = draw.choice(outbox.logs(root))
    elif how == "row":
        return _row_changed(root, draw)
    elif how == "header":
        target = draw.choice(sorted((root / "data").glob("*/*.safetensors")))
    else:
        target = root / draw.choice(["dvc.lock", "edits/dvc.lock"])
    before = target.read_bytes()
    after = _mutation(before, how, draw)
    if after == before:
        return ""
    _write(target, after)
    return _noticed(root, target, before, f"{how} in {target.name}")


def _row_changed(root: Path, draw: random.Random) -> str:
    """Change or remove a row that MLflow holds of a stage, and see whether `verify` says so."""
    path = root / "mlflow.db"
    before = path.read_bytes()
    stages = "SELECT run_uuid FROM tags WHERE key = 'dvc.stage'"
    models = f"SELECT model_id FROM logged_models WHERE source_run_id IN ({stages})"
    table, value, where = draw.choice(
        [
            ("tags", "value", "key IN ('dvc.stage', 'dvc.outs', 'dvc.deps')"),
            ("params", "value", f"run_uuid IN ({stages})"),
            ("metrics", "value", f"run_uuid IN ({stages})"),
            ("runs", "status", f"run_uuid IN ({stages})"),
            (
                "logged_model_tags",
                "tag_value",
                f"model_id IN ({models}) AND (tag_key LIKE 'dvc.%' OR tag_key LIKE 'taskvec.%')",
            ),
        ]
    )
    with closing(sqlite3.connect(path)) as opened, opened:
        rows = opened.execute(f"SELECT rowid, {value} FROM {table} WHERE {where}").fetchall()
        row, old = draw.choice(rows)
        if draw.random() < 0.2:
            opened.execute(f"DELETE FROM {table} WHERE rowid = ?", (row,))
        else:
            match table:
                case "metrics":
                    new = old + 0.25
                case "runs":
                    new = "SCHEDULED"
                case _:
                    new = f"x{old}"
            opened.execute(f"UPDATE {table} SET {value} = ? WHERE rowid = ?", (new, row))
    return _noticed(root, path, before, f"{old!r} in {table}")


def _noticed(root: Path, path: Path, before: bytes, what: str) -> str:
    """See whether `verify` says that a file was changed; put it back."""
    try:
        with Lineage(root) as lineage:
            found = verify.verify(lineage)
        return "" if found.findings else f"{what} was not found"
    finally:
        _write(path, before)


def _mutation(content: bytes, how: str, draw: random.Random) -> bytes:
    """Return a record with one thing changed that means something."""
    lines = content.split(b"\n")
    match how:
        case "digest":
            place = draw.choice(
                [i for i, line in enumerate(lines) if b"md5: " in line and b"hash" not in line]
            )
            head, _, md5 = lines[place].rpartition(b" ")
            at = draw.randrange(32)
            other = draw.choice([c for c in b"0123456789abcdef" if c != md5[at]])
            lines[place] = head + b" " + md5[:at] + bytes([other]) + md5[at + 1 :]
        case "parameter":
            numbers = [
                i
                for i, line in enumerate(lines)
                if line.strip().endswith(DIGITS)
                and line.startswith(b"        ")
                and b"size" not in line
                and b"nfiles" not in line
            ]
            place = draw.choice(numbers)
            lines[place] += b"7"
        case "command":
            place = draw.choice(
                [i for i, line in enumerate(lines) if line.startswith(b"    cmd: ")]
            )
            lines[place] += b"x"
        case "drop":
            place = draw.choice([i for i, line in enumerate(lines) if b"path: " in line])
            del lines[place : place + 4]
        case "log":
            place = draw.randrange(len(lines) - 1)
            match draw.randrange(3):
                case 0:
                    del lines[place]
                case 1:
                    lines.insert(place, lines[place])
                case _:
                    at = draw.randrange(len(lines[place]))
                    lines[place] = lines[place][:at] + b"~" + lines[place][at + 1 :]
        case "header":
            at = 8 + draw.randrange(200)
            return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    return b"\n".join(lines)


def rebuilt(project: Project, draw: random.Random) -> str:
    """Rebuild an artifact under other circumstances; return what is not as it was."""
    done, circumstances = reproduced(project, draw, "both")
    if done.code != 0:
        return f"exit code {done.code}: {done.err[-300:]}"
    return "" if json.loads(done.out)["equal"] else f"other bits with {circumstances}"


def reproduced(project: Project, draw: random.Random, what: str) -> tuple[Result, str]:
    """Do `taskvec reproduce WHAT --json` under other circumstances; return also which."""
    seeds = {
        "TZ": draw.choice(["Asia/Kolkata", "America/St_Johns", "UTC", "Pacific/Chatham"]),
        "LC_ALL": draw.choice(["C", "C.UTF-8", "de_DE.UTF-8", "tr_TR.UTF-8"]),
        "PYTHONHASHSEED": str(draw.randrange(1, 1000)),
    }
    core = {draw.choice(sorted(os.sched_getaffinity(0)))}
    mask = draw.choice(["022", "077", "027"])
    with tempfile.TemporaryDirectory(prefix=f"elsewhere-{draw.randrange(10**9)}-") as directory:
        environment = {**project.server, **seeds, "TMPDIR": directory}
        alone = Project(project.root, environment)
        cores = ",".join(map(str, core)) if draw.random() < 0.5 else "0-63"
        done = alone.command(
            "sh",
            "-c",
            f"umask {mask}; exec taskset -c {cores} python -m flows.cli reproduce {what} --json",
        )
    return done, f"{seeds}, umask {mask}, cores {cores}"


WRITES = 25  # of each of the processes that race
RACE = """
import sys
from pathlib import Path
from flows import outbox
from taskvec.mapped import open_weights
from taskvec.streaming import write
root, who = Path(sys.argv[1]), sys.argv[2]
source = open_weights(root / f"{who}.safetensors")
sys.stdin.readline()
for turn in range(int(sys.argv[3])):
    write(root / "out.safetensors", source.tensors, kind="vector", metadata={"by": who})
    outbox.note(root, f"{who}-{turn}", outbox.Mark("own", turn, {}, done=True))
"""


def raced(draw: random.Random) -> str:
    """Let two processes write the same files while we read them."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        outbox.directory(root).mkdir(parents=True)
        whole = set()
        for who in ("one", "two"):
            tensors = {"w": torch.full((draw.randrange(1, 200_000),), float(draw.random()))}
            checkpoints.save(root / f"{who}.safetensors", tensors, "vector")
            source = open_weights(root / f"{who}.safetensors")
            streaming.write(
                root / "out.safetensors", source.tensors, kind="vector", metadata={"by": who}
            )
            whole.add((root / "out.safetensors").read_bytes())
        words = [sys.executable, "-c", RACE, name]
        racers = [
            subprocess.Popen(
                [*words, who, str(WRITES)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for who in ("one", "two")
        ]
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("\n")
            racer.stdin.flush()
        torn = False
        while any(racer.poll() is None for racer in racers):
            torn |= (root / "out.safetensors").read_bytes() not in whole
        errors = [racer.communicate()[1] for racer in racers]
        if torn:
            return "a reader saw a torn file"
        if any(racer.returncode for racer in racers):
            return f"a writer failed: {errors}"
        lost = 2 * WRITES - len(outbox.marks(root))
        return f"{lost} lines were lost" if lost else ""


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _write(path: Path, content: bytes) -> None:
    """Write a file in place of another, its mode and times as they were."""
    status = path.stat()
    copy = path.with_name(".soak")
    copy.write_bytes(content)
    shutil.copystat(path, copy)
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.replace(path)


if __name__ == "__main__":
    main()
