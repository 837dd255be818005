"""Servers end with their starter and serve only us; a checkout is held by one run at a time."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import requests

from flows import registry, servers, tracking
from flows.locking import held
from flows.services_file import services_file, write_services
from taskvec.errors import Busy, ServiceUnreachable
from tests.project import ROOT

# A server that itself starts a process, which may not care about SIGTERM.
SERVER = """
import signal, subprocess, sys, time
stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN);" * (len(sys.argv) > 2)
child = subprocess.Popen([sys.executable, "-c",
    f"import signal, time; {stubborn} print('on', flush=True); time.sleep(600)"],
    stdout=subprocess.PIPE)
child.stdout.readline()
open(sys.argv[1], "w").write(f"{child.pid} ")
time.sleep(600)
"""


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    return {**kept, "PYTHONPATH": str(ROOT), **more}


def wait_for_file(path: Path) -> str:
    deadline = time.monotonic() + 30
    while not path.is_file() or not path.read_text():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.02)
    return path.read_text()


def survivors(processes: list[psutil.Process], seconds: float) -> list[list[str]]:
    """Return the commands of those that live on; an ended one may wait for init to collect it."""
    _, alive = psutil.wait_procs([p for p in processes if _is_alive(p)], seconds)
    return [process.cmdline() for process in alive if _is_alive(process)]


def _is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


@pytest.fixture(autouse=True)
def _same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith(("PREFECT_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


# The keeper


def test_stop_ends_a_server_and_all_that_it_started(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVER, str(tmp_path / "child"), "stubborn"]
    process = servers.spawn(command, tmp_path / "log", {})
    wait_for_file(tmp_path / "child")
    all_of_it = family(process.pid)
    assert len(all_of_it) == 3
    servers.stop(process)
    assert not survivors(all_of_it, seconds=1)


def test_a_server_ends_when_its_starter_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from flows.servers import spawn\n"
        f"spawn([sys.executable, '-c', {SERVER!r}, {str(tmp_path / 'child')!r}],"
        f" Path({str(tmp_path / 'log')!r}), {{}})\ntime.sleep(600)"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], env=environment())
    wait_for_file(tmp_path / "child")
    all_of_it = family(starter.pid)
    assert len(all_of_it) == 4
    starter.kill()
    starter.wait()
    assert not survivors(all_of_it, seconds=4)


def test_a_server_that_ends_by_itself_passes_its_exit_code_on(tmp_path: Path) -> None:
    process = servers.spawn([sys.executable, "-c", "raise SystemExit(7)"], tmp_path / "log", {})
    assert process.wait(20) == 7
    servers.stop(process)


def test_the_output_and_the_environment_of_a_server_are_what_was_asked_for(tmp_path: Path) -> None:
    code = "import os; print(os.environ['WORD'], os.getpgrp() == os.getppid())"
    log = tmp_path / "logs" / "server.log"
    process = servers.spawn([sys.executable, "-c", code], log, {"WORD": "hello"})
    assert process.wait(20) == 0
    servers.stop(process)
    assert log.read_text() == "hello True\n"


def test_a_server_that_does_not_start_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "some.log"
    process = servers.spawn([sys.executable, "-c", "raise OSError('no room')"], log, {})
    url = f"http://127.0.0.1:{servers.free_port()}"
    with pytest.raises(ServiceUnreachable, match=r"some\.log:(.|\n)*no room"):
        servers.wait_for(url, process, log, "the server")
    assert process.poll() is not None


# What answers


@pytest.fixture
def odd_server() -> Iterator[str]:
    """Yield the address of something that listens but does not speak HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def talk() -> None:
            try:
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        connection.sendall(b"220 mail ready\r\n")
                        connection.recv(1000)
            except OSError:
                return

        threading.Thread(target=talk, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_whatever_is_no_http_server_does_not_answer(odd_server: str) -> None:
    assert not servers.answers(odd_server)
    assert not servers.answers(f"http://127.0.0.1:{servers.free_port()}")
    assert not servers.answers("no address")


def test_a_prefect_server_that_was_asked_for_must_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in (f"http://127.0.0.1:{servers.free_port()}/api", "nonsense"):
        monkeypatch.setenv("PREFECT_API_URL", url)
        with pytest.raises(ServiceUnreachable, match="PREFECT_API_URL"):
            servers.running_prefect(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"prefect": {}}', "x", "null"])
def test_a_damaged_services_file_is_the_same_as_none(tmp_path: Path, text: str) -> None:
    services_file(tmp_path).parent.mkdir()
    services_file(tmp_path).write_text(text)
    assert servers.running_prefect(tmp_path) is None


def test_the_services_file_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    path = services_file(tmp_path)
    path.parent.mkdir()
    path.write_text("old")
    path.chmod(0o666)
    write_services(tmp_path, {"prefect": {"PREFECT_API_URL": "x"}})
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text())["prefect"]["PREFECT_API_URL"] == "x"


