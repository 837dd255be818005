"""Runs that are killed, orphaned or asked to stop: the next one ends as if nothing had happened.

A few of what tests/soak.py does by the hundred; here one run after another of the same experiment.
"""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flows import locking, outbox
from tests.soak_runs import Moment, Runs, killed, orphaned, started
from tests.soak_signals import signalled

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, prefect_server: dict[str, str]) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), prefect_server)


@pytest.mark.parametrize(("trial", "wanted"), [(killed, 20), (orphaned, 5)])
def test_kills_lose_nothing_repeat_nothing_and_leave_no_stage_behind(
    runs: Runs, trial: Callable[[Runs, random.Random, int], tuple[int, str]], wanted: int
) -> None:
    draw, kills = random.Random(0), 0
    while kills < wanted:
        number, wrong = trial(runs, draw, wanted - kills)
        assert wrong == ""
        kills += number


def test_a_run_that_is_asked_to_stop_does_so_and_the_next_goes_on(runs: Runs) -> None:
    asked = [
        ("terminate", Moment(lines=2)),
        ("interrupt", Moment(lines=3)),
        ("hang up", Moment(lines=4)),
        ("twice", Moment(lines=4)),
        ("interrupt", Moment(seconds=runs.seconds / 5)),
        ("terminate", Moment(seconds=runs.seconds / 3)),
        ("hang up", Moment(seconds=runs.seconds / 10)),
        ("head", Moment(lines=2)),
    ]
    assert signalled(runs, random.Random(0), asked, seconds=15) == ""  # others use the cores, too


STATES = """
import anyio, json, sys
from prefect.client.orchestration import get_client
async def main():
    async with get_client() as client:
        print(json.dumps([(await client.read_flow_run(i)).state_name for i in sys.argv[1:]]))
anyio.run(main)
"""


def test_prefect_shows_a_killed_run_as_crashed_after_the_next_one(runs: Runs) -> None:
    with runs.project() as project:
        with started(project) as process:
            Moment(lines=3).wait(project, process)
            os.killpg(process.pid, signal.SIGKILL)
        assert runs.completed(project) == ""
        begun = [json.loads(log.read_text().splitlines()[0]) for log in outbox.logs(project.root)]
        flow_runs = [event["tags"]["prefect.flow_run"] for event in begun]
        done = project.command(sys.executable, "-W", "ignore", "-c", STATES, *flow_runs)
    assert json.loads(done.out.splitlines()[-1]) == ["Crashed", "Completed"], done.err


def test_the_fork_server_imports_the_model_family_of_its_experiment_and_no_other(
    runs: Runs,
) -> None:
    code = (
        "import flows.warm, sys\n"
        "print([m for m in ('taskvec.models.perceptron', 'open_clip') if m in sys.modules])"
    )
    with runs.project() as project:
        done = project.command(sys.executable, "-W", "ignore", "-c", code)
    assert done.out == "['taskvec.models.perceptron']\n", done.err


STAGE = """
import sys, time
from pathlib import Path
from flows.locking import mark_stages
mark_stages(Path.cwd())
sys.stdout.write("marked\\n")
sys.stdout.flush()
time.sleep(600)
"""
DRIVER = f"""
import subprocess, sys, time
stage = subprocess.Popen([sys.executable, "-c", {STAGE!r}], stdout=subprocess.PIPE)
stage.stdout.readline()
sys.stdout.write(f"{{stage.pid}}\\n")
sys.stdout.flush()
time.sleep(600)
"""


def test_only_the_stages_of_a_driver_that_is_gone_are_ended(tmp_path: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    stage = psutil.Process(int(driver.stdout.readline()))
    stage.suspend()
    locking.sweep(tmp_path)
    assert stage.is_running() and stage.status() != psutil.STATUS_ZOMBIE
    driver.kill()
    driver.communicate()
    locking.sweep(tmp_path)
    assert not stage.is_running() or stage.status() == psutil.STATUS_ZOMBIE
    assert not list((tmp_path / locking.STAGES).iterdir())
