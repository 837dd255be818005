"""Services that outlive the command: real servers, a worker, schedules, events, notifications.

One checkout has everything running for the whole module.
"""

import json
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from flows import keeper, services
from tests.project import Project
from tests.session import seed

pytestmark = pytest.mark.pipeline

SECONDS = 300  # that anything may take on a busy machine
HOOK = "hook-8d1f0c"  # the secret part of the webhook's address
BEGUN = "submitted to infrastructure"  # in the log of a worker, once a run has its slot
STRANGERS = (
    "evil.example", "10.evil.example", "192.168.evil.example", "localhost:1.evil.example",
)  # fmt: skip
SCHEDULES = """    schedules:
      - slug: often
        interval: 20
        active: false
"""


class Receiver(ThreadingHTTPServer):
    """Takes what Prefect tells the webhook."""

    def __init__(self) -> None:
        self.told: queue.Queue[dict[str, str]] = queue.Queue()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{HOOK}"

    def wait(self, state: str) -> dict[str, str]:
        """Return the next message; it is about a run in this state."""
        message = self.told.get(timeout=SECONDS)
        assert message["state"] == state, message
        return message


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert isinstance(self.server, Receiver)
        self.server.told.put(content)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class Running:
    """A checkout with everything running and deployed."""

    project: Project
    receiver: Receiver
    known: dict[str, Any] = field(default_factory=dict)

    def status(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in services.status(self.project.root)}

    def log(self, name: str) -> str:
        path = services.log_of(self.project.root, name)
        return path.read_text() if path.is_file() else ""


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not in {SECONDS} s"
        time.sleep(0.1)
    return found


def kept(mark: str) -> list[psutil.Process]:
    """Return the living processes that carry a mark."""
    return list(keeper._kept(mark, None))


