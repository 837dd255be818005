"""The resident driver does what a run of its own would do, and lets go when it cannot."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.handover import reachable, received, send, socket_path
from tests.project import Project, result

pytestmark = pytest.mark.pipeline

ALONE = "works without the resident driver"


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def started(project: Project) -> "subprocess.Popen[bytes]":
    """Start a driver, and wait until it takes requests."""
    driver = subprocess.Popen(
        [sys.executable, "-m", "flows.driver"], cwd=project.root, env=project.environment()
    )
    wait_until(lambda: socket_path(project.root).exists() or driver.poll() is not None)
    return driver


def set_points(project: Project, points: int) -> None:
    path = project.root / "params.yaml"
    head, mark, rest = path.read_text().partition("points: ")
    path.write_text(f"{head}{mark}{points}{rest.lstrip('0123456789')}")


@pytest.fixture(scope="module")
def driven(
    finished: Project, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Project, "subprocess.Popen[bytes]"]]:
    """Yield a project with a resident driver."""
    project = finished.copy(tmp_path_factory.mktemp("driven") / "checkout")
    driver = started(project)
    try:
        yield project, driver
    finally:
        driver.terminate()
        assert driver.wait(30) == 0
        assert not socket_path(project.root).exists()


def test_a_run_is_handed_over_and_leaves_what_a_run_of_its_own_leaves(
    driven: tuple[Project, "subprocess.Popen[bytes]"], finished: Project, tmp_path: Path
) -> None:
    project, driver = driven
    alone = finished.copy(tmp_path / "alone")
    set_points(project, 2)
    assert project.taskvec("run").code == 0  # what follows is done by processes that have worked
    texts = []
    for checkout in (project, alone):
        set_points(checkout, 4)
        done = checkout.taskvec("run")
        assert done.code == 0, done.err
        assert done.stages("run") == {"search-both-0", "evaluate-both-0", "report"}
        assert ALONE not in done.err
        assert f"report: {checkout.root}" in done.err
        texts.append([(checkout.root / n).read_bytes() for n in ("dvc.lock", "edits/dvc.lock")])
    assert texts[0] == texts[1]
    logs = [json.loads(line) for line in _last_log(project)]
    assert logs[0]["tags"]["pid"] == str(driver.pid)  # it was the driver who ran
    assert "nothing to do" in project.taskvec("run").err


def test_stages_share_a_process_and_the_next_params_are_read_anew(
    driven: tuple[Project, "subprocess.Popen[bytes]"],
) -> None:
    project, driver = driven
    seen = []
    for points in (5, 6):
        set_points(project, points)
        assert "search-both-0" in project.taskvec("run", "search-both-0").stages("run")
        table = (project.root / "data/edits/both-0/search.csv").read_text()
        assert len(table.splitlines()) == points + 1
        seen.append(_stages(driver.pid))
    assert seen[0] & seen[1]


def test_errors_arrive_with_their_exit_code(
    driven: tuple[Project, "subprocess.Popen[bytes]"],
) -> None:
    project, _ = driven
    text = (project.root / "params.yaml").read_text()
    project.replace("params.yaml", "low: 0, high: 1", "low: 2, high: 1")
    try:
        done = project.taskvec("run")
    finally:
        (project.root / "params.yaml").write_text(text)
    assert done.code == 3 and "params.yaml" in done.err and ALONE not in done.err
    assert project.taskvec("run", "nothing").code == 3


def test_a_client_stops_its_run_and_whoever_comes_meanwhile_is_told(
    driven: tuple[Project, "subprocess.Popen[bytes]"],
) -> None:
    project, driver = driven
    text = (project.root / "params.yaml").read_text()
    project.replace("params.yaml", "{steps: 6,", "{steps: 400,")
    try:
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
            _wait_until_ready(project)
            before = _stages(driver.pid)
            client = project.start("run", "fine_tune@digits-0")
            wait_until(lambda before=before: _stages(driver.pid) - before)
            if number == signal.SIGINT:
                second = project.taskvec("run")
                assert second.code == 6 and str(driver.pid) in second.err
            os.killpg(client.pid, number)
            out, errors = client.communicate(timeout=30)
            done = result(client.returncode, out, errors)
            assert done.code == code, done.err
            wait_until(lambda: not (project.root / ".taskvec/run.json").exists(), 15)
            assert driver.poll() is None
            time.sleep(1)  # it may start anew now, without whatever Prefect left behind
    finally:
        (project.root / "params.yaml").write_text(text)
    _wait_until_ready(project)
    assert project.taskvec("run", "fine_tune@digits-0").code == 0


def test_who_has_another_environment_or_directory_works_alone(
    driven: tuple[Project, "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    project, _ = driven
    set_points(project, 7)
    other = Project(project.root, {**project.server, "MLFLOW_HTTP_REQUEST_TIMEOUT": "9"})
    done = other.taskvec("run", "search-both-0")
    assert "other values of MLFLOW_HTTP_REQUEST_TIMEOUT; this run" in done.err and ALONE in done.err
    assert done.stages("run") == {"search-both-0"}
    path = socket_path(project.root)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    answers = _ask(path, {"root": str(tmp_path), "environment": _digests(project)})
    assert [answer["event"] for answer in answers] == ["refused"]
    assert str(tmp_path) in answers[0]["why"]
    for nonsense in (b"no json\n", b"[]\n", b"{}\n", b"\xff\n", b""):
        with socket.socket(socket.AF_UNIX) as connection, reachable(path) as address:
            connection.connect(address)
            connection.sendall(nonsense)
    assert "nothing to do" in project.taskvec("run", "search-both-0").err


def test_changed_code_is_never_run_from_memory(project: Project) -> None:
    driver = started(project)
    try:
        before = psutil.Process(driver.pid).create_time()
        path = socket_path(project.root)
        made = path.stat().st_mtime_ns
        project.replace(
            "tasks/search.py",
            '"strategy": search',
            '"way": search.strategy,\n        "strategy": search',
        )
        done = project.taskvec("run", "search-both-0")
        assert done.code == 0, done.err
        assert "code or packages changed" in done.err and ALONE in done.err
        assert '"way"' in (project.root / "data/edits/both-0/coefficients.json").read_text()
        # it has started anew, in the same process
        wait_until(lambda: path.exists() and path.stat().st_mtime_ns != made)
        assert psutil.Process(driver.pid).create_time() == before
        set_points(project, 4)
        done = project.taskvec("run", "search-both-0")
        assert done.code == 0 and ALONE not in done.err
        assert '"way"' in (project.root / "data/edits/both-0/coefficients.json").read_text()

        # killed in the middle, it takes its stages along, and the next run goes on
        project.replace("params.yaml", "{steps: 6,", "{steps: 400,")
        before = _stages(driver.pid)
        client = project.start("run", "fine_tune@digits-0")
        wait_until(lambda: _stages(driver.pid) - before)
        below = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        _, errors = client.communicate(timeout=30)
        assert client.returncode == 7 and "goes on where it stopped" in errors
        _, alive = psutil.wait_procs(below, timeout=20)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    finally:
        driver.kill()
        driver.wait()
    project.replace("params.yaml", "{steps: 400,", "{steps: 7,")
    done = project.taskvec("run", "fine_tune@digits-0")  # what is left of the socket does no harm
    assert done.code == 0 and done.stages("run") == {"fine_tune@digits-0"}


def _stages(driver: int) -> set[int]:
    """Return the processes of stages, also of those that wait for another one."""
    found = set()
    for child in psutil.Process(driver).children():
        with suppress(psutil.NoSuchProcess):
            found |= {process.pid for process in child.children()}
    return found


def _last_log(project: Project) -> list[str]:
    logs = sorted(
        (project.root / ".taskvec/outbox").glob("*.jsonl"), key=lambda p: p.stat().st_mtime
    )
    return logs[-1].read_text().splitlines()


def _wait_until_ready(project: Project) -> None:
    def answers() -> bool:
        with suppress(OSError):
            return bool(_ask(path, {"root": "/", "environment": _digests(project)}))
        return False

    path = socket_path(project.root)
    wait_until(answers)


def _digests(project: Project) -> dict[str, str]:
    from flows.handover import environment_digests

    return environment_digests(project.environment())


def _ask(path: Path, request: dict[str, Any]) -> list[dict[str, Any]]:
    with socket.socket(socket.AF_UNIX) as connection, reachable(path) as address:
        connection.connect(address)
        send(connection, request)
        return list(received(connection))
