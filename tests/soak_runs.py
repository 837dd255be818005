"""Trials of whole runs: `taskvec run` is killed, stopped, doubled, or loses its server.

A trial copies the smallest experiment, disturbs a real run of it, runs again without any manual
step, and compares all that is there with a run that nobody disturbed.
"""

import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import md5
from pathlib import Path
from typing import IO, Any

import psutil

from flows import outbox, servers
from tests import tiny_experiment
from tests.project import Project

LOCKS = ("dvc.lock", "edits/dvc.lock")
CACHE = Path(".dvc/cache/files/md5")
LINES = 20  # of a log of the whole experiment: its start, two a stage, its end
STOPPED_SECONDS = 5.0  # from a signal to the end of the run
REFUSED_SECONDS = 5.0  # until a second run is refused
LEFT_SECONDS = 10.0  # that a fork server may take to see that its driver is gone
HUNG_SECONDS = 25.0
GONE_SECONDS = 30.0  # from the loss of a server to the end of a run that gives up
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
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
        rendered = self._template.command(sys.executable, "-m", "flows.plan")
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
    def drawn(cls, draw: random.Random, runs: Runs) -> "Moment":
        """Return a boundary or a time, evenly over a run."""
        if draw.random() < 0.5:
            return cls(lines=draw.randint(1, LINES))
        return cls(seconds=draw.uniform(0.0, runs.seconds))

    def wait(self, project: Project, process: "subprocess.Popen[Any]") -> None:
        """Wait for the moment, or for the end of the process."""
        until = time.monotonic() + self.seconds
        known = set(outbox.logs(project.root))
        while process.poll() is None and time.monotonic() < until:
            fresh = [log for log in outbox.logs(project.root) if log not in known]
            if fresh and fresh[0].read_bytes().count(b"\n") >= self.lines:
                return
            time.sleep(0.001)


def killed(runs: Runs, draw: random.Random, moments: list[Moment] | None = None) -> str:
    """Kill all processes of a run, at several moments one run after another; then run again."""
    mlflow = {"TASKVEC_MLFLOW": "now"} if moments is None and draw.random() < 0.1 else {}
    with runs.project(**mlflow) as project:
        for moment in moments or [Moment.drawn(draw, runs)]:
            with _started(project) as process:
                moment.wait(project, process)
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        return runs.completed(project)


def orphaned(runs: Runs, draw: random.Random, moments: list[Moment] | None = None) -> str:
    """Kill the driver alone, perhaps while a stage is frozen, and run again at once."""
    with runs.project() as project:
        for moment in moments or [Moment.drawn(draw, runs)]:
            with _started(project) as process:
                moment.wait(project, process)
                frozen = stages_below(process.pid) if draw.random() < 0.5 else []
                for stage in frozen:
                    with suppress(psutil.NoSuchProcess):
                        stage.suspend()
                process.kill()
                process.wait()
        return runs.completed(project)


def stages_below(driver: int) -> list[psutil.Process]:
    """Return the running stages of a driver: the children of its fork server."""
    found: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(driver).children():
            with suppress(psutil.NoSuchProcess):
                if "forkserver" in " ".join(child.cmdline()):
                    found += child.children()
    return found


SIGNALS = ("interrupt", "twice", "terminate", "hang up", "head")


def signalled(
    runs: Runs,
    draw: random.Random,
    asked: list[tuple[str, Moment]] | None = None,
    seconds: float = STOPPED_SECONDS,
) -> str:
    """Ask a run to stop, or stop reading what it says; then run again.

    Args:
        runs: the experiment.
        draw: what and when, if nothing is asked.
        asked: what is done to one run after another, and when.
        seconds: that a run may take to end.
    """
    with runs.project() as project:
        for how, moment in asked or [(draw.choice(SIGNALS), Moment.drawn(draw, runs))]:
            if wrong := _signalled(project, how, moment, seconds):
                return f"{how}: {wrong}"
        return runs.completed(project)


def _signalled(project: Project, how: str, moment: Moment, seconds: float) -> str:
    with project.start(*RUN) as process:
        return _asked(project, process, how, moment, seconds)


def _asked(
    project: Project, process: "subprocess.Popen[str]", how: str, moment: Moment, seconds: float
) -> str:
    assert process.stderr is not None and process.stdout is not None
    if how == "head":
        moment.wait(project, process)
        process.stderr.close()
        process.stdout.close()
        code = process.wait(300)
        return "" if code == 0 else f"exit code {code} although only the reader left"
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr or []), daemon=True)
    reader.start()
    moment.wait(project, process)
    number = {"terminate": signal.SIGTERM, "hang up": signal.SIGHUP}.get(how, signal.SIGINT)
    ended = process.poll() is not None
    began = time.monotonic()
    with suppress(ProcessLookupError):
        if how == "terminate":
            process.send_signal(number)
        else:
            os.killpg(process.pid, number)
        if how == "twice":
            time.sleep(0.2)
            os.killpg(process.pid, number)
    code = process.wait(300)
    took = time.monotonic() - began
    reader.join(10)
    text = "".join(said)
    # A shell shows both in the same way: 128 and the number.
    if code not in (0, EXIT_CODES[number], -number):
        return f"exit code {code}: {text[-300:]}"
    if "Traceback" in text and code != -number:  # before `main` runs, Python tells it so
        return f"a traceback: {text[-500:]}"
    return "" if ended or took <= seconds else f"took {took:.1f} s to stop ({code})"


