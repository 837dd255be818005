"""A process for every running stage.

Stages run in children of a fork server that has torch and the model's library imported: 40 ms a
stage instead of seconds. A child sends its progress through a pipe, is killed at its timeout, and
dies with the driver.

The process of a search, an evaluation or a report (`RESIDENT`) stays for the next of them on its
device. A stage that remembers what it computes (`tasks.stages.ASSISTED`) gets assistants while
slots are idle: processes that do the same work from the other end and leave it in the memory. They
decide nothing, so that the result is the same with any number of them, and end as soon as anybody
waits.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from flows.nodes import Node
from flows.slots import Slots
from flows.usage import GpuSampler, Meter, Usage
from tasks.stages import ASSISTED, NAMES, TRAINING, Progress
from taskvec.errors import InvalidInput, TaskvecError, nearest

KILLED = 137  # what a shell reports for SIGKILL
TAIL = 15  # lines of a stage's own output that an error shows
# seconds: a stage is only assisted after this time, and idle slots are looked for so often
ASSIST_AFTER, ASSIST_EVERY = 3.0, 0.25
# Stages of a changed range: their process stays, with what a search keeps (tasks/kept.py).
RESIDENT = ("search", "evaluate", "report")
OURS = "TASKVEC_"  # variables that a stage sees as they are now, not as the fork server began


class StageFailed(TaskvecError):
    """A stage raised an error; trying again would not help."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StageCrashed(TaskvecError):
    """A stage's process died or was killed at its timeout; it may be tried again."""


@dataclass(frozen=True)
class Job:
    """What a child is asked to do. Everything in it can be pickled."""

    stage: str
    item: str
    root: str
    log: str
    environment: dict[str, str]
    assist: bool = False


class Child:
    """A process that does jobs one after the other on the same devices."""

    def __init__(self, context: Any, devices: list[str], *, hide: bool) -> None:
        """Start it.

        Args:
            context: of multiprocessing.
            devices: GPUs that it may use.
            hide: there are GPUs, and it may use no other.
        """
        self.devices = devices
        self.stages: set[str] = set()  # that it has done: what they need is imported and loaded
        self.finished = False  # its last job, in good order
        self.pipe, theirs = context.Pipe()
        visible = ",".join(devices) if devices or hide else None
        self.process = context.Process(target=_work, args=(theirs, visible), daemon=True)
        self.process.start()
        theirs.close()

    def end(self) -> None:
        """Kill it and wait for its end."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.pipe.close()


class Resident:
    """Children that wait for another job, by device; they live as long as this process."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._idle: list[tuple[float, Child]] = []

    def take(self, stage: str, devices: list[str]) -> Child | None:
        """Return one that waits on exactly these devices, if possible one that knows the stage."""
        with self._mutex:
            fit = [
                waiting
                for waiting in self._idle
                if waiting[1].devices == devices and waiting[1].process.is_alive()
            ]
            if not fit:
                return None
            # the last one of these, which has most in its memory
            knowing = [waiting for waiting in fit if stage in waiting[1].stages]
            chosen = (knowing or fit)[-1]
            self._idle.remove(chosen)
            return chosen[1]

    def keep(self, child: Child) -> None:
        """Let one wait."""
        child.finished = False
        with self._mutex:
            self._idle.append((time.monotonic(), child))

    def make_room(self, devices: list[str]) -> None:
        """End those that occupy memory of devices."""
        self._end(lambda since, child: bool(set(child.devices) & set(devices)))

    def retire(self, seconds: float) -> None:
        """End those that have waited for so long."""
        now = time.monotonic()
        self._end(lambda since, child: now - since >= seconds)

    def _end(self, wanted: Callable[[float, Child], bool]) -> None:
        with self._mutex:
            ended = [child for since, child in self._idle if wanted(since, child)]
            self._idle = [(s, child) for s, child in self._idle if child not in ended]
        for child in ended:
            child.end()


resident = Resident()  # of this process, as its fork server is