def test_prefects_settings_have_a_password_one_origin_csrf_and_loopback(tmp_path: Path) -> None:
    settings = servers.prefect_environment(tmp_path, 4321, "user:secret")
    assert settings["PREFECT_SERVER_API_AUTH_STRING"] == "user:secret"
    assert settings["PREFECT_API_AUTH_STRING"] == "user:secret"
    assert settings["PREFECT_SERVER_API_HOST"] == "127.0.0.1"
    assert settings["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"] == "http://127.0.0.1:4321"
    assert settings["PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED"] == "true"
    assert settings["PREFECT_CLIENT_CSRF_SUPPORT_ENABLED"] == "true"
    assert settings["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert settings["PREFECT_HOME"].startswith(str(tmp_path))
    assert "127.0.0.1" in servers.prefect_command(4321, ui=True)
    assert "secret" not in " ".join(servers.prefect_command(4321, ui=False))


def test_passwords_differ() -> None:
    passwords = {servers.new_password() for _ in range(10)}
    assert len(passwords) == 10
    assert all(len(password) > 30 for password in passwords)


# The real servers


def status_of(url: str, *, host: str = "", password: str = "", origin: str = "") -> int:
    request = urllib.request.Request(url)
    if host:
        request.add_header("Host", host)
    if origin:
        request.add_header("Origin", origin)
    if password:
        token = base64.b64encode(password.encode()).decode()
        request.add_header("Authorization", f"Basic {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def listening_addresses(pid: int) -> set[str]:
    addresses = set()
    for process in family(pid):
        with suppress(psutil.NoSuchProcess):  # a helper of the server that has just ended
            addresses |= {
                connection.laddr.ip
                for connection in process.net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN
            }
    return addresses


READ = """
import anyio, prefect.server.api.server
from prefect.client.orchestration import get_client
async def main():
    async with get_client() as client:
        print(len(await client.read_task_runs()), len(await client.read_flow_runs()))
anyio.run(main)
"""


def test_a_started_prefect_server_is_closed_to_others_and_serves_our_client(tmp_path: Path) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with servers.started_prefect(tmp_path, ui=False) as server:
        password = server.environment["PREFECT_API_AUTH_STRING"]
        flows = f"{server.url}/admin/version"
        assert status_of(flows) in (401, 403)
        assert status_of(flows, password="taskvec:guess") in (401, 403)
        assert status_of(flows, password=password) == 200
        started = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
        keeper = next(process for process in started if "flows.keeper" in process.cmdline())
        assert listening_addresses(keeper.pid) == {"127.0.0.1"}
        # With defaults: an unfit fastapi answers these with 422.
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", READ],
            env=environment(**server.environment), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["0", "0"]
        # A run in this checkout finds it through the services file.
        write_services(tmp_path, {"prefect": server.environment})
        assert servers.running_prefect(tmp_path) == server
        log = (tmp_path / ".taskvec/logs/prefect-server.log").read_text()
        assert password not in log
    assert not survivors(started, seconds=5)
    assert servers.running_prefect(tmp_path) is None


def test_an_mlflow_server_answers_on_loopback_under_its_own_name_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = servers.free_port()
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"}
    log = tmp_path / "mlflow.log"
    process = servers.spawn(tracking.server_command(tmp_path, port), log, quiet)
    try:
        url = f"http://127.0.0.1:{port}"
        servers.wait_for(f"{url}/health", process, log, "the MLflow server")
        search = f"{url}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
        assert status_of(search) == 200
        assert status_of(search, host="10.evil.example") == 403
        assert listening_addresses(process.pid) == {"127.0.0.1"}
        # it is asked for registered models without mlflow
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        assert registry.versions(tmp_path) == []
        rows = [
            ("registered-models/create", {"name": "a"}),
            ("registered-models/create", {"name": "b"}),
            ("model-versions/create", {"name": "a", "source": "s3://x/1"}),
            ("model-versions/create", {"name": "a", "source": "s3://x/2"}),
            ("model-versions/create", {"name": "b", "source": "s3://x/3"}),
            (
                "model-versions/set-tag",
                {"name": "a", "version": "1", "key": "dvc.md5", "value": "x"},
            ),
            (
                "model-versions/set-tag",
                {"name": "a", "version": "2", "key": "dvc.md5", "value": "y"},
            ),
            ("registered-models/alias", {"name": "a", "alias": "champion", "version": "2"}),
        ]
        for place, content in rows:
            requests.post(f"{url}/api/2.0/mlflow/{place}", json=content).raise_for_status()
        monkeypatch.setattr(registry, "PAGE", 1)
        assert registry.versions(tmp_path) == [
            registry.Version("a", "1", (), "x"), registry.Version("a", "2", ("champion",), "y"),
        ]  # fmt: skip
        assert registry.digest(tmp_path, "models:/a@champion") == "y"
    finally:
        servers.stop(process)


# One run at a time

HOLD = """
import sys, time
from pathlib import Path
from flows.locking import held
with held(Path(sys.argv[1]), "taskvec run slowly", wait=False):
    print("holding", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Yield a process that holds the checkout."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env=environment(), stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n"
        yield process
        process.kill()


def test_a_second_run_is_told_at_once_who_holds_the_checkout(
    tmp_path: Path, holder: "subprocess.Popen[str]"
) -> None:
    began = time.monotonic()
    with pytest.raises(Busy) as error, held(tmp_path, "taskvec run", wait=False):
        pass
    assert time.monotonic() - began < 1
    assert error.value.exit_code == 6
    assert f"`taskvec run slowly` (process {holder.pid} on " in str(error.value)
    assert "--wait" in str(error.value)


def test_the_checkout_is_free_after_its_holder_was_killed(
    tmp_path: Path, holder: "subprocess.Popen[str]"
) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with held(tmp_path, "taskvec run", wait=False):
        written = json.loads((tmp_path / ".taskvec/run.json").read_text())
        assert written["pid"] == os.getpid()
        assert written["command"] == "taskvec run"
    assert not (tmp_path / ".taskvec/run.json").exists()


def test_whoever_waits_gets_the_checkout_when_it_is_free(
    tmp_path: Path, holder: "subprocess.Popen[str]"
) -> None:
    threading.Timer(0.5, holder.kill).start()
    began = time.monotonic()
    with held(tmp_path, "taskvec run", wait=True):
        assert 0.4 < time.monotonic() - began < 5


def test_the_checkout_is_free_after_an_error_and_can_be_held_again(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), held(tmp_path, "taskvec run", wait=False):
            raise KeyError
    with (
        held(tmp_path, "taskvec run", wait=False),
        pytest.raises(Busy),
        held(tmp_path, "taskvec run", wait=False),
    ):
        pass
