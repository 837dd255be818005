"""`taskvec services`: the servers of a checkout, kept running by a supervisor of its own.

`up` starts flows/supervisor.py, which outlives the command and owns everything else. What runs,
and how to reach it, stands in .taskvec/services.json, readable by its owner only.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flows import keeper, outbox
from flows.servers import answers, authorization, tail
from flows.services_file import known_services, services_file
from tasks.artifacts import Artifacts
from taskvec.errors import Busy, InvalidInput, ServiceUnreachable, TaskvecError

SUPERVISOR = "supervisor"  # its log, and its key in the services file
PROCESSES = "processes"
ELSEWHERE = "elsewhere"  # the state of a server that somebody else runs
QUIET_SECONDS = 30  # without a sign of life from a service that leaves one
DOWN_SECONDS = 40
ERRORS = {kind.exit_code: kind for kind in (InvalidInput, Busy, ServiceUnreachable)}


def directory(root: Path) -> Path:
    """Return where services keep their state."""
    return Artifacts(root).top / ".taskvec"


def lock(root: Path, seconds: float = 0) -> FileLock:
    """Return the lock that whoever runs servers for a checkout holds as long as it lives."""
    directory(root).mkdir(exist_ok=True)
    return FileLock(directory(root) / "services.lock", timeout=seconds)


def log_of(root: Path, name: str) -> Path:
    """Return the log of a service."""
    return directory(root) / "logs" / f"service-{name}.log"


def supervised(root: Path) -> bool:
    """Return whether a supervisor lives."""
    held = lock(root)
    try:
        held.acquire()
    except Timeout:
        return True
    held.release()
    return False


def up(root: Path, ports: Mapping[str, int], say: Callable[[str], None]) -> None:
    """Start everything that does not run yet, and wait until it answers.

    Args:
        root: the checkout.
        ports: of servers that want a certain one: name -> port.
        say: is told what happens.

    Raises:
        Busy: somebody else runs servers here.
        InvalidInput: the address of a database is none.
        ServiceUnreachable: something did not start; everything is stopped again.
    """
    if supervised(root):
        if SUPERVISOR not in known_services(root):
            raise Busy("`taskvec ui` runs here, or services are starting; end it, or wait")
        say("the services run already")
        return
    down(root, lambda text: None)  # what a killed supervisor may have left
    log = log_of(root, SUPERVISOR)
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [f"{name}={port}" for name, port in ports.items()]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.supervisor", *words],
            cwd=root, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    try:
        _follow(process, log, say)
    except BaseException:
        with suppress(ProcessLookupError):
            process.terminate()  # it stops all that it started
        with suppress(subprocess.TimeoutExpired):
            process.wait(DOWN_SECONDS)
        raise


def _follow(process: "subprocess.Popen[bytes]", log: Path, say: Callable[[str], None]) -> None:
    """Pass on what a starting supervisor tells, until everything runs."""
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            kind, text, exit_code = json.loads(line)
            if kind == "ready":
                return
            if kind == "error":
                raise ERRORS.get(exit_code, TaskvecError)(text)
            say(text)
    raise ServiceUnreachable(
        f"the supervisor ended; the end of {log.name}:\n{tail(log)}\nnothing is left running"
    )


def down(root: Path, say: Callable[[str], None]) -> None:
    """Stop what `up` started, also if its supervisor was killed; leave nothing behind."""
    known = known_services(root)
    supervisor = known.get(SUPERVISOR, {})
    if not supervisor and supervised(root):
        raise Busy("`taskvec ui` runs in this checkout; end it with Ctrl-C")
    if not supervisor:
        say("no services run in this checkout")
    elif alive(supervisor):
        os.kill(int(supervisor["pid"]), signal.SIGTERM)
        deadline = time.monotonic() + DOWN_SECONDS
        while alive(supervisor) and time.monotonic() < deadline:
            time.sleep(0.05)
        if alive(supervisor):
            os.kill(int(supervisor["pid"]), signal.SIGKILL)
    if mark := supervisor.get("mark", ""):
        keeper.end(mark)  # nothing, unless the supervisor or a keeper was killed
    for name in ("driver.sock", "watcher.beat"):
        (directory(root) / name).unlink(missing_ok=True)
    services_file(root).unlink(missing_ok=True)
    if supervisor:
        say("the services are stopped")


def status(root: Path) -> list[dict[str, Any]]:
    """Return the services: name, state, address, pid, restarts and log of each.

    The state is "up"; "starting", "no answer", "stopped" (given up after several restarts) or
    "not running" if something should run and does not; "elsewhere" for a server of somebody else
    that answers; "left out" for what this installation has not.
    """
    known = known_services(root)
    supervised_now = alive(known.get(SUPERVISOR, {}))
    rows = []
    for name, process in known.get(PROCESSES, {}).items():
        row = {key: process.get(key, "") for key in ("address", "pid", "restarts")}
        state = process["state"]
        if state in (ELSEWHERE, "up") and not probe(process["probe"], known):
            state = "no answer"
        if state != ELSEWHERE and not supervised_now:
            state = "not running"
        log = os.path.relpath(log_of(root, name), root) if process.get("pid") else ""
        rows.append({"name": name, "state": state, **row, "log": log})
    return rows


def healthy(rows: list[dict[str, Any]]) -> bool:
    """Return whether everything that should run does."""
    return all(row["state"] in ("up", ELSEWHERE) for row in rows)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the services as text."""
    if not rows:
        return "no services run in this checkout; `taskvec services up` starts them"
    lines = []
    for row in rows:
        again = f"{row['restarts']} restarts" if row["restarts"] else ""
        pid = f"process {row['pid']}" if row["pid"] else ""
        parts = f"{row['name']:8} {row['state']:11} {row['address']:28} {pid:15} {again}"
        lines.append(parts.rstrip())
    return "\n".join(lines)


def probe(how: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Return whether a service gives a sign of life.

    Args:
        how: one of ``http`` (an address), ``file`` (one that it touches), ``socket`` (that it
            listens on).
        known: the services file.
    """
    if url := how.get("http"):
        password = known.get("prefect", {}).get("PREFECT_API_AUTH_STRING", "")
        return answers(url, authorization(password) if how.get("password") else {})
    if path := how.get("file"):
        try:
            return time.time() - Path(path).stat().st_mtime < QUIET_SECONDS
        except FileNotFoundError:
            return False
    if path := how.get("socket"):
        with socket.socket(socket.AF_UNIX) as end:
            end.settimeout(2)
            try:
                end.connect(path)
            except OSError:
                return False
            return True
    return True


def alive(process: Mapping[str, Any]) -> bool:
    """Return whether a process of the services file lives: its number and its start."""
    return bool(process) and outbox.alive(int(process["pid"]), float(process["started"]))
