"""The pipeline against plain `dvc repro`: 50 trivial stages of the real code in twin checkouts.

Every time is the wall time of a whole process as a user starts it, in a checkout with warm
bytecode. `taskvec run` is measured three times: with a Prefect server of its own, which it starts
and stops, with one that is running already, and with a resident driver beside it.
"""

import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measuring import (
    Times,
    conditions,
    interleave,
    ratio,
    ratio_cell,
    table,
    timed,
    verdict,
)
from flows import outbox
from flows.handover import socket_path
from flows.servers import started_prefect
from taskvec import params as parameters
from tests.project import ROOT, Project

TASKS = ("digits", "faces", "digits_inverted")
EDITS = 11
STAGES = 5 * len(TASKS) + 2 + 3 * EDITS  # 5 a task, pretrain, report, 3 an edit
OWN, RUNNING, REPRO = "taskvec run, own server", "taskvec run, running server", "dvc repro"
RESIDENT = "taskvec run, resident driver"
OURS = (OWN, RUNNING, RESIDENT)
EDIT_SECONDS = 2.0  # for one edit's changed range in a running driver, beside its evaluations
LOCKS = ("dvc.lock", "edits/dvc.lock")
EXPERIMENT = """
seeds: [0]
model: {family: trivial, image_size: 32, shots: 0}
fine_tune:
  {steps: 1, batch_size: 4, learning_rate: 1e-4, weight_decay: 0.0, warmup: 0.0, clip_norm: 1.0}
tasks:
"""
TASK = """
  NAME:
    data: {dataset: DATASET, options: OPTIONS, source: SOURCE, train: 40, validation: 20, test: 20}
    head: {kind: text, classes: CLASSES, templates: ["a photo of a {}."]}
    fine_tune: {}
"""
EDIT = """
  edit_NUMBER:
    expression: c * faces
    coefficients: {c: {low: 0.NUMBER, high: 0.NUMBER, points: 1}}
    objective: {maximize: accuracy, tasks: [faces]}
    evaluate: [faces]
"""


@dataclass(frozen=True)
class Rounds:
    """How often each part is measured."""

    stale: int
    no_op: int
    edit: int


FULL, QUICK = Rounds(stale=1, no_op=9, edit=3), Rounds(stale=1, no_op=2, edit=1)


