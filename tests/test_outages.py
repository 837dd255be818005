"""A run without its Prefect server, and beside other commands in its checkout."""

import random

import pytest

from tests.soak_beside import TOGETHER, together
from tests.soak_runs import Moment, Runs
from tests.soak_servers import unserved

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, prefect_server: dict[str, str]) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), prefect_server)


@pytest.mark.parametrize(
    ("how", "lines"), [("down", 1), ("killed", 6), ("hung", 16), ("restarted", 2)]
)
def test_without_its_server_a_run_ends_well_or_gives_up_soon(
    runs: Runs, how: str, lines: int
) -> None:
    assert unserved(runs, random.Random(0), how, Moment(lines=lines)) == ""


@pytest.mark.parametrize("how", TOGETHER)
def test_what_else_is_done_in_its_checkout_does_not_change_a_run(runs: Runs, how: str) -> None:
    assert together(runs, random.Random(how), how) == ""


def test_when_a_run_is_sent_to_mlflow_is_said_in_one_of_two_words(runs: Runs) -> None:
    with runs.project(TASKVEC_MLFLOW="soon") as project:
        done = project.taskvec("run")
    assert done.code == 3 and "set it to `now`, or to `later`" in done.err
