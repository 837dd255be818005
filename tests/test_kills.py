"""Runs that are killed, orphaned or asked to stop: the next one ends as if nothing had happened.

A few of what tests/soak.py does by the hundred; here one run after another of the same experiment.
"""

import random
import sys

import pytest

from tests.soak_runs import Moment, Runs, killed, orphaned, signalled

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, prefect_server: dict[str, str]) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), prefect_server)


@pytest.mark.parametrize("first", range(4))
def test_five_kills_in_a_row_lose_nothing_and_repeat_nothing(runs: Runs, first: int) -> None:
    draw = random.Random(first)
    boundaries = [Moment(lines=first + number) for number in (1, 3, 5)]
    moments = [*boundaries, *(Moment(seconds=draw.uniform(0, runs.seconds)) for _ in range(2))]
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
