"""The UIs of MLflow and Prefect, on loopback, until Ctrl-C."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path

from filelock import Timeout

from flows import services
from flows.servers import (
    free_port,
    spawn,
    started_prefect,
    stop,
    wait_for,
)
from flows.services_file import services_file, write_services
from flows.tracking import server_command, server_environment
from taskvec.errors import Busy


def serve(root: Path, say: Callable[[str], None]) -> None:
    """Start both servers, print their addresses and wait for Ctrl-C or SIGTERM.

    Raises:
        Busy: servers of this checkout run already.
    """
    try:
        with services.lock(root):
            _serve(root, say)
    except Timeout:
        rows = services.table(services.status(root))
        raise Busy(f"servers of this checkout run already\n{rows}") from None


def _serve(root: Path, say: Callable[[str], None]) -> None:
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    port = free_port()
    log = root / ".taskvec" / "logs" / "mlflow-server.log"
    mlflow = spawn(server_command(root, port), log, server_environment(root))
    try:
        with started_prefect(root, ui=True) as prefect:
            wait_for(f"http://127.0.0.1:{port}/health", mlflow, log, "the MLflow server")
            write_services(
                root,
                {"prefect": prefect.environment, "mlflow": {"url": f"http://127.0.0.1:{port}"}},
            )
            say(f"MLflow:  http://127.0.0.1:{port}")
            say(f"Prefect: {prefect.url.removesuffix('/api')}")
            say(f"         sign in with its PREFECT_API_AUTH_STRING in {services_file(root)}")
            say("runs started meanwhile show there; Ctrl-C stops both")
            ended.wait()
    finally:
        services_file(root).unlink(missing_ok=True)
        stop(mlflow)
