"""Handing a run over to the checkout's resident driver (flows/driver.py), if one is up.

They talk JSON lines over a Unix socket that only its owner may open. The client asks for a run and
is told what happens; whatever keeps the driver from doing exactly what the client would do, such as
other code or another environment, it says so, and the client does the work itself.
"""

import hashlib
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows import databases, keeper
from flows.nodes import Listener, Node, Outcome, Reason
from tasks.artifacts import Artifacts
from taskvec.errors import ServiceUnreachable, TaskvecError

DATA = "TASKVEC_DATA"  # travels with the request; the rest of the environment must be the same
_OWN = (DATA, keeper.MARK)  # differ without any effect
# Say where servers keep records. Who does not set them finds that out from the services.
FOUND = (
    *databases.PREFECT_VARIABLES,
    databases.MLFLOW_VARIABLE,
    databases.VARIABLE,
    "MLFLOW_TRACKING_URI",
)
_DECISIVE = (
    "AWS_", "CUDA_", "DVC_", "HF_", "MKL_", "MLFLOW_", "OMP_", "PREFECT_", "PYTHON", "TASKVEC_",
    "TORCH",
)  # fmt: skip
_CONNECT_SECONDS = 2


def socket_path(root: Path) -> Path:
    """Return where the driver of a checkout listens."""
    return Artifacts(root).top / ".taskvec" / "driver.sock"


def environment_digests(environment: Mapping[str, str]) -> dict[str, str]:
    """Return a digest of every variable that may change what a run does; no value is in it."""
    return {
        name: hashlib.sha256(value.encode()).hexdigest()
        for name, value in environment.items()
        if name.startswith(_DECISIVE) and name not in _OWN
    }


def run(
    root: Path,
    targets: list[str],
    *,
    slots: int | None,
    listener: Listener,
    say: Callable[[str], None],
) -> tuple[list[Node], list[Outcome]] | None:
    """Let the resident driver bring stages up to date; return None if it cannot.

    The arguments and the result are those of `flows.running.bring_up_to_date`.

    Raises:
        ServiceUnreachable: the driver ended in the middle.
        TaskvecError: as `bring_up_to_date`, with its exit code.
    """
    connection = _connect(socket_path(root))
    if connection is None:
        return None
    request = {
        "root": str(root),
        "targets": targets,
        "slots": slots,
        "data": os.environ.get(DATA),
        "environment": environment_digests(os.environ),
    }
    with connection, _passing_signals(connection):
        send(connection, request)
        for event in received(connection):
            match event.pop("event"):
                case "refused":
                    if event["why"]:
                        say(f"{event['why']}; this run works without the resident driver")
                    return None
                case "end":
                    return _end(event)
                case "say":
                    say(event["text"])
                case name:
                    _replay(listener, name, event)
    raise ServiceUnreachable(
        "the resident driver ended in the middle of the run; "
        "`taskvec run` goes on where it stopped, `taskvec services status` tells more"
    )


def send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    """Send one line."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def received(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """Yield what the other side sends until it closes."""
    with connection.makefile("rb") as lines:
        try:
            for line in lines:
                yield json.loads(line)
        except ConnectionError:
            return


@contextmanager
def reachable(path: Path) -> Iterator[str]:
    """Yield a short name of a socket: the system takes no more than 107 bytes."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def _connect(path: Path) -> socket.socket | None:
    if not path.exists():
        return None
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_CONNECT_SECONDS)
    try:
        with reachable(path) as address:
            connection.connect(address)
    except OSError:  # what a killed driver left
        connection.close()
        return None
    connection.settimeout(None)
    return connection


@contextmanager
def _passing_signals(connection: socket.socket) -> Iterator[None]:
    """Pass Ctrl-C and SIGTERM on to the driver, which then ends the run and says so."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [
        signal.signal(number, lambda received, _: send(connection, {"stop": received}))
        for number in signals
    ]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _replay(listener: Listener, name: str, event: dict[str, Any]) -> None:
    match name:
        case "planned":
            listener.planned(event["stages"])
        case "started":
            listener.started(_node(event["node"]))
        case "progress":
            listener.progress(_node(event["node"]), event["progress"])
        case "finished":
            listener.finished(_node(event["node"]), Outcome(**event["outcome"]))
        case "note":
            listener.note(event["text"])


def _end(event: dict[str, Any]) -> tuple[list[Node], list[Outcome]]:
    if event["error"]:
        error = TaskvecError(event["error"])
        error.exit_code = event["exit_code"]
        raise error
    nodes = [_node(node) for node in event["nodes"]]
    return nodes, [Outcome(**outcome) for outcome in event["outcomes"]]


def _node(content: dict[str, Any]) -> Node:
    reasons = [Reason(**reason) for reason in content["reasons"]]
    return Node(**{**content, "reasons": reasons})
