"""Stages on a Ray cluster of two hosts that share nothing with the driver but a DVC remote.

One cluster and one run of some stages; the outcome must be that of a run on one machine.
"""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows.outbox import executions
from tests.project import Project, result
from tests.ray_cluster import Node, RayCluster, running

pytestmark = [pytest.mark.pipeline, pytest.mark.nightly]

# These run on the cluster; all others are up to date, with their files in the remote.
AGAIN = {
    "fine_tune@digits-0", "extract@digits-0", "combine-forget-0", "search-forget-0",
    "evaluate-forget-0", "report",
}  # fmt: skip
LOCKS = ("dvc.lock", "edits/dvc.lock")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    pytest.importorskip("ray", reason="ray of the extra dev is not installed")
    with running(tmp_path_factory.mktemp("ray"), hosts=2, environment={}, slots=2) as found:
        yield found


@pytest.fixture(scope="module")
def driver(
    finished: Project, cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory
) -> Project:
    """Return a copy of the finished project that has to do some stages again, on the cluster."""
    directory = tmp_path_factory.mktemp("driver")
    project = finished.copy(directory / "checkout")
    project.server = {**finished.server, **cluster.environment}
    (directory / "store").mkdir()
    for words in (
        ["add", "-d", "store", str(directory / "store")], ["modify", "store", "verify", "true"],
    ):  # fmt: skip
        assert project.command("dvc", "remote", *words).code == 0
    assert project.command("dvc", "push", "-q").code == 0
    forget(project)
    return project


def forget(project: Project) -> None:
    """Let the stages of AGAIN never have run, and all large files lie in the remote alone."""
    kept: set[str] = set()
    for name in LOCKS:
        path = project.root / name
        content = YAML(typ="safe").load(path.read_text())
        for stage in AGAIN & content["stages"].keys():
            for out in content["stages"].pop(stage)["outs"]:
                (project.root / out["path"]).unlink()
        kept |= {out["md5"] for entry in content["stages"].values() for out in entry["outs"]}
        with path.open("w") as file:
            YAML().dump(content, file)
    shutil.rmtree(project.root / ".dvc/cache/runs")
    store = Path(project.command("dvc", "remote", "list").out.split()[1])
    for place in (store / "files/md5", project.root / ".dvc/cache/files/md5"):
        for path in place.glob("*/*"):
            if path.parent.name + path.name not in kept:
                path.unlink()  # nobody has it: it must be made
    for path in (project.root / "data").rglob("*.safetensors"):
        path.unlink()
    shutil.rmtree(project.root / ".dvc/cache/files")


def busy(cluster: RayCluster) -> Node | None:
    """Return the host that was given the first stage and prepares for it, if one was."""
    for node in cluster.nodes[1:]:
        if any(node.home.glob("checkouts/*/*/.taskvec/logs/agent.log")):
            return node
    return None


@pytest.fixture(scope="module")
def ran(driver: Project, cluster: RayCluster) -> tuple[str, Node | None]:
    """Run everything, and cut the power of the host that fine-tunes; return what was said."""
    reasons = {name: words for name, words in driver.stale().items() if "will run" not in words[0]}
    assert set(reasons) <= AGAIN, reasons  # a file that lies in the remote is no reason
    process = driver.start("run")
    lost = None
    while process.poll() is None and lost is None:
        lost = busy(cluster)
        time.sleep(0.005)
    if lost:
        lost.kill()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert result(0, out, err).stages("run") == AGAIN, err
    return err, lost


def test_locks_and_outputs_are_those_of_one_machine_although_a_host_was_lost(
    ran: tuple[str, Node | None], driver: Project, finished: Project
) -> None:
    said, lost = ran
    assert lost is not None and "fine_tune@digits-0 lost its host" in said
    for name in LOCKS:
        assert (driver.root / name).read_bytes() == (finished.root / name).read_bytes()
    # what people look at is here, large files are not
    for name in ("data/reports/index.html", "data/evaluations/forget-0.csv"):
        assert (driver.root / name).read_bytes() == (finished.root / name).read_bytes()
    assert not (driver.root / "data/vectors/digits-0.safetensors").exists()
    # what the hosts say of weights is in the record
    made = [item for item in executions(driver.root) if item["name"] == "extract@digits-0"]
    assert made[-1]["status"] == "FINISHED"


def test_nothing_is_stale_then_here_nor_in_a_pulled_checkout(
    ran: tuple[str, Node | None], driver: Project
) -> None:
    assert not driver.stale()
    assert driver.command("dvc", "pull", "-q").code == 0
    server, driver.server = driver.server, {}
    try:
        assert not driver.stale()  # without a cluster
    finally:
        driver.server = server


BROKEN = """


def combine(*_, edit, **__):
    if edit == "forget":
        raise KeyError("broken on purpose")
    import time

    time.sleep(500)
"""


def test_a_stages_own_error_is_not_tried_again_and_ctrl_c_ends_everything(
    ran: tuple[str, Node | None], driver: Project, cluster: RayCluster
) -> None:
    path = driver.root / "tasks/combine.py"
    text = path.read_text()
    before = time.time()
    try:
        path.write_text(text + BROKEN)  # new code, not committed
        process = driver.start("run", "combine-forget-0", "combine-both-0")
        deadline = before + 240
        while not (sleeping(cluster, before) and failures(driver)):
            assert process.poll() is None and time.time() < deadline, process.communicate()
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert result(130, "", err).stages("failed") >= {"combine-forget-0"}
        assert failures(driver) == 1  # not tried again
        deadline = time.time() + 15
        while left := agents(cluster):
            assert time.time() < deadline, left
            time.sleep(0.1)
    finally:
        path.write_text(text)


def sleeping(cluster: RayCluster, since: float) -> bool:
    """Return whether a host does the stage that sleeps."""
    log = "checkouts/*/*/.taskvec/logs/combine-both-0.log"
    return any(p.stat().st_mtime > since for n in cluster.nodes for p in n.home.glob(log))


def failures(driver: Project) -> int:
    """Return how often the broken stage has failed, as recorded."""
    made = [e for e in executions(driver.root) if e["name"] == "combine-forget-0"]
    return sum(e["status"] == "FAILED" for e in made)


def agents(cluster: RayCluster) -> list[str]:
    """Return the processes of agents and stages on all hosts."""
    import psutil

    found = []
    for process in psutil.process_iter(["cwd", "cmdline"]):
        place = process.info["cwd"] or ""
        if any(place.startswith(str(node.home / "checkouts")) for node in cluster.nodes):
            found.append(f"{place}: {process.info['cmdline']}")
    return found


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"TASKVEC_RAY_ADDRESS": "127.0.0.1:9"}, 7, "no Ray cluster answers"),
        ({"TASKVEC_RAY_ADDRESS": "ray://127.0.0.1:10001"}, 3, "expected HOST:PORT of its head"),
        ({"TASKVEC_RUNNER": "slurm"}, 3, "no such runner"),
    ],
)
def test_a_cluster_that_cannot_be_used_is_refused_before_any_work(
    driver: Project, changes: dict[str, str], code: int, words: str
) -> None:
    project = Project(driver.root, {**driver.server, **changes})
    path = project.root / "params.yaml"
    text = path.read_text()
    try:
        path.write_text(text.replace("points: 3", "points: 6", 1))
        before = [(driver.root / name).read_bytes() for name in LOCKS]
        done = project.taskvec("run", "search-both-0")
        assert done.code == code and words in done.err
        assert [(driver.root / name).read_bytes() for name in LOCKS] == before
    finally:
        path.write_text(text)
