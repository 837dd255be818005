"""Trials of whole runs: `taskvec run` is killed.

A trial copies the smallest experiment, disturbs a real run of it, runs again without any manual
step, and compares all that is there with a run that nobody disturbed.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import md5
from pathlib import Path
from typing import IO, Any

import psutil

from flows import outbox
from tests import tiny_experiment
from tests.project import Project

LOCKS = ("dvc.lock", "edits/dvc.lock")
CACHE = Path(".dvc/cache/files/md5")
LINES = 20  # of a log of the whole experiment: its start, two a stage, its end
STARTING = 0.5  # the part of a whole run's time before its first stage
MOST = 6  # runs that are killed one after the other
LEFT_SECONDS = 10.0  # that a fork server may take to see that its driver is gone
RUN = ("run", tiny_experiment.TARGET)


@dataclass(frozen=True)
class Whole:
    """What a finished experiment has: files, what stages made of what, and what is cached."""

    files: dict[str, str]
    stages: dict[str, tuple[dict[str, str], dict[str, str]]]
    cached: frozenset[str]

    @classmethod
    def of(cls, root: Path) -> "Whole":
        """Return what a checkout has."""
        paths = [root / name for name in LOCKS] + [p for p in (root / "data").rglob("*")]
        files = {
            path.relative_to(root).as_posix(): md5(path.read_bytes()).hexdigest()
            for path in paths
            if path.is_file()
        }
        done = [item for item in outbox.executions(root) if item["status"] == "FINISHED"]
        stages = {item["name"]: (item["outs"], item["deps"]) for item in done}
        made = {digest for outs, _ in stages.values() for digest in outs.values()}
        cached = frozenset(d for d in made if (root / CACHE / d[:2] / d[2:]).is_file())
        return cls(files, stages, cached)


class Runs:
    """An experiment that has not run, and what a run that nobody disturbs makes of it."""

    def __init__(self, directory: Path, server: dict[str, str]) -> None:
        """Make the experiment.

        Args:
            directory: gets everything.
            server: the environment that leads to a Prefect server.
        """
        self.directory = directory
        self.environment = {**server, "TASKVEC_MLFLOW": "later"}
        self._template = tiny_experiment.create(directory / "template", self.environment)
        rendered = self._template.taskvec("status")
        assert rendered.code == 0, rendered.err
        self._template.command(
            sys.executable, "-m", "compileall", "-q", "flows", "tasks", "taskvec"
        )
        self._numbers = iter(range(10**9))

    @contextmanager
    def project(self, **more: str) -> Iterator[Project]:
        """Yield a copy in which nothing has run.

        Args:
            **more: variables of its environment, beside the others.
        """
        with tempfile.TemporaryDirectory(dir=self.directory, prefix="trial-") as name:
            project = self._template.copy(Path(name))
            project.server = {**self._template.server, **more}
            yield project

    @cached_property
    def whole(self) -> Whole:
        """What an undisturbed run leaves."""
        return self._reference[0]

    @cached_property
    def seconds(self) -> float:
        """How long it takes."""
        return self._reference[1]

    @cached_property
    def _reference(self) -> tuple[Whole, float]:
        with self.project() as project:
            began = time.monotonic()
            done = project.taskvec(*RUN)
            assert done.code == 0, done.err
            assert done.stages("run") == tiny_experiment.STAGES, done.err
            assert outbox.unsent(project.root) and not (project.root / "mlflow.db").exists()
            return Whole.of(project.root), time.monotonic() - began

    def completed(self, project: Project) -> str:
        """Run again, as a user would; return what is not as if nothing had happened."""
        done = project.taskvec(*RUN)
        if done.code != 0:
            return f"refused with exit code {done.code}: {done.err[-500:]}"
        return self.differences(project)

    def differences(self, project: Project) -> str:
        """Return what a finished checkout has that an undisturbed one has not, or the reverse."""
        found, root = Whole.of(project.root), project.root
        other = found.files.items() ^ self.whole.files.items()
        if other:
            return f"other files: {sorted({name for name, _ in other})}"
        if found.stages != self.whole.stages:
            told = [
                n for n in tiny_experiment.STAGES if found.stages.get(n) != self.whole.stages[n]
            ]
            return f"the log tells something else of {sorted(told)}"
        ran = [e["name"] for e in outbox.executions(root) if (e["how"], e["status"]) == _RAN]
        if again := sorted({name for name in ran if ran.count(name) > 1}):
            return f"finished stages ran again: {again}"
        if damaged := outbox.damages(root):
            return f"damaged logs: {damaged}"
        if found.cached != self.whole.cached:
            return f"not in the cache: {sorted(self.whole.cached - found.cached)}"
        if left := _left(root):
            return f"processes are left: {left}"
        return ""


_RAN = ("run", "FINISHED")


def _left(root: Path) -> list[str]:
    """Return the commands of processes that still work in a checkout, after a while."""
    deadline = time.monotonic() + LEFT_SECONDS
    while True:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if Path(process.cwd()) == root and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


@dataclass(frozen=True)
class Moment:
    """When something is done to a run: at a line of its log, which is the boundary of a stage, or
    after some time, whichever comes first; and not after its end."""

    lines: int = 10**9
    seconds: float = 10**9

    @classmethod
    def drawn(cls, draw: random.Random, runs: Runs, left: float = 1.0) -> "Moment":
        """Return a boundary or a time, evenly over a run that has a part of the work left."""
        if draw.random() < 0.5:
            return cls(lines=draw.randint(1, 1 + round((LINES - 1) * left)))
        return cls(seconds=draw.uniform(0.0, runs.seconds * (STARTING + (1 - STARTING) * left)))

    @classmethod
    def several(
        cls, draw: random.Random, runs: Runs, project: Project, most: int
    ) -> "Iterator[Moment]":
        """Yield moments for runs of a project one after the other, until nothing is left to do."""
        for _ in range(most):
            done = {e["name"] for e in outbox.executions(project.root) if e["status"] == "FINISHED"}
            if done == tiny_experiment.STAGES:
                return
            yield cls.drawn(draw, runs, 1 - len(done) / len(tiny_experiment.STAGES))

    def wait(self, project: Project, process: "subprocess.Popen[Any]") -> None:
        """Wait for the moment, or for the end of the process."""
        until = time.monotonic() + self.seconds
        known = set(outbox.logs(project.root))
        while process.poll() is None and time.monotonic() < until:
            fresh = [log for log in outbox.logs(project.root) if log not in known]
            if fresh and fresh[0].read_bytes().count(b"\n") >= self.lines:
                return
            time.sleep(0.001)


def killed(runs: Runs, draw: random.Random, most: int = 0) -> tuple[int, str]:
    """Kill all processes of a run, several times one run after another; then run again.

    Args:
        runs: the experiment.
        draw: when.
        most: how often; 0: that is drawn, too.

    Returns:
        How many runs were killed, since some end before, and what went wrong.
    """
    mlflow = {"TASKVEC_MLFLOW": "now"} if not most and draw.random() < 0.1 else {}
    kills = 0
    with runs.project(**mlflow) as project:
        for moment in Moment.several(draw, runs, project, most or draw.randint(1, MOST)):
            with started(project) as process:
                moment.wait(project, process)
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    kills += 1
        return kills, runs.completed(project)


def orphaned(runs: Runs, draw: random.Random, most: int = 0) -> tuple[int, str]:
    """Kill drivers alone, perhaps while a stage is frozen, and run again at once; as `killed`."""
    kills = 0
    with runs.project() as project:
        for moment in Moment.several(draw, runs, project, most or draw.randint(1, MOST)):
            with started(project) as process:
                moment.wait(project, process)
                frozen = stages_below(process.pid) if draw.random() < 0.5 else []
                for stage in frozen:
                    with suppress(psutil.NoSuchProcess):
                        stage.suspend()
                kills += process.poll() is None
                process.kill()
                process.wait()
        return kills, runs.completed(project)


def stages_below(driver: int) -> list[psutil.Process]:
    """Return the running stages of a driver: the children of its fork server."""
    found: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(driver).children():
            with suppress(psutil.NoSuchProcess):
                if "forkserver" in " ".join(child.cmdline()):
                    found += child.children()
    return found


@contextmanager
def started(project: Project) -> Iterator["subprocess.Popen[Any]"]:
    """Yield a run that writes what it says into a file of its own."""
    said: IO[str]
    with (project.root / ".taskvec/said.txt").open("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *RUN],
            cwd=project.root, env=project.environment(), text=True,
            stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
        process.said = said.name  # type: ignore[attr-defined]
        try:
            yield process
        finally:
            with suppress(ProcessLookupError, PermissionError):
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def tail(process: "subprocess.Popen[Any]") -> str:
    return Path(process.said).read_text()[-500:]  # type: ignore[attr-defined]