def words(process: psutil.Process) -> list[str]:
    """Return the command of a process; none if it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def mark_of(project: Project) -> str:
    return str(
        json.loads((project.root / ".taskvec/services.json").read_text())["supervisor"]["mark"]
    )


def commit(project: Project, subject: str) -> None:
    name = ("-c", "user.name=t", "-c", "user.email=t@localhost")
    assert project.command("git", *name, "commit", "-qam", subject).code == 0


def left_behind(project: Project) -> list[str]:
    names = ("services.json", "driver.sock", "watcher.beat")
    return [name for name in names if (project.root / ".taskvec" / name).exists()]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Receiver() as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        place = tmp_path_factory.mktemp("services") / "checkout"
        project = Project.create(place, {"TASKVEC_WEBHOOK_URL": receiver.url})
        project.replace("prefect.yaml", "targets: []", "targets: [pretrain]")
        project.replace("prefect.yaml", "    triggers:\n", f"{SCHEDULES}    triggers:\n")
        project.command(
            "git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qam", "often"
        )
        seed(project.root)
        done = project.taskvec("services", "up")
        assert done.code == 0, done.err
        try:
            done = project.taskvec("deploy")
            assert done.code == 0, done.err
            assert HOOK not in done.out + done.err
            known = json.loads((project.root / ".taskvec/services.json").read_text())
            yield Running(project, receiver, known)
        finally:
            mark = mark_of(project)
            done = project.taskvec("services", "down")
            receiver.shutdown()
        assert done.code == 0, done.err
        assert not left_behind(project)
        assert not kept(mark)
        done = project.taskvec("services", "status")
        assert (done.code, "no services run" in done.out) == (0, True)


def test_the_services_are_up_and_starting_them_again_changes_nothing(running: Running) -> None:
    rows = running.status()
    assert {name for name, row in rows.items() if row["state"] == "up"} >= {
        "prefect", "mlflow", "worker", "watcher",
    }  # fmt: skip
    done = running.project.taskvec("services", "status", "--json")
    assert done.code == 0
    assert {row["name"]: row for row in json.loads(done.out)} == rows
    done = running.project.taskvec("services", "up")
    assert (done.code, "run already" in done.err) == (0, True)
    assert running.project.taskvec("ui").code == 6
    pids = {name: row["pid"] for name, row in running.status().items()}
    assert pids == {name: row["pid"] for name, row in rows.items()}
    mode = (running.project.root / ".taskvec/services.json").stat().st_mode
    assert mode & 0o777 == 0o600


def test_only_loopback_is_bound_and_strangers_are_refused(running: Running) -> None:
    addresses = {
        connection.laddr.ip
        for process in kept(mark_of(running.project))
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}
    prefect, mlflow = running.known["prefect"]["PREFECT_API_URL"], running.known["mlflow"]["url"]
    signed = tuple(running.known["prefect"]["PREFECT_API_AUTH_STRING"].split(":"))
    ask = f"{mlflow}/api/2.0/mlflow/experiments/search?max_results=1"
    create = f"{mlflow}/api/2.0/mlflow/experiments/create"
    assert requests.post(f"{prefect}/flows/filter", json={}, auth=signed).status_code == 403  # CSRF
    assert requests.get(f"{prefect}/flows/count").status_code in (401, 405)
    assert requests.get(ask).status_code == 200
    for host in (
        "evil.example",
        "10.evil.example",
        "192.168.evil.example",
        "localhost:1.evil.example",
    ):
        assert requests.get(f"{prefect}/admin/version", headers={"Host": host}).status_code == 401
        assert requests.get(ask, headers={"Host": host}).status_code == 403
    for origin in ({"Origin": f"http://{host}"} for host in STRANGERS if ":" not in host):
        done = requests.post(f"{prefect}/flows/", json={"name": "x"}, headers=origin, auth=signed)
        assert done.status_code == 403
        assert requests.post(create, json={"name": "x"}, headers=origin).status_code == 403


def test_no_password_is_in_arguments_or_logs(running: Running) -> None:
    password = running.known["prefect"]["PREFECT_API_AUTH_STRING"].partition(":")[2]
    for process in kept(mark_of(running.project)):
        assert not {password, HOOK} & set(" ".join(process.cmdline()).split()), process
        assert password not in " ".join(process.cmdline())
    logs = list((running.project.root / ".taskvec/logs").glob("service-*"))
    assert len(logs) >= 5
    for log in logs:
        text = log.read_text()
        assert password not in text, log
        assert HOOK not in text, log


def test_what_is_killed_is_started_again_and_leaves_no_orphan(running: Running) -> None:
    before = running.status()
    family = [psutil.Process(before[name]["pid"]) for name in ("worker", "watcher")]
    family += [child for process in family for child in process.children(recursive=True)]
    family[0].kill()  # a keeper: what it kept is on its own now
    family[1].children()[0].kill()  # a service below its keeper

    def again() -> bool:
        rows = running.status()
        return all(rows[n]["state"] == "up" and rows[n]["restarts"] for n in ("worker", "watcher"))

    wait_until(again, "the worker and the watcher run again")
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    after = running.status()
    assert after["prefect"]["pid"] == before["prefect"]["pid"]


def test_a_second_checkout_uses_the_servers_of_others_and_ends_with_its_supervisor(
    running: Running, tmp_path: Path
) -> None:
    elsewhere = {
        "PREFECT_API_URL": running.known["prefect"]["PREFECT_API_URL"],
        "PREFECT_API_AUTH_STRING": running.known["prefect"]["PREFECT_API_AUTH_STRING"],
        "MLFLOW_TRACKING_URI": running.known["mlflow"]["url"],
    }
    second = Project.create(tmp_path / "second", elsewhere)
    done = second.taskvec("services", "up")
    assert done.code == 0, done.err
    rows = json.loads(second.taskvec("services", "status", "--json").out)
    states = {row["name"]: row["state"] for row in rows}
    assert states["prefect"] == states["mlflow"] == "elsewhere"
    assert states["worker"] == states["watcher"] == "up"
    mark = mark_of(second)
    assert kept(mark)
    supervisor = json.loads((second.root / ".taskvec/services.json").read_text())["supervisor"]
    psutil.Process(supervisor["pid"]).kill()
    wait_until(lambda: not kept(mark), "everything ends with its supervisor")
    done = second.taskvec("services", "status")
    assert (done.code, "not running" in done.out) == (7, True)
    done = second.taskvec("services", "down")
    assert (done.code, left_behind(second)) == (0, [])
    assert services.healthy(list(running.status().values()))


def test_a_port_that_is_taken_is_told_before_anything_starts(
    running: Running, tmp_path: Path
) -> None:
    second = Project.create(tmp_path / "second", {})
    port = running.known["mlflow"]["url"].rpartition(":")[2]
    done = second.taskvec("services", "up", "--mlflow-port", port)
    assert (done.code, f"port {port} for mlflow is in use" in done.err) == (7, True)
    assert not left_behind(second)


def test_what_does_not_start_is_told_with_its_log_and_nothing_is_left_running(
    running: Running, tmp_path: Path
) -> None:
    broken = {
        "MLFLOW_TRACKING_URI": running.known["mlflow"]["url"],
        "PREFECT_API_DATABASE_CONNECTION_URL": "postgresql+asyncpg://u:sesame-42@127.0.0.1:1/x",
    }
    second = Project.create(tmp_path / "second", broken)
    before = {process.pid for process in psutil.process_iter()}
    done = second.taskvec("services", "up")
    assert done.code == 7
    assert "the Prefect server ended; the end of .taskvec/logs/service-prefect.log" in done.err
    assert "sesame-42" not in done.err
    assert not left_behind(second)
    place = str(second.root)
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            assert process.pid in before or place not in " ".join(process.cmdline())


@pytest.mark.nightly
def test_a_commit_starts_a_run_and_a_crash_is_told_and_the_next_run_goes_on(
    running: Running,
) -> None:
    project, receiver = running.project, running.receiver
    project.replace("params.yaml", "shots: 2", "shots: 3")
    time.sleep(5)
    assert "told" not in running.log("watcher")  # nobody has committed it
    commit(project, "shots")
    wait_until(lambda: "run prepare@" in running.log("worker"), "the first stage of a run")
    assert re.search(r"told: .*params\.yaml", running.log("watcher"))
    worker = psutil.Process(running.status()["worker"]["pid"])
    (engine,) = [p for p in worker.children(recursive=True) if "prefect.engine" in words(p)]
    engine.kill()
    crash = receiver.wait("Crashed")
    assert crash["deployment"] == "taskvec/run"
    assert "failure: taskvec/run" in crash["text"]

    begun = running.log("worker").count(BEGUN)
    done = project.taskvec("schedule", "resume", "run")
    assert "every 0:00:20" in done.out, done.err
    wait_until(lambda: running.log("worker").count(BEGUN) > begun, "a run at its time")
    done = project.taskvec("schedule", "pause", "run")
    assert "paused" in done.out, done.err
    wait_until(lambda: "of 3 stages were stale" in running.log("worker"), "the end of that run")
    for task in ("digits", "faces"):  # over both runs: what the first had done was kept
        assert running.log("worker").count(f" - run prepare@{task}") <= 1

    # Prefect tells of a run that was planned minutes before it started later than of this one
    assert project.taskvec("schedule", "start", "run").code == 0
    ended = receiver.wait("Completed")
    assert "recovery: taskvec/run" in ended["text"]
    assert ended["message"] == "3 stages were up to date"

    found = requests.post(
        f"{running.known['mlflow']['url']}/api/2.0/mlflow/runs/search",
        json={"experiment_ids": ["1"]},
    ).json()["runs"]  # fmt: skip
    status = {run["info"]["run_name"]: run["info"]["status"] for run in found}
    assert status["pretrain"] == "FINISHED"

    weights = project.root / "data/checkpoints/pretrained.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    done = project.taskvec("schedule", "start", "nightly")
    assert done.code == 0, done.err
    damage = receiver.wait("Failed")
    assert "data/checkpoints/pretrained.safetensors" in damage["message"]
    assert "nothing was run" in damage["message"]


def test_the_schedule_says_what_runs_when(running: Running) -> None:
    rows = json.loads(running.project.taskvec("schedule", "list", "--json").out)
    found = {(row["deployment"], row["when"]): row["active"] for row in rows}
    assert ("nightly", "0 3 * * *") in found
    assert ("run", "inputs change") in found
    done = running.project.taskvec("schedule", "pause", "nightl")
    assert (done.code, "did you mean 'nightly'" in done.err) == (3, True)
