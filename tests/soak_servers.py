"""Trials of whole runs: `taskvec run` loses its Prefect server."""

import random
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import psutil

from flows import servers
from tests.session import seed
from tests.soak_runs import Moment, Runs, started, tail

HUNG_SECONDS = 25.0
GONE_SECONDS = 30.0  # from the loss of a server to the end of a run that gives up
LOSSES = ("down", "hung", "killed", "restarted")


def unserved(runs: Runs, draw: random.Random, how: str = "", moment: Moment | None = None) -> str:
    """Take the Prefect server away from a run; then run again with another one."""
    how = how or draw.choice(LOSSES)
    moment = moment or Moment.drawn(draw, runs)
    home = runs.directory / f"server-{draw.randrange(10**9)}"
    seed(home)
    away = nullcontext((None, _settings(home)))
    with (
        away if how == "down" else _server(home, _settings(home)) as (process, environment),
        runs.project(**environment) as project,
    ):
        with started(project) as run:
            moment.wait(project, run)
            began, ended = time.monotonic(), run.poll() is not None
            if process and how == "hung":
                _hang(process)
            elif process:
                _kill(process)
            again = _server(home, environment) if how == "restarted" else nullcontext()
            with again:
                code = run.wait(300)
            took = time.monotonic() - began
        if code not in (0, 7) or (how == "down" and code != 7):
            return f"{how}: exit code {code}: {tail(run)}"
        if code == 7 and not ended and took > GONE_SECONDS:
            return f"{how}: gave up after {took:.0f} s only"
        project.server = {**project.server, **runs.environment}
        return f"{how}: {found}" if (found := runs.completed(project)) else ""


def _settings(home: Path) -> dict[str, str]:
    """Return the environment of a Prefect server that nobody has started."""
    return servers.prefect_environment(home, servers.free_port(), servers.new_password())


@contextmanager
def _server(
    home: Path, environment: dict[str, str]
) -> Iterator[tuple["subprocess.Popen[bytes]", dict[str, str]]]:
    """Yield a Prefect server with its environment."""
    port = int(environment["PREFECT_SERVER_API_PORT"])
    log = home / "server.log"
    process = servers.spawn(servers.prefect_command(port, ui=False), log, environment)
    try:
        headers = servers.authorization(environment["PREFECT_API_AUTH_STRING"])
        url = f"{environment['PREFECT_API_URL']}/health"
        servers.wait_for(url, process, log, "the Prefect server", headers)
        yield process, environment
    finally:
        servers.stop(process)


def _hang(keeper: "subprocess.Popen[bytes]") -> None:
    """Freeze a server for a while."""
    frozen = psutil.Process(keeper.pid).children(recursive=True)
    for process in frozen:
        process.suspend()

    def resume() -> None:
        for process in frozen:
            with suppress(psutil.NoSuchProcess):
                process.resume()

    timer = threading.Timer(HUNG_SECONDS, resume)
    timer.daemon = True
    timer.start()


def _kill(keeper: "subprocess.Popen[bytes]") -> None:
    for process in psutil.Process(keeper.pid).children(recursive=True):
        process.kill()
    keeper.wait(30)