class Workers:
    """Runs stages in child processes."""

    def __init__(self, root: Path, slots: Slots, stages: Collection[str] = NAMES) -> None:
        """Prepare nothing yet.

        Args:
            root: the directory of params.yaml.
            slots: how many stages run at once, and on which devices.
            stages: those of `tasks.stages.NAMES` that may run.
        """
        self._root = root
        self.slots = slots
        self._stages = stages
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
        training = ["flows.warm_training"] if set(TRAINING) & set(self._stages) else []
        self._context.set_forkserver_preload(["flows.warm", *training, "flows.workers"])
        with without_main():
            forkserver.ensure_running()

    def stop(self, signal_number: int) -> None:
        """Kill all running stages and start no more."""
        self.stopped = signal_number
        for process in list(self._running):
            process.kill()

    def run(self, node: Node, devices: list[str], emit: Callable[[Progress], None]) -> Usage:
        """Run one stage on the devices of its slot and wait for it; return what it used.

        Raises:
            StageFailed: the stage reported an error.
            StageCrashed: its process died, or it was killed after ``node.timeout`` seconds.
        """
        check_command(node)
        with (
            GpuSampler(devices) as sampler,
            self._started(node, devices) as (child, log),
            self._assisted(node),
        ):
            used = self._follow(node, child, emit, log)
        return {**used, **sampler.usage}

    @contextmanager
    def _started(
        self, node: Node, devices: list[str], *, assist: bool = False
    ) -> Iterator[tuple[Child, Path]]:
        """Give a stage, or an assistant of it, to a child; yield the child and the log."""
        log = self._logs / f"{node.name.replace('@', '-')}{'-assistant' * assist}.log"
        environment = {k: v for k, v in os.environ.items() if k.startswith(OURS)}
        job = Job(node.stage, node.item, str(self._root), str(log), environment, assist)
        stays = node.stage in RESIDENT and not assist
        child = resident.take(node.stage, devices) if stays else None
        if child is None:
            resident.make_room(devices)
            with self._starting, without_main():
                child = Child(self._context, devices, hide=self.slots.gpus > 0)
        child.stages.add(node.stage)
        self._running.add(child.process)
        try:
            _give(child, job, node.name)
            if self.stopped:  # meanwhile
                child.process.kill()
            yield child, log
        finally:
            self._running.discard(child.process)
            if stays and child.finished and not self.stopped:
                resident.keep(child)
            else:
                child.end()

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
                with self._started(node, devices, assist=True) as (child, _):
                    while child.process.is_alive() and not self.slots.wanted:
                        if ended.wait(ASSIST_EVERY) or child.pipe.poll():
                            return  # the stage has ended, or nothing is left to do

    def _follow(
        self, node: Node, child: Child, emit: Callable[[Progress], None], log: Path
    ) -> Usage:
        deadline = time.monotonic() + node.timeout
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                child.process.kill()
                raise StageCrashed(
                    f"{node.name} ran longer than {node.timeout:.0f} s and was killed; "
                    "raise meta.timeout in dvc.yaml if it needs more"
                )
            if not connection.wait([child.pipe], timeout=left):
                continue
            try:
                kind, *content = child.pipe.recv()
            except (EOFError, ConnectionError):
                child.process.join()
                if self.stopped:
                    raise StageFailed(f"{node.name} was stopped") from None
                raise StageCrashed(
                    f"{node.name}: its process died with exit code {child.process.exitcode}"
                    f"{_tail(log)}"
                ) from None
            match kind:
                case "progress":
                    emit(content[0])
                case "done":
                    child.finished = True
                    return dict(content[0])
                case "error" if content[1] == KILLED:  # a process that it started was killed
                    raise StageCrashed(f"{node.name}: {content[0]}")
                case "error":
                    raise StageFailed(f"{node.name}: {content[0]}", content[1])
                case "crash":
                    raise StageFailed(f"{node.name} failed:\n{content[0]}")


def _give(child: Child, job: Job, name: str) -> None:
    try:
        child.pipe.send(job)
    except OSError:  # one that waited was killed meanwhile
        raise StageCrashed(f"{name}: its process died before it began") from None


def check_command(node: Node) -> None:
    """Raise InvalidInput unless a stage is one of tasks/."""
    words = node.command.split()
    if words[:3] != ["python", "-m", "tasks"] or len(words) not in (4, 5) or words[3] not in NAMES:
        raise InvalidInput(
            f"{node.name}: the command {node.command!r} is not `python -m tasks STAGE [ITEM]`; "
            f"{nearest(words[3] if len(words) > 3 else '', NAMES)}"
        )


def _work(pipe: Any, visible: str | None) -> None:
    """Do jobs until nobody is left to send one; the body of a child process."""
    threading.Thread(target=die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides
    # As in any other process. With the fork server's own method libraries make semaphores that
    # only an orderly end removes, and this process is ended by force.
    multiprocessing.set_start_method(None, force=True)
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(_done(job, pipe))


def _done(job: Job, pipe: Any) -> tuple[Any, ...]:
    """Do a job; return the last message about it."""
    redirect(job.log)
    for name in [name for name in os.environ if name.startswith(OURS)]:
        del os.environ[name]
    os.environ.update(job.environment)
    os.chdir(job.root)
    from tasks import kept
    from tasks.__main__ import perform
    from taskvec import params

    def emit(progress: Progress) -> None:
        if not job.assist:
            pipe.send(("progress", progress))

    meter = Meter()
    try:
        file = Path("params.yaml")
        loaded = kept.once(params.load, file, files=[Path(job.root, file)])
        perform(job.stage, job.item, loaded, Path(job.root), emit, assist=job.assist)
    except TaskvecError as error:
        return "error", str(error), error.exit_code
    except Exception:
        return "crash", traceback.format_exc()
    return "done", meter.read()


def die_with_parent() -> None:
    """End this process when the driver is gone, or it would write outputs that nobody expects.

    The kernel's own signal on a parent's death does not help: the parent is the fork server.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(KILLED)


def redirect(log: str) -> None:
    """Send what this process prints to a file, which is begun anew."""
    sys.stdout.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-TAIL:] if log.is_file() else []
    return "".join(f"\n  {line}" for line in lines)


@contextmanager
def without_main() -> Iterator[None]:
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
