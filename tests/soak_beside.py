"""Trials of whole runs: something else is done in the checkout of a `taskvec run`."""

import platform
import random
import subprocess
import sys
import time
from typing import Any

from tests.project import Project
from tests.soak_runs import LEFT_SECONDS, RUN, Moment, Runs, started

REFUSED_SECONDS = 5.0  # until a second run is refused
TOGETHER = ("refused", "waits", "gc", "verify", "status")


def together(runs: Runs, draw: random.Random, how: str = "") -> str:
    """Do something else in a checkout while it runs."""
    how = how or draw.choice(TOGETHER)
    with runs.project() as project, started(project) as first:
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
