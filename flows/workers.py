"""Slots, and a process for every running stage.

Stages run in children of a fork server that has torch and open_clip imported: 40 ms a stage
instead of seconds. A child sends its progress through a pipe, is killed at its timeout, and dies
with the driver.

A stage that remembers what it computes (`tasks.stages.ASSISTED`) gets assistants while slots are
idle: processes that do the same work from the other end and leave it in the memory. They decide
nothing, so that the result is the same with any number of them, and end as soon as anybody waits.
"""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any

from flows.dag import Node
from tasks.stages import ASSISTED, NAMES, Progress
from taskvec.errors import InvalidInput, TaskvecError, nearest

KILLED = 137  # what a shell reports for SIGKILL
TAIL = 15  # lines of a stage's own output that an error shows
# seconds: a stage is only assisted after this time, and idle slots are looked for so often
ASSIST_AFTER, ASSIST_EVERY = 3.0, 0.25


class StageFailed(TaskvecError):
    """A stage raised an error; trying again would not help."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StageCrashed(TaskvecError):
    """A stage's process died or was killed at its timeout; it may be tried again."""


class Slots:
    """How many stages run at once: one a GPU, and some on the CPU.

    A stage that wants GPUs takes that many devices where there are any; everything else, and
    everything on a machine without GPU, takes a CPU slot.
    """

    def __init__(self, cpus: int, gpus: list[str]) -> None:
        self._cpus = cpus
        self._devices = list(gpus)
        self._gpus = len(gpus)
        self._waiting = 0
        self._changed = threading.Condition()

    @property
    def total(self) -> int:
        """The largest number of stages that can run at once."""
        return self._cpus + self._gpus

    @contextmanager
    def take(self, gpus: int) -> Iterator[list[str]]:
        """Wait for a slot; yield the devices that belong to it, none for a CPU slot."""
        if gpus > self._gpus > 0:
            raise InvalidInput(f"a stage wants {gpus} GPUs, there are {self._gpus}; see meta.gpu")
        wanted = gpus if self._gpus else 0
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: self._free(wanted))
            self._waiting -= 1
            devices = self._grab(wanted)
        try:
            yield devices
        finally:
            self._give(devices)

    @contextmanager
    def spare(self, gpus: int) -> Iterator[list[str] | None]:
        """Yield the devices of a slot that nobody wants now, or None; never wait."""
        wanted = min(1, gpus) if self._gpus else 0
        with self._changed:
            devices = self._grab(wanted) if self._free(wanted) and not self._waiting else None
        try:
            yield devices
        finally:
            if devices is not None:
                self._give(devices)

    @property
    def wanted(self) -> bool:
        """Whether a stage waits for a slot."""
        return self._waiting > 0

    def _free(self, gpus: int) -> bool:
        return len(self._devices) >= gpus if gpus else self._cpus > 0

    def _grab(self, gpus: int) -> list[str]:
        devices, self._devices = self._devices[:gpus], self._devices[gpus:]
        self._cpus -= not gpus
        return devices

    def _give(self, devices: list[str]) -> None:
        with self._changed:
            self._devices += devices
            self._cpus += not devices
            self._changed.notify_all()


def find_slots(cpus: int | None = None) -> Slots:
    """Return this machine's slots: its visible GPUs, and `cpus` or one a core."""
    return Slots(cpus or len(os.sched_getaffinity(0)), _gpus())


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device for device in visible.split(",") if device not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return found.stdout.split() if found.returncode == 0 else []


