"""`python -m flows.supervisor [NAME=PORT ...]`: start the services of a checkout, keep them up.

One process a checkout, started by `taskvec services up`. It starts every service below a keeper
(flows/keeper.py), so that none outlives it; tells the command on standard output what happens, one
JSON pair a line, until all answer; then starts again what ends or no longer answers, after a
growing pause and not for ever.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from flows import databases, keeper, services
from flows.redaction import without_user
from flows.servers import (
    free_port,
    new_password,
    prefect_command,
    prefect_environment,
    spawn,
    stop,
    tail,
    usable_port,
)
from flows.services_file import services_file, write_services
from flows.store import own_uri, tracking_uri
from flows.tracking import server_command, server_environment
from flows.worker import OWN
from taskvec.errors import Busy, ServiceUnreachable, TaskvecError

WORK_POOL = "taskvec"
POLL_SECONDS = 0.2
START_SECONDS = 180  # that a service may take on a busy machine
LOCK_SECONDS = 3  # a look at the lock holds it for a moment
PROBE_EVERY, HUNG_SECONDS = 10.0, 60.0
RESTARTS, STEADY_SECONDS = 6, 600.0  # so many in a row; after this time it counts anew
PORTS = "ports.json"
QUERY_SECONDS = "3"  # how often the worker asks for runs


@dataclass
class Service:
    """Something that is to run.

    Attributes:
        name: of it and of its log.
        what: it is called in a message.
        command: empty: it runs elsewhere, or is left out.
        probe: how to see that it lives; see `services.probe`.
        environment: what differs from the supervisor's.
        address: for people.
        after: the service that must answer before this one starts.
        state: as `services.status` says.
    """

    name: str
    what: str
    command: list[str]
    probe: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    address: str = ""
    after: str = ""
    state: str = "starting"
    process: "subprocess.Popen[bytes] | None" = None
    mark: str = field(default_factory=keeper.new_mark)
    started: float = 0.0  # by the monotonic clock
    answered: float = 0.0
    probed: float = 0.0
    restarts: int = 0
    failures: int = 0  # in a row
    wait_until: float = 0.0

    def described(self) -> dict[str, Any]:
        """Return what the services file says of it."""
        pid = self.process.pid if self.process else 0
        return {
            "state": self.state,
            "probe": self.probe,
            "address": self.address,
            "restarts": self.restarts,
            **({"pid": pid} if pid else {}),
        }


class Supervisor:
    """Owns the services of a checkout."""

    def __init__(self, root: Path, ports: dict[str, int]) -> None:
        """Decide what runs and where.

        Args:
            root: the checkout.
            ports: name of a server -> the port that it shall have.
        """
        self._root = root
        self._mark = keeper.new_mark()
        self._file: dict[str, Any] = {}
        self._ended = threading.Event()
        self.services = {service.name: service for service in self._wanted(ports)}

    def stop(self, *_: object) -> None:
        """Let `start` and `watch` end soon."""
        self._ended.set()

    def start(self, say: Callable[[str], None]) -> None:
        """Start everything and wait until it answers.

        Raises:
            ServiceUnreachable: something does not.
        """
        for service in self.services.values():
            if service.state == services.ELSEWHERE and not self._answers(service):
                raise ServiceUnreachable(f"{service.what} does not answer at {service.address}")
        self._write()
        # A run that creates the tables of the same new file meanwhile would destroy them.
        with FileLock(services.directory(self._root) / "mlflow.lock", timeout=START_SECONDS):
            self._start_all(say)

    def _start_all(self, say: Callable[[str], None]) -> None:
        while waiting := [s for s in self.services.values() if s.state == "starting"]:
            for service in waiting:
                if self._start_if_ready(service):
                    self._write()
                elif service.process and self._look(service):
                    seconds = time.monotonic() - service.started
                    say(f"{service.name}: {service.address or 'up'} ({seconds:.1f} s)")
                    self._write()
                elif service.process and service.process.poll() is not None:
                    self._refuse(service, "ended")
                elif service.process and time.monotonic() - service.started > START_SECONDS:
                    self._refuse(service, f"does not answer after {START_SECONDS} s")
            if self._ended.wait(POLL_SECONDS):
                raise ServiceUnreachable("stopped before everything ran")

    def watch(self) -> None:
        """Start again what ends or hangs, until `stop`."""
        while not self._ended.wait(POLL_SECONDS):
            for service in self.services.values():
                if service.command and service.state != "stopped" and self._tend(service):
                    self._write()

    def close(self) -> None:
        """Stop everything: first what uses the servers."""
        for service in reversed(self.services.values()):
            if service.process:
                stop(service.process)
                keeper.end(service.mark)
        services_file(self._root).unlink(missing_ok=True)

    def _tend(self, service: Service) -> bool:
        """Look after a service that was up once; return whether its state changed."""
        now = time.monotonic()
        if service.process is None:
            if now < service.wait_until:
                return False
            self._spawn(service)
            return True
        ended = service.process.poll()
        starting = service.state == "starting"
        if ended is None and now - service.probed >= (1.0 if starting else PROBE_EVERY):
            self._look(service)
        silent = now - max(service.answered, service.started)
        hung = silent > (START_SECONDS if starting else HUNG_SECONDS + PROBE_EVERY)
        if ended is None and not hung:
            if service.failures and now - service.started > STEADY_SECONDS:
                service.failures = 0
            return False
        self._log(f"{service.name} {'hangs' if ended is None else f'ended with code {ended}'}")
        stop(service.process)
        keeper.end(service.mark)
        service.process = None
        service.failures += 1
        if service.failures > RESTARTS:
            service.state = "stopped"
            self._log(f"{service.name} is not started again")
            return True
        service.restarts += 1
        service.state = "starting"
        service.wait_until = now + min(60.0, 2.0 ** (service.failures - 1))
        return True

    def _start_if_ready(self, service: Service) -> bool:
        before = self.services.get(service.after)
        if service.process or (before and before.state == "starting"):
            return False
        self._spawn(service)
        return True

    def _spawn(self, service: Service) -> None:
        log = services.log_of(self._root, service.name)
        if log.is_file():
            log.replace(log.with_name(f"{log.name}.1"))
        if path := service.probe.get("file") or service.probe.get("socket"):
            Path(path).unlink(missing_ok=True)
        marks = f"{self._mark}:{service.mark}"
        service.process = spawn(service.command, log, service.environment, marks)
        service.started = time.monotonic()
        service.answered = service.probed = 0.0

    def _look(self, service: Service) -> bool:
        """Probe a service; return whether it is up."""
        service.probed = time.monotonic()
        if not self._answers(service):
            return False
        service.answered = time.monotonic()
        if service.state == "starting":
            service.state = "up"
            self._write()
        return True

    def _answers(self, service: Service) -> bool:
        return services.probe(service.probe, self._file)

    def _refuse(self, service: Service, why: str) -> None:
        log = services.log_of(self._root, service.name)
        raise ServiceUnreachable(
            f"{service.what} {why}; the end of {log.relative_to(self._root)}:\n{tail(log)}\n"
            "everything is stopped again"
        )

    def _write(self) -> None:
        described = {name: service.described() for name, service in self.services.items()}
        write_services(self._root, {**self._file, services.PROCESSES: described})

    def _log(self, text: str) -> None:
        sys.stderr.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")
        sys.stderr.flush()

    def _wanted(self, ports: dict[str, int]) -> Iterator[Service]:
        """Yield what is to run here, in the order in which it starts."""
        self._file[services.SUPERVISOR] = {
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "mark": self._mark,
        }
        chosen = _ports(self._root, ports)
        yield self._prefect(chosen["prefect"])
        yield self._mlflow(chosen["mlflow"])
        client = self._file["prefect"]
        loud = {
            **client, "PREFECT_LOGGING_LEVEL": "INFO", "PREFECT_LOGGING_TO_API_ENABLED": "true",
            "PYTHONPATH": _with(str(self._root), os.environ.get("PYTHONPATH", "")),
        }  # fmt: skip
        yield self._worker(loud)
        beat = services.directory(self._root) / "watcher.beat"
        yield Service(
            "watcher", "the watcher", [sys.executable, "-m", "flows.watcher", str(self._root)],
            {"file": str(beat)}, client, after="prefect",
        )  # fmt: skip
        door = services.directory(self._root) / "driver.sock"
        # With the environment of `services up`, as a run has it, it finds the servers by itself.
        yield Service(
            "driver", "the resident driver",
            [sys.executable, "-m", "flows.driver", str(self._root)],
            {"socket": str(door)}, {}, after="prefect",
        )  # fmt: skip

    def _prefect(self, port: int) -> Service:
        what = "the Prefect server"
        if url := os.environ.get("PREFECT_API_URL"):
            names = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_API_KEY")
            self._file["prefect"] = {n: os.environ[n] for n in names if n in os.environ}
            how = {"http": f"{url}/health", "password": True}
            return Service(
                "prefect", what, [], how, address=without_user(url), state=services.ELSEWHERE
            )  # fmt: skip
        environment = prefect_environment(self._root, port, new_password())
        # Clients need not know the password of the database.
        hidden = databases.PREFECT_VARIABLES
        self._file["prefect"] = {k: v for k, v in environment.items() if k not in hidden}
        url = environment["PREFECT_API_URL"]
        return Service(
            "prefect", what, prefect_command(port, ui=True),
            {"http": f"{url}/health", "password": True},
            {**environment, "PREFECT_LOGGING_LEVEL": "WARNING"}, url.removesuffix("/api"),
        )  # fmt: skip

    def _mlflow(self, port: int) -> Service:
        what, uri = "the MLflow server", tracking_uri(self._root)
        if uri.startswith("http"):
            self._file["mlflow"] = {"url": uri, "store": uri}
            place = without_user(uri).rstrip("/")
            how = {"http": f"{place}/health"}
            return Service(
                "mlflow", what, [], how, address=place, state=services.ELSEWHERE
            )  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        own = uri == own_uri(self._root)
        self._file["mlflow"] = {"url": url} if own else {"url": url, "store": uri}
        command, environment = server_command(self._root, port), server_environment(self._root)
        return Service("mlflow", what, command, {"http": f"{url}/health"}, environment, url)

    def _worker(self, environment: dict[str, str]) -> Service:
        port = free_port()
        command = [sys.executable, "-m", "flows.worker", WORK_POOL, f"taskvec {self._root.name}"]
        settings = {
            "PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1",
            "PREFECT_WORKER_WEBSERVER_PORT": str(port),
            "PREFECT_WORKER_QUERY_SECONDS": QUERY_SECONDS,
            OWN: "" if os.environ.get("PREFECT_API_URL") else "yes",
        }
        how = {"http": f"http://127.0.0.1:{port}/health"}
        where = f"work pool {WORK_POOL}"
        return Service(
            "worker", "the worker", command, how, {**environment, **settings}, where, "prefect"
        )


def main(words: list[str]) -> int:
    """Supervise the services of the working directory; return the exit code."""
    root = Path.cwd()
    try:
        with services.lock(root, LOCK_SECONDS):
            _supervise(root, {k: int(v) for k, _, v in (word.partition("=") for word in words)})
    except Timeout:
        _tell("error", "another supervisor has just started in this checkout", Busy.exit_code)
        return Busy.exit_code
    except TaskvecError as error:
        _tell("error", str(error), error.exit_code)
        return error.exit_code
    return 0


def _supervise(root: Path, ports: dict[str, int]) -> None:
    for name in databases.create():
        _tell("say", f"created the database {name}")
    supervisor = Supervisor(root, ports)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, supervisor.stop)
    try:
        supervisor.start(lambda text: _tell("say", text))
        _tell("ready")
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        supervisor.watch()
    finally:
        supervisor.close()


def _tell(kind: str, text: str = "", exit_code: int = 0) -> None:
    with suppress(OSError):  # whoever asked has gone
        sys.stdout.write(json.dumps([kind, text, exit_code]) + "\n")
        sys.stdout.flush()


def _ports(root: Path, wanted: dict[str, int]) -> dict[str, int]:
    """Return the ports of the servers: as wanted, else those of last time if they are free."""
    path = services.directory(root) / PORTS
    before: dict[str, int] = {}
    with suppress(OSError, ValueError):
        before = {str(k): int(v) for k, v in json.loads(path.read_text()).items()}
    found = {}
    for name in ("prefect", "mlflow"):
        port = wanted.get(name, 0)
        if port and not usable_port(port):
            raise ServiceUnreachable(f"port {port} for {name} is in use; choose another")
        again = before.get(name, 0)
        found[name] = port or (again if again and usable_port(again) else free_port())
    path.write_text(json.dumps(found))
    return found


def _with(first: str, rest: str) -> str:
    return f"{first}{os.pathsep}{rest}" if rest else first


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
