"""Questions about lineage in a repository with 10,000 recorded executions.

The executions are made up, and written where DVC and `taskvec run` write them: the run cache, lock
files and the log of runs. Every time is the wall time of a whole process as a user starts it.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dvc.stage.cache import _get_cache_hash
from dvc.utils.serialize import dumps_yaml

from benchmarks import postgres
from benchmarks.measuring import Times, conditions, interleave, ratio, table, timed, verdict
from benchmarks.mlflow_runs import ALIAS, EDIT, fill
from flows import verify
from flows.lineage import Lineage
from flows.outbox import Log
from flows.records import md5_of
from flows.store import tracking_uri
from taskvec import checkpoints
from tests.project import Project

EXECUTIONS, QUICK = 10_000, 300
TASKS, SEEDS = 10, 10  # of each round; a round has three stages a task, and edits on top
ROUNDS, QUICK_ROUNDS = 7, 1
TARGET = 1.0  # second
BYTES = 1 << 30  # that `verify` reads
QUICK_BYTES = 1 << 22
VERIFY_TARGET = 1.0  # GB/s
POSTGRES = ", PostgreSQL"
BEFORE, AFTER = "status, without lineage", "status, with lineage"


def measure(*, quick: bool) -> str:
    """Return the section of docs/benchmarks.md."""
    load = os.getloadavg()[0]
    number = QUICK if quick else EXECUTIONS
    rounds = QUICK_ROUNDS if quick else ROUNDS
    with tempfile.TemporaryDirectory() as name:
        project = Project.create(Path(name) / "checkout", {})
        empty = interleave({BEFORE: _command(project, "status")}, rounds)
        model = record(project.root, number)
        fill(project.root, tracking_uri(project.root), number, model)
        first = timed(lambda: Lineage(project.root).find(model))
        times = interleave(
            {**_questions(project, model), AFTER: _command(project, "status")}, rounds
        )
        with postgres.running() as uri:
            if uri:
                fill(project.root, uri, number, model)
                other = Project(project.root, {"MLFLOW_TRACKING_URI": uri})
                found = interleave(_questions(other, model), rounds)
                times |= {f"{name}{POSTGRES}": value for name, value in found.items()}
        speed = _verify(project, QUICK_BYTES if quick else BYTES, rounds)
    return _section(load, number, first, {**empty, **times}, speed)


def _questions(project: Project, model: str) -> dict[str, Callable[[], None]]:
    return {
        "trace of a model": _command(project, "trace", model),
        "trace of a registered name": _command(project, "trace", f"models:/{EDIT}@{ALIAS}"),
        "trace --down of a checkpoint": _command(project, "trace", "task_0-0", "--down"),
        "why": _command(project, "why", "prepare@digits"),
    }


def record(root: Path, number: int) -> str:
    """Record made-up executions: rounds of fine-tuning, vectors, and edits of them.

    Args:
        root: of a project.
        number: how many executions.

    Returns:
        The digest of the last edited model.
    """
    locked: dict[str, Any] = {}
    log = Log.create(root)
    log.append("start", name="made up", tags={})
    done, model = 0, ""
    for version in range(number):
        for stage, item, inputs, outputs in _round(version):
            entry = _entry(stage, item, inputs, outputs, version)
            _run_cache(root, entry)
            _logged(log, stage, item, entry)
            name = f"{stage}-{item}" if stage in ("combine", "search") else f"{stage}@{item}"
            locked[name] = entry
            model = entry["outs"][-1]["md5"]
            done += 1
            if done == number:
                _write_lock(root, locked)
                log.close("FINISHED")
                log.release()
                return model
    raise AssertionError("a round has no stage")


def _round(version: int) -> Any:
    """Yield (stage, item, inputs, outputs) of a round: path -> what its bytes follow from."""
    base = {"data/checkpoints/pretrained.safetensors": "base"}
    vectors = {}
    for task in (f"task_{i}-{version % SEEDS}" for i in range(TASKS)):
        train = {f"data/prepared/{task}/train.safetensors": task}
        tuned = {f"data/checkpoints/{task}.safetensors": f"{task} {version}"}
        vector = {f"data/vectors/{task}.safetensors": f"vector {task} {version}"}
        yield "fine_tune", task, {**base, **train}, tuned
        yield "extract", task, {**base, **tuned}, vector
        vectors |= vector
    for edit in (f"edit_{i}-{version % SEEDS}" for i in range(TASKS)):
        basis = {f"data/edits/{edit}/basis.safetensors": f"basis {edit} {version}"}
        model = {f"data/edits/{edit}/model.safetensors": f"model {edit} {version}"}
        yield "combine", edit, vectors, basis
        yield "search", edit, {**base, **basis}, model


def _entry(
    stage: str, item: str, inputs: dict[str, str], outputs: dict[str, str], version: int
) -> dict[str, Any]:
    def listed(found: dict[str, str]) -> list[dict[str, Any]]:
        return [
            {"path": path, "hash": "md5", "md5": _md5(source), "size": 1000}
            for path, source in found.items()
        ]

    params = {"params.yaml": {"fine_tune.steps": version}, "code.yaml": {stage: _md5(stage)}}
    command = f"python -m tasks {stage} {item}"
    return {"cmd": command, "deps": listed(inputs), "params": params, "outs": listed(outputs)}


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _run_cache(root: Path, entry: dict[str, Any]) -> None:
    key = _get_cache_hash({**entry, "outs": list(entry["outs"])}, key=True)
    place = root / ".dvc" / "cache" / "runs" / key[:2] / key
    place.mkdir(parents=True, exist_ok=True)
    (place / _get_cache_hash(entry)).write_text(dumps_yaml(entry))


def _logged(log: Log, stage: str, item: str, entry: dict[str, Any]) -> None:
    address = f"{stage}@{item}"
    number = log.append(
        "begin", durable=False, address=address, name=address, command=entry["cmd"], how="run",
        because="fine_tune.steps changed", prefect_task_run="", params={},
    )  # fmt: skip
    log.append(
        "end", durable=False, of=number, status="FINISHED",
        outs={out["path"]: out["md5"] for out in entry["outs"]},
        deps={dep["path"]: dep["md5"] for dep in entry["deps"]},
        headers={}, metrics={}, params={},
    )  # fmt: skip


def _write_lock(root: Path, entries: dict[str, Any]) -> None:
    (root / "dvc.lock").write_text(dumps_yaml({"schema": "2.0", "stages": entries}))


def _command(project: Project, *words: str) -> Callable[[], None]:
    environment = project.environment()
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def call() -> None:
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", *words],
            cwd=project.root, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stderr}"

    call()  # bytecode and the index are warm
    return call


def _verify(project: Project, size: int, rounds: int) -> tuple[float, Times]:
    """Return GB and the times in which `verify` hashes them, the files in memory."""
    import torch

    entry_root = project.root / "data" / "checkpoints"
    entry_root.mkdir(parents=True, exist_ok=True)
    files = 8
    locked = {}
    for i in range(files):
        path = entry_root / f"big_{i}-0.safetensors"
        values = torch.arange(size // files // 4, dtype=torch.float32) + i
        checkpoints.save(path, {"w": values}, "checkpoint", origin="")
        digest = md5_of(path)
        cached = project.root / ".dvc" / "cache" / "files" / "md5" / digest[:2] / digest[2:]
        cached.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, cached)
        entry = _entry("fine_tune", f"big_{i}-0", {}, {}, 0)
        entry["outs"] = [{"path": str(path.relative_to(project.root)), "hash": "md5",
                          "md5": digest, "size": path.stat().st_size}]  # fmt: skip
        _run_cache(project.root, entry)
        locked[f"fine_tune@big_{i}-0"] = entry
    _write_lock(project.root, locked)
    with Lineage(project.root) as lineage:
        found = verify.verify(lineage)
        assert not found.findings, found.findings[:3]
        times = interleave({"verify": lambda: verify.verify(lineage)}, rounds)["verify"]
    return found.bytes / 1e9, times


def _section(
    load: float, number: int, first: float, times: dict[str, Times], speed: tuple[float, Times]
) -> str:
    questions = [name for name in times if name not in (BEFORE, AFTER)]
    rows = [[name, times[name].cell(), verdict(times[name].median, TARGET)] for name in questions]
    cost = ratio(times[AFTER], times[BEFORE])
    gigabytes, verified = speed
    rate = gigabytes / verified.median
    return "\n\n".join(
        [
            "## Lineage",
            conditions(load, ("dvc",)),
            f"A repository with {number:,} recorded executions in DVC's run cache and in the log "
            f"of runs, and as many runs in MLflow's database: its SQLite file, or PostgreSQL. "
            "Times of whole processes in seconds, median (lowest to highest)."
            + ("" if any(POSTGRES in name for name in times) else " PostgreSQL is not installed."),
            table(["question", "seconds", "seconds, target"], rows),
            f"The first question builds the index: {first:.0f} s, once. `taskvec status` takes "
            f"{times[AFTER].cell()} s there and {times[BEFORE].cell()} s in the same repository "
            f"before anything was recorded, {cost[0]:.2f} times as long.",
            f"`taskvec verify` hashes {gigabytes:.1f} GB of files that the system holds in memory "
            f"in {verified.cell()} s: {rate:.2f} GB/s (target: at least {VERIFY_TARGET:g}: "
            f"{'met' if rate >= VERIFY_TARGET else '**missed**'}). It reads every byte once; a "
            "core hashes md5 at about 0.7 GB/s.",
        ]
    )