class Workers:
    """Runs stages in child processes."""

    def __init__(self, root: Path, slots: Slots) -> None:
        self._root = root
        self.slots = slots
        self._logs = root / ".taskvec" / "logs"
        self._context = multiprocessing.get_context("forkserver")
        self._starting = threading.Lock()
        self._running: set[Any] = set()
        self.stopped = 0  # the signal that stopped the workers
        # address -> what a host says of the outputs of a stage, see `flows.recording.described`
        self.described: dict[str, dict[str, Any]] = {}

    def start(self) -> None:
        """Start the fork server; it imports while the caller goes on."""
        from multiprocessing import forkserver

        # One thread a process, also for libraries that read this when they are imported.
        os.environ["OMP_NUM_THREADS"] = "1"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._context.set_forkserver_preload(["flows.warm"])
        with _without_main():
            forkserver.ensure_running()

    def stop(self, signal_number: int) -> None:
        """Kill all running stages and start no more."""
        self.stopped = signal_number
        for process in list(self._running):
            process.kill()

    def run(self, node: Node, devices: list[str], emit: Callable[[Progress], None]) -> None:
        """Run one stage on the devices of its slot and wait for it.

        Raises:
            StageFailed: the stage reported an error.
            StageCrashed: its process died, or it was killed after ``node.timeout`` seconds.
        """
        check_command(node)
        with self._started(node, devices) as (process, pipe, log), self._assisted(node):
            self._follow(node, process, pipe, emit, log)

    @contextmanager
    def _started(
        self, node: Node, devices: list[str], *, assist: bool = False
    ) -> Iterator[tuple[Any, Any, Path]]:
        """Start the process of a stage, or of an assistant; yield it, its pipe and its log."""
        log = self._logs / f"{node.name.replace('@', '-')}{'-assistant' * assist}.log"
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_work,
            args=(node.stage, node.item, str(self._root), theirs, devices, str(log), assist),
            daemon=True,
        )
        with self._starting, _without_main():
            process.start()
            self._running.add(process)
        theirs.close()
        if self.stopped:  # meanwhile
            process.kill()
        try:
            yield process, ours, log
        finally:
            if process.is_alive():
                process.kill()
            process.join()
            self._running.discard(process)
            ours.close()

    @contextmanager
    def _assisted(self, node: Node) -> Iterator[None]:
        """Let idle slots help a stage that remembers what it computes."""
        if node.stage not in ASSISTED:
            yield
            return
        ended = threading.Event()
        helper = threading.Thread(target=self._assist, args=(node, ended), daemon=True)
        helper.start()
        try:
            yield
        finally:
            ended.set()
            helper.join()

    def _assist(self, node: Node, ended: threading.Event) -> None:
        """Keep an assistant at work while its stage runs and nobody else wants the slot."""
        if ended.wait(ASSIST_AFTER):
            return
        while not ended.wait(ASSIST_EVERY):
            with self.slots.spare(node.gpus) as devices:
                if devices is None:
                    continue
                with self._started(node, devices, assist=True) as (process, _, _):
                    while process.is_alive() and not self.slots.wanted:
                        if ended.wait(ASSIST_EVERY):
                            return
                    if not process.is_alive():  # it found nothing more to do
                        return

    def _follow(
        self, node: Node, process: Any, pipe: Any, emit: Callable[[Progress], None], log: Path
    ) -> None:
        deadline = time.monotonic() + node.timeout
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                process.kill()
                raise StageCrashed(
                    f"{node.name} ran longer than {node.timeout:.0f} s and was killed; "
                    "raise meta.timeout in dvc.yaml if it needs more"
                )
            if not connection.wait([pipe], timeout=left):
                continue
            try:
                kind, *content = pipe.recv()
            except EOFError:
                process.join()
                if self.stopped:
                    raise StageFailed(f"{node.name} was stopped") from None
                raise StageCrashed(
                    f"{node.name}: its process died with exit code {process.exitcode}{_tail(log)}"
                ) from None
            match kind:
                case "progress":
                    emit(content[0])
                case "done":
                    return
                case "error":
                    raise StageFailed(f"{node.name}: {content[0]}", content[1])
                case "crash":
                    raise StageFailed(f"{node.name} failed:\n{content[0]}")


def check_command(node: Node) -> None:
    """Raise InvalidInput unless a stage is one of tasks/."""
    words = node.command.split()
    if words[:3] != ["python", "-m", "tasks"] or len(words) not in (4, 5) or words[3] not in NAMES:
        raise InvalidInput(
            f"{node.name}: the command {node.command!r} is not `python -m tasks STAGE [ITEM]`; "
            f"{nearest(words[3] if len(words) > 3 else '', NAMES)}"
        )


def _work(
    stage: str, item: str, root: str, pipe: Any, devices: list[str], log: str, assist: bool
) -> None:
    """Do one stage, or assist it; the body of a child process."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides
    _redirect(log)
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    os.chdir(root)
    from tasks.__main__ import perform
    from taskvec import params

    def emit(progress: Progress) -> None:
        if not assist:
            pipe.send(("progress", progress))

    try:
        loaded = params.load(Path("params.yaml"))
        perform(stage, item, loaded, Path(root), emit, assist=assist)
    except TaskvecError as error:
        pipe.send(("error", str(error), error.exit_code))
    except Exception:
        pipe.send(("crash", traceback.format_exc()))
    else:
        pipe.send(("done",))


def _die_with_parent() -> None:
    """End this process when the driver is gone, or it would write outputs that nobody expects.

    The kernel's own signal on a parent's death does not help: the parent is the fork server.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(KILLED)


def _redirect(log: str) -> None:
    sys.stdout.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-TAIL:] if log.is_file() else []
    return "".join(f"\n  {line}" for line in lines)


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep a child from importing the driver's main module again: it needs nothing of it."""
    main = sys.modules["__main__"]
    saved = {name: getattr(main, name, None) for name in ("__file__", "__spec__")}
    for name in saved:
        setattr(main, name, None)
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(main, name, value)
