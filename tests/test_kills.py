"""Runs that are killed, orphaned or asked to stop: the next one ends as if nothing had happened.

A few of what tests/soak.py does by the hundred; here one run after another of the same experiment.
"""

import random
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flows import locking
from tests.soak_runs import Moment, Runs, killed, orphaned, signalled

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, prefect_server: dict[str, str]) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), prefect_server)


@pytest.mark.parametrize("first", [1, 2])
def test_ten_kills_in_a_row_lose_nothing_and_repeat_nothing(runs: Runs, first: int) -> None:
    draw = random.Random(first)
    boundaries = [Moment(lines=first + number) for number in (0, 1, 2, 3, 5)]
    moments = [*boundaries, *(Moment(seconds=draw.uniform(0, runs.seconds)) for _ in range(5))]
    draw.shuffle(moments)
    assert killed(runs, draw, moments) == ""


def test_stages_of_a_killed_driver_are_ended_even_frozen_ones(runs: Runs) -> None:
    moments = [Moment(lines=number) for number in (2, 3, 4, 5, 7)]
    assert orphaned(runs, random.Random(0), moments) == ""


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
