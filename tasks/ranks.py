"""A fine-tuning in several processes of this machine, one a device: leading them, and being one.

A stage runs in a process that may have no children of its own by multiprocessing, so each one is a
program of its own, `python -m tasks.ranks`. It gets its job as JSON through a socket, tells its
progress and its errors through it, and ends when the other end closes: nothing outlives the stage.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import Pipe, connection
from pathlib import Path
from typing import Any

import torch

from tasks.artifacts import Artifacts
from tasks.learning import learn
from tasks.stages import Emit, Progress
from taskvec.errors import InvalidInput, TaskvecError
from taskvec.numeric import make_deterministic
from taskvec.parallel import joined
from taskvec.sections import FineTune, Model

SOURCES = Path(__file__).parents[1]
VARIABLE = "TASKVEC_PROCESSES"
KILLED = 137  # what a shell reports for SIGKILL
GRACE = 2.0  # seconds that the others have to say why, after the first one failed
# They talk to each other on this machine only.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


class TrainingFailed(TaskvecError):
    """One of the processes that train together raised an error, or died (exit code 137)."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class Rank:
    """One of the processes, as the leader sees it."""

    number: int
    process: "subprocess.Popen[bytes]"
    pipe: "connection.Connection[Any, Any]"
    ended: bool = field(default=False)  # it said how


def processes() -> int:
    """Return how many processes train together: one a visible CUDA device, or TASKVEC_PROCESSES.

    Raises:
        InvalidInput: the variable is no count, or more than there are devices.
    """
    devices = torch.cuda.device_count()
    text = os.environ.get(VARIABLE, "")
    if not text:
        return max(1, devices)
    if not text.isdecimal() or not 1 <= int(text) <= (devices or 64):
        most = f"at most {devices}, the visible devices" if devices else "at most 64"
        raise InvalidInput(f"{VARIABLE} is {text!r}; expected a number from 1, {most}")
    return int(text)


def lead(job: Mapping[str, Any], size: int, emit: Emit) -> None:
    """Train in several processes and wait for them; the first one writes the results.

    Args:
        job: what JSON can hold of the arguments of `tasks.learning.learn`, and ``root``.
        size: how many processes.
        emit: is told the progress of the first one.

    Raises:
        TrainingFailed: a process failed; the others were killed.
    """
    with tempfile.TemporaryDirectory(prefix="taskvec-") as directory, ExitStack() as stack:
        ranks = []
        for number in range(size):
            rank = stack.enter_context(_started(number))
            order = {**job, "rank": number, "size": size, "meeting": f"{directory}/meeting"}
            rank.pipe.send_bytes(json.dumps(order).encode())
            ranks.append(rank)
        _follow(ranks, emit)


@contextmanager
def _started(number: int) -> Iterator[Rank]:
    """Start a process and yield it; kill it at the end if it still runs."""
    ours, theirs = Pipe()
    paths = [str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**LOOPBACK, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(
        [sys.executable, "-m", main.__module__, str(theirs.fileno())],
        env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
    )  # fmt: skip
    theirs.close()
    try:
        yield Rank(number, process, ours)
    finally:
        process.kill()
        process.wait()
        ours.close()


def _follow(ranks: list[Rank], emit: Emit) -> None:
    """Pass the progress on until all have ended.

    Raises:
        TrainingFailed: with the words of the first that failed; those of the others, which then
            miss it, follow.
    """
    waiting = {rank.pipe: rank for rank in ranks}
    failures: list[str] = []
    died = False
    deadline = float("inf")
    while waiting:
        left = deadline - time.monotonic()
        ready = connection.wait(waiting, timeout=max(0.0, left) if failures else None)
        if not ready:
            break
        for pipe in ready:
            rank = waiting[pipe]  # type: ignore[index]
            try:
                message = json.loads(rank.pipe.recv_bytes())
            except (EOFError, ConnectionError):
                del waiting[rank.pipe]
                code = rank.process.wait()
                if not rank.ended:
                    died = True
                    failures.insert(0, f"died with exit code {code}{_cause(code)}")
                    failures[0] = f"process {rank.number} of {len(ranks)} {failures[0]}"
                    deadline = min(deadline, time.monotonic() + GRACE)
                continue
            match message:
                case {"progress": progress}:
                    emit(progress)
                case {"error": words, "exit_code": code}:
                    raise TrainingFailed(words, code)
                case {"crash": words}:
                    failures.append(f"process {rank.number} of {len(ranks)} failed:\n{words}")
                    deadline = min(deadline, time.monotonic() + GRACE)
            rank.ended = "progress" not in message
    if failures:
        raise TrainingFailed("\n".join(failures), KILLED if died else 1)


def _cause(code: int) -> str:
    if code != -signal.SIGKILL:
        return ""
    return " (killed, perhaps for want of memory: each process holds the data and the model)"


def main(descriptor: int) -> int:
    """Be one of the processes; return the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the leader decides
    pipe = connection.Connection(descriptor)
    job = json.loads(pipe.recv_bytes())
    threading.Thread(target=_end_with_leader, args=(pipe,), daemon=True).start()

    def tell(message: Mapping[str, Any]) -> None:
        pipe.send_bytes(json.dumps(message).encode())

    def emit(progress: Progress) -> None:
        if job["rank"] == 0:
            tell({"progress": progress})

    try:
        _train(job, emit)
    except TaskvecError as error:
        tell({"error": str(error), "exit_code": error.exit_code})
    except Exception:
        tell({"crash": traceback.format_exc()})
    else:
        tell({"done": True})
        return 0
    sys.stderr.flush()
    os._exit(1)  # to take leave of the others would hang


def _train(job: Mapping[str, Any], emit: Emit) -> None:
    make_deterministic()
    with joined(job["rank"], job["size"], Path(job["meeting"])) as group:
        learn(
            Artifacts(Path(job["root"])),
            expert=job["expert"],
            seed=job["seed"],
            tasks=job["tasks"],
            model=Model.model_validate(job["model"]),
            recipe=FineTune.model_validate(job["recipe"]),
            emit=emit,
            group=group,
        )


def _end_with_leader(pipe: "connection.Connection[Any, Any]") -> None:
    """End this process when the leader is gone: a stage that was killed tells nobody."""
    try:
        pipe.recv_bytes()
    except (EOFError, ConnectionError):
        os._exit(KILLED)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