class Checkout:
    """A checkout, and one way of bringing it up to date."""

    def __init__(self, root: Path, way: str, server: Mapping[str, str]) -> None:
        self.root = root
        served = way in (RUNNING, RESIDENT)
        self._environment = _environment(Project(root, dict(server) if served else {}))
        self._driver: subprocess.Popen[bytes] | None = None
        self._command = (
            ["dvc", "repro"] if way == REPRO else [sys.executable, "-m", "flows.cli", "run"]
        )

    def start(self) -> None:
        """Start the resident driver, if this way has one, and wait until it takes requests."""
        self._driver = subprocess.Popen(
            [sys.executable, "-m", "flows.driver"],
            cwd=self.root,
            env=self._environment,
            stderr=subprocess.DEVNULL,
        )
        while not socket_path(self.root).exists():
            assert self._driver.poll() is None, "the resident driver has ended"
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop the resident driver, if there is one."""
        if self._driver:
            self._driver.terminate()
            self._driver.wait()

    def run(self) -> str:
        """Bring the checkout up to date; return what the command said."""
        done = subprocess.run(
            self._command, cwd=self.root, env=self._environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{self._command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def evaluating(self) -> float:
        """Return how long the stages of the last run that evaluate models worked, in seconds."""
        log = max(outbox.logs(self.root), key=lambda path: path.stat().st_mtime_ns)
        events = [event for event, _ in outbox.read(log)]
        return sum(
            event["metrics"]["system/seconds"]
            for event in events
            if event["event"] == "end"
            and str(events[event["of"]]["name"]).startswith(("search", "evaluate"))
        )

    def set_range(self, value: float) -> None:
        """Let the first edit try one other coefficient."""
        path = self.root / "params.yaml"
        lines = path.read_text().splitlines(keepends=True)
        place = next(i for i, line in enumerate(lines) if line.strip() == "edit_10:") + 2
        lines[place] = f"    coefficients: {{c: {{low: {value}, high: {value}, points: 1}}}}\n"
        path.write_text("".join(lines))


def measure(*, quick: bool) -> str:
    """Return the section of docs/benchmarks.md."""
    load = os.getloadavg()[0]
    rounds = QUICK if quick else FULL
    # not in memory: a checkout with its data has some hundred megabytes
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        template = _template(directory / "template")
        with started_prefect(directory / "server", ui=False) as server:
            checkouts, stale = _all_stale(directory, template, server.environment, rounds.stale)
            try:
                no_op = interleave({way: _quiet(c) for way, c in checkouts.items()}, rounds.no_op)
                edit, evaluating = _one_edit(checkouts, rounds.edit)
            finally:
                checkouts[RESIDENT].stop()
    return _section(load, stale, no_op, edit, evaluating)


def _all_stale(
    directory: Path, template: Path, server: Mapping[str, str], rounds: int
) -> tuple[dict[str, Checkout], dict[str, Times]]:
    """Run everything in fresh copies; return the last ones and the times.

    A fresh copy has neither outputs, nor lock files, nor a run cache.
    """
    checkouts: dict[str, Checkout] = {}
    seconds: dict[str, list[float]] = {way: [] for way in (*OURS, REPRO)}
    for _ in range(rounds):
        for number, way in enumerate(seconds):
            root = directory / f"checkout-{number}"
            shutil.rmtree(root, ignore_errors=True)
            subprocess.run(["cp", "-a", str(template), str(root)], check=True)
            if way in checkouts:
                checkouts[way].stop()
            checkouts[way] = Checkout(root, way, server)
            if way == RESIDENT:
                checkouts[way].start()
            seconds[way].append(timed(checkouts[way].run))
        for lock in LOCKS:
            for way in OURS:
                same = filecmp.cmp(checkouts[way].root / lock, checkouts[REPRO].root / lock, False)
                assert same, f"{lock} differs between {way} and {REPRO}"
    return checkouts, {way: Times(tuple(values)) for way, values in seconds.items()}


def _quiet(checkout: Checkout) -> Callable[[], None]:
    """Return a run that must find nothing to do."""

    def run() -> None:
        said = checkout.run()
        assert "nothing to do" in said or "up to date" in said, said

    return run


def _one_edit(
    checkouts: Mapping[str, Checkout], rounds: int
) -> tuple[dict[str, Times], tuple[float, ...]]:
    """Change one edit's coefficient to a value it never had, and time what reruns.

    Returns:
        Seconds by way; and how many of those of the resident driver were evaluations.
    """
    evaluating: list[float] = []
    seconds: dict[str, list[float]] = {way: [] for way in checkouts}
    for number in range(rounds):
        for way, checkout in checkouts.items():
            checkout.set_range(0.5 + (number + 1) / 100)
            seconds[way].append(timed(checkout.run))
            if way == RESIDENT:
                evaluating.append(checkout.evaluating())
    return {way: Times(tuple(values)) for way, values in seconds.items()}, tuple(evaluating)


def _template(root: Path) -> Path:
    """Return a checkout with the trivial experiment, rendered, in which nothing has run."""
    root.mkdir()
    project = Project.create(root, {})
    committed = parameters.plain(parameters.read(ROOT / "params.yaml"))["tasks"]
    text = EXPERIMENT
    for task in TASKS:
        data = committed[task]["data"]
        text += _fill(
            TASK,
            NAME=task,
            DATASET=data["dataset"],
            OPTIONS=data.get("options", {}),
            SOURCE=data["source"],
            CLASSES=committed[task]["head"]["classes"],
        )
    text += "edits:\n" + "".join(_fill(EDIT, NUMBER=number) for number in range(10, 10 + EDITS))
    (root / "params.yaml").write_text(text)
    shutil.copy2(ROOT / "benchmarks/trivial.py", root / "taskvec/models/trivial.py")
    commands = [
        [sys.executable, "-m", "flows.plan"],
        [sys.executable, "-m", "compileall", "-q", "flows", "tasks", "taskvec"],
        ["git", "add", "-A"],
        ["git", "-c", "user.name=b", "-c", "user.email=b@localhost", "commit", "-qm", "trivial"],
    ]
    environment = _environment(project)
    for command in commands:
        subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)
    listed = project.command("dvc", "stage", "list", "--all", "--name-only").out.split()
    found = [name for name in listed if "results" not in name]
    assert len(found) == STAGES, f"{len(found)} stages, expected {STAGES}: {found}"
    return root


def _environment(project: Project) -> dict[str, str]:
    """Return the environment of commands, which may use and write bytecode as a user's would."""
    environment = project.environment()
    environment.pop("PYTHONDONTWRITEBYTECODE")
    return environment


