"""Trials of whole runs: `taskvec run` is asked to stop, or nobody reads what it says."""

import os
import random
import signal
import subprocess
import threading
import time
from contextlib import suppress

from tests.project import Project
from tests.soak_runs import RUN, Moment, Runs

STOPPED_SECONDS = 5.0  # from a signal to the end of the run
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
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
