"""Local servers: found if they run, else started on loopback and stopped by the starter."""

import base64
import http.client
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flows import databases, keeper
from flows.redaction import redacted
from flows.services_file import known_services
from taskvec.errors import ServiceUnreachable

START_SECONDS = 90
STOP_SECONDS = 15


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def usable_port(port: int) -> bool:
    """Return whether a server could listen on a port of the loopback interface now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def answers(url: str, headers: Mapping[str, str] | None = None) -> bool:
    """Return whether a server answers a GET with a status below 400."""
    try:
        request = urllib.request.Request(url, headers=dict(headers or {}))
        with urllib.request.urlopen(request, timeout=2) as response:
            return int(response.status) < 400
    except (http.client.HTTPException, OSError, ValueError):  # not HTTP, nobody there, no URL
        return False


def wait_for(
    url: str,
    process: subprocess.Popen[bytes],
    log: Path,
    what: str,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Wait until a server that was just started answers.

    Raises:
        ServiceUnreachable: it ended, or does not answer in time.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if answers(url, headers):
            return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    stop(process)
    raise ServiceUnreachable(f"{what} did not start; the end of {log.name}:\n{tail(log)}")


def tail(log: Path, lines: int = 5) -> str:
    """Return the last lines of a log, without passwords; empty if there is none."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    return redacted("\n".join(text.splitlines()[-lines:]))


def spawn(
    command: list[str], log: Path, environment: Mapping[str, str], mark: str = ""
) -> subprocess.Popen[bytes]:
    """Start a server that ends with this process; its output goes to a file.

    Args:
        command: of the server.
        log: the file.
        environment: what differs from this process's own.
        mark: by which `keeper.end` finds all that it started; default: a new one.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    marks = keeper.marked(os.environ.get(keeper.MARK, ""), mark or keeper.new_mark())
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.keeper", *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env={**os.environ, **environment, **marks},
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a server and everything that it started."""
    if process.stdin:
        process.stdin.close()  # the keeper then ends its whole group
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def prefect_environment(root: Path, port: int, password: str) -> dict[str, str]:
    """Return the settings of a Prefect server and its clients: loopback, password, own database."""
    home = root / ".taskvec" / "prefect"
    home.mkdir(parents=True, exist_ok=True)
    url = f"http://127.0.0.1:{port}"
    return {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_API_AUTH_STRING": password,
        "PREFECT_SERVER_API_AUTH_STRING": password,
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": url,
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_API_URL": f"{url}/api",
        "PREFECT_LOGGING_LEVEL": "CRITICAL",  # failures are told by the flow itself, once
        "PREFECT_LOGGING_TO_API_ENABLED": "false",
        "PREFECT_CLI_PROMPT": "false",
        "DO_NOT_TRACK": "1",
        **databases.prefect(),
    }


def prefect_command(port: int, *, ui: bool) -> list[str]:
    """Return the command of a Prefect server on loopback.

    Its services stay on: one of them records the task runs.
    """
    extra = ["--ui"] if ui else ["--no-ui", "--no-scheduler", "--no-late-runs"]
    return [
        sys.executable, "-m", "prefect", "server", "start",
        "--host", "127.0.0.1", "--port", str(port), "--analytics-off", *extra,
    ]  # fmt: skip


def new_password() -> str:
    """Return a fresh user:password for a Prefect server."""
    return f"taskvec:{secrets.token_urlsafe(24)}"


@dataclass(frozen=True)
class Prefect:
    """A Prefect server: its address and the environment that a client needs."""

    environment: dict[str, str]

    @property
    def url(self) -> str:
        """The address of the API."""
        return self.environment["PREFECT_API_URL"]


def running_prefect(root: Path) -> Prefect | None:
    """Return the server of PREFECT_API_URL or of a running `taskvec ui`, if there is one.

    Raises:
        ServiceUnreachable: PREFECT_API_URL is set and nobody answers there.
    """
    url = os.environ.get("PREFECT_API_URL")
    if url:
        if not answers(
            f"{url}/health", authorization(os.environ.get("PREFECT_API_AUTH_STRING", ""))
        ):
            raise ServiceUnreachable(
                f"no Prefect server answers at PREFECT_API_URL={url}; "
                "start it, or unset the variable to use a server of this run's own"
            )
        return Prefect({"PREFECT_API_URL": url})
    environment = known_services(root).get("prefect", {})
    if "PREFECT_API_URL" not in environment:
        return None
    server = Prefect(environment)
    headers = authorization(environment.get("PREFECT_API_AUTH_STRING", ""))
    return server if answers(f"{server.url}/health", headers) else None


@contextmanager
def started_prefect(root: Path, *, ui: bool, port: int = 0) -> Iterator[Prefect]:
    """Start a Prefect server on loopback, stop it at the end; also if this process is killed."""
    port = port or free_port()
    environment = prefect_environment(root, port, new_password())
    log = root / ".taskvec" / "logs" / "prefect-server.log"
    process = spawn(prefect_command(port, ui=ui), log, environment)
    try:
        server = Prefect(environment)
        headers = authorization(environment["PREFECT_API_AUTH_STRING"])
        wait_for(f"{server.url}/health", process, log, "the Prefect server", headers)
        yield server
    finally:
        stop(process)


def mlflow_url(root: Path) -> str:
    """Return the address of the MLflow UI, if there is one to link to; else an empty string."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    return uri if uri.startswith("http") else known_services(root).get("mlflow", {}).get("url", "")


def authorization(password: str) -> dict[str, str]:
    """Return the header that carries a user:password; none without one."""
    token = base64.b64encode(password.encode()).decode()
    return {"Authorization": f"Basic {token}"} if password else {}