def _fill(text: str, **values: object) -> str:
    for key, value in values.items():
        text = text.replace(key, value if isinstance(value, str) else json.dumps(value))
    return text


def _section(
    load: float,
    stale: Mapping[str, Times],
    no_op: Mapping[str, Times],
    edit: Mapping[str, Times],
    evaluating: tuple[float, ...],
) -> str:
    parts = [
        (f"all {STAGES} stages stale", stale, 0.2, 1),
        ("nothing stale", no_op, 1.3, 2),
        ("one edit's coefficients changed (3 stages)", edit, None, 1),
    ]
    rows = []
    for what, times, target, digits in parts:
        base = times[REPRO]
        rows.append([what, REPRO, base.cell(digits=digits), "1", ""])
        for way in OURS:
            found = ratio(times[way], base)[0]
            told = verdict(found, target) if target else ""
            if way == RESIDENT and times is edit:
                rest = Times(
                    tuple(a - b for a, b in zip(times[way].seconds, evaluating, strict=True))
                )
                met = "met" if rest.median <= EDIT_SECONDS else "**missed**"
                told = f"{rest.cell(digits=1)} without evaluations, at most {EDIT_SECONDS:g}: {met}"
            rows.append(
                [
                    "",
                    way,
                    times[way].cell(digits=digits),
                    ratio_cell(times[way], base),
                    told,
                ]
            )
    rounds = [len(times[REPRO].seconds) for _, times, _, _ in parts]
    return "\n\n".join(
        [
            "## The pipeline against `dvc repro`",
            conditions(load),
            table(["what", "command", "seconds", "times `dvc repro`", "target"], rows),
            f"Median (lowest to highest) of {rounds[0]}, {rounds[1]} and {rounds[2]} rounds; in a "
            "round every command runs once, as a whole process, in its own checkout of the same "
            f"experiment: {len(TASKS)} tasks and {EDITS} edits of one vector and one point, so "
            f"5 x {len(TASKS)} + 2 + 3 x {EDITS} = {STAGES} stages. They are the real stages, on "
            "the bundled tower with drawn weights, 32 pixels, 20 pictures a split and one step of "
            "fine-tuning. *All stale* starts from a fresh checkout: no outputs, lock files, run "
            "cache or databases. *Own server*: the command starts and stops a Prefect server; "
            "*running server*: PREFECT_API_URL names one; *resident driver*: `taskvec services up` "
            "keeps a process that has everything imported, and was started before. In every round "
            "the lock files of all four are compared and must be byte-identical. *Without "
            "evaluations*: less the time for which the stages `search` and `evaluate` worked in "
            "their processes (`system/seconds` of their MLflow runs), whatever the driver did "
            "meanwhile.",
            "`dvc repro` starts a Python process a stage, which imports torch and open_clip; "
            "`taskvec run` imports them once and forks. That is all of the gain: work itself takes "
            "as long in both, so an experiment of long stages gains only what its graph lets "
            "run side by side. With few stale stages the start of the Prefect server is much of "
            "the time, and so are imports; `taskvec services up` keeps both running.",
        ]
    )