TOGETHER = ("refused", "waits", "gc", "verify", "status")


def together(runs: Runs, draw: random.Random, how: str = "") -> str:
    """Do something else in a checkout while it runs."""
    how = how or draw.choice(TOGETHER)
    with runs.project() as project, _started(project) as first:
        wrong = {"refused": _refused, "waits": _waits}.get(how, _beside)(
            project, first, Moment.drawn(draw, runs), how
        )
        code = first.wait(300)
        if wrong or code != 0:
            return f"{how}: {wrong or f'the run ended with {code}'}"
        return f"{how}: {found}" if (found := runs.completed(project)) else ""


def _refused(project: Project, first: "subprocess.Popen[Any]", *_: object) -> str:
    wait_for_holder(project, first)
    began = time.monotonic()
    done = project.taskvec(*RUN)
    took = time.monotonic() - began
    if first.poll() is not None and done.code == 0:
        return ""  # the first was faster
    named = str(first.pid) in done.err and platform.node() in done.err
    if done.code != 6 or not named or took > REFUSED_SECONDS:
        return f"exit code {done.code} after {took:.1f} s: {done.err[-300:]}"
    return ""


def _waits(project: Project, first: "subprocess.Popen[Any]", *_: object) -> str:
    wait_for_holder(project, first)
    done = project.taskvec(*RUN, "--wait")
    if done.code != 0:
        return f"exit code {done.code}: {done.err[-300:]}"
    first.wait(LEFT_SECONDS)  # it had let go of the checkout
    return "" if not done.stages("run") else f"ran {done.stages('run')} again"


def _beside(project: Project, first: "subprocess.Popen[Any]", moment: Moment, how: str) -> str:
    moment.wait(project, first)
    commands = {
        "gc": ("dvc", "gc", "--workspace", "--force"),
        "verify": (sys.executable, "-m", "flows.cli", "verify"),
        "status": (sys.executable, "-m", "flows.cli", "status"),
    }
    done = project.command(*commands[how])
    # what is being made just now may not be whole yet, and is then told so
    fine = {"verify": {0, 4, 5}}.get(how, {0})
    wrong = done.code not in fine or "Traceback" in done.err
    return f"exit code {done.code}: {done.err[-300:]}" if wrong else ""


def wait_for_holder(project: Project, process: "subprocess.Popen[Any]") -> None:
    """Wait until a run holds its checkout."""
    while process.poll() is None and not (project.root / ".taskvec/run.json").is_file():
        time.sleep(0.005)


LOSSES = ("down", "hung", "killed", "restarted")


def unserved(runs: Runs, draw: random.Random, how: str = "", moment: Moment | None = None) -> str:
    """Take the Prefect server away from a run; then run again with another one."""
    how = how or draw.choice(LOSSES)
    moment = moment or Moment.drawn(draw, runs)
    home = runs.directory / f"server-{draw.randrange(10**9)}"
    away = nullcontext((None, _settings(home)))
    with (
        away if how == "down" else _server(home, _settings(home)) as (process, environment),
        runs.project(**environment) as project,
    ):
        with _started(project) as run:
            moment.wait(project, run)
            began, ended = time.monotonic(), run.poll() is not None
            if process and how == "hung":
                _hang(process)
            elif process:
                _kill(process)
            again = _server(home, environment) if how == "restarted" else nullcontext()
            with again:
                code = run.wait(300)
            took = time.monotonic() - began
        if code not in (0, 7) or (how == "down" and code != 7):
            return f"{how}: exit code {code}: {_tail(run)}"
        if code == 7 and not ended and took > GONE_SECONDS:
            return f"{how}: gave up after {took:.0f} s only"
        project.server = {**project.server, **runs.environment}
        return f"{how}: {found}" if (found := runs.completed(project)) else ""


def _settings(home: Path) -> dict[str, str]:
    """Return the environment of a Prefect server that nobody has started."""
    return servers.prefect_environment(home, servers.free_port(), servers.new_password())


@contextmanager
def _server(
    home: Path, environment: dict[str, str]
) -> Iterator[tuple["subprocess.Popen[bytes]", dict[str, str]]]:
    """Yield a Prefect server with its environment."""
    port = int(environment["PREFECT_SERVER_API_PORT"])
    log = home / "server.log"
    process = servers.spawn(servers.prefect_command(port, ui=False), log, environment)
    try:
        headers = servers.authorization(environment["PREFECT_API_AUTH_STRING"])
        url = f"{environment['PREFECT_API_URL']}/health"
        servers.wait_for(url, process, log, "the Prefect server", headers)
        yield process, environment
    finally:
        servers.stop(process)


def _hang(keeper: "subprocess.Popen[bytes]") -> None:
    """Freeze a server for a while."""
    frozen = psutil.Process(keeper.pid).children(recursive=True)
    for process in frozen:
        process.suspend()

    def resume() -> None:
        for process in frozen:
            with suppress(psutil.NoSuchProcess):
                process.resume()

    timer = threading.Timer(HUNG_SECONDS, resume)
    timer.daemon = True
    timer.start()


def _kill(keeper: "subprocess.Popen[bytes]") -> None:
    for process in psutil.Process(keeper.pid).children(recursive=True):
        process.kill()
    keeper.wait(30)


@contextmanager
def _started(project: Project) -> Iterator["subprocess.Popen[Any]"]:
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


def _tail(process: "subprocess.Popen[Any]") -> str:
    return Path(process.said).read_text()[-500:]  # type: ignore[attr-defined]
