"""The Prefect flow: one Prefect task a stage that may have to run, edges as in DVC's graph.

The flow has no list of stages. It reads the graph (flows/dag.py), runs stale stages in worker
processes (flows/workers.py) as soon as their upstream is done, and records what happened
(flows/recording.py). DVC is the only cache: Prefect's is off, and only names travel between tasks.
"""

import asyncio
import contextvars
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows import assets, crashed, ending, runner
from flows.dag import Dag
from flows.nodes import Listener, Node, Outcome
from flows.recording import StageRecord, Tracker
from flows.redaction import reason
from flows.servers import Prefect, mlflow_url, running_prefect, started_prefect
from flows.slots import Slots
from flows.usage import Usage
from flows.workers import StageCrashed, StageFailed, Workers
from tasks.artifacts import Artifacts
from tasks.stages import Progress
from taskvec.errors import Interrupted, ServiceUnreachable, TaskvecError

RETRIES = 1
PROGRESS_SECONDS = 0.5  # at most one metric a stage in this time; the last step always
# What fails is told by the flow itself, once.
QUIET = {"PREFECT_LOGGING_LEVEL": "CRITICAL", "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL"}
BEGIN_SECONDS = 20.0  # that Prefect may take to begin a flow run
END_SECONDS = 10.0  # that it may take to end one: by then the work is done
SLOW_SECONDS = 60.0  # that it may take more, if it lives
STOP_SECONDS = 1.0  # that it may take for both after Ctrl-C, each


@dataclass
class Run:
    """One execution of the flow: everything its tasks share. Never crosses a process."""

    root: Path
    dag: Dag
    nodes: list[Node]
    workers: Workers
    tracker: Tracker
    listener: Listener
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    asked: float = float("inf")  # when Prefect was asked to begin, by the monotonic clock
    begun: threading.Event = field(default_factory=threading.Event)
    settled: threading.Event = field(default_factory=threading.Event)  # every stage has an outcome


def run_flow(
    root: Path, dag: Dag, nodes: list[Node], slots: Slots, listener: Listener
) -> list[Outcome]:
    """Bring the stages up to date; return what became of each, in the order of the plan.

    Args:
        root: the checkout.
        dag: its graph.
        nodes: `Dag.plan`; those with reasons are run.
        slots: how many at once.
        listener: is told what happens.
    """
    stale = [node for node in nodes if node.reasons]
    tracker = Tracker(root, listener.note)
    workers = runner.workers(root, slots, dag, stale, listener.note)
    workers.start()
    with ExitStack() as stack:
        # The server needs seconds; so do the fork server and MLflow, at the same time.
        server = running_prefect(root)
        if server is None:
            server = stack.enter_context(started_prefect(root, ui=False))
            stack.callback(ending.give_up)  # once it is stopped, nobody can tell it anything
        use(server)
        run = Run(root, dag, stale, workers, tracker, listener)
        stack.enter_context(_stopping(workers))
        listener.stoppable(workers.stop)
        status = "FAILED"
        try:
            flow = _Flow(run)
            flow.work()
            failed = any(outcome.how in ("failed", "not run") for outcome in run.outcomes.values())
            status = "FAILED" if failed else "FINISHED"
        finally:
            tracker.close(status, hurry=bool(workers.stopped))
        flow.end()
    if workers.stopped:
        raise Interrupted(workers.stopped)
    return [run.outcomes[node.address] for node in stale if node.address in run.outcomes]


def use(server: Prefect) -> None:
    """Make a server the one of this process; Prefect reads it once, when it is imported."""
    os.environ.update({**QUIET, **server.environment})


class _Flow:
    """The flow, on a thread of its own: a Prefect server that is gone keeps nobody waiting.

    Prefect needs its server to begin and to end a flow run, and tries for minutes. What happens
    between, the stages, needs none.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._error: BaseException | None = None
        context = (
            contextvars.copy_context()
        )  # Prefect finds a flow that this one is a part of in it
        self._thread = threading.Thread(
            target=context.run, args=(self._body,), name="flow", daemon=True
        )

    def work(self) -> None:
        """Run the flow until every stage has an outcome, or a moment longer than it is stopped.

        Raises:
            ServiceUnreachable: the flow run does not begin.
        """
        run = self._run
        self._thread.start()
        while self._thread.is_alive() and not run.settled.wait(0.05) and not run.workers.stopped:
            late = not run.begun.is_set() and time.monotonic() > run.asked + BEGIN_SECONDS
            if late and not self._served():
                break
        if run.workers.stopped and run.begun.is_set():
            run.settled.wait(STOP_SECONDS)
        if run.settled.is_set() or run.workers.stopped:
            return
        if self._error is not None and (run.begun.is_set() or self._served()):
            raise self._error
        ending.give_up()
        why = reason(self._error) if isinstance(self._error, Exception) else "in time"
        raise ServiceUnreachable(
            f"the Prefect server at {os.environ['PREFECT_API_URL']} does not answer ({why}); "
            "start it again, or unset PREFECT_API_URL to use a server of this run's own"
        )

    def end(self) -> None:
        """Wait until Prefect has noted the end, but not for long."""
        stopped = self._run.workers.stopped
        self._thread.join(STOP_SECONDS if stopped else END_SECONDS)
        if self._thread.is_alive() and not stopped and self._served():
            self._thread.join(SLOW_SECONDS)
        if self._error is None and not self._thread.is_alive() and not stopped:
            return
        ending.give_up()
        if not stopped:
            self._run.listener.note(
                "the Prefect server does not answer; it will not show how this run ended"
            )

    def _served(self) -> bool:
        """Return whether the server lives, if slowly."""
        try:
            return running_prefect(self._run.root) is not None
        except ServiceUnreachable:
            return False

    def _body(self) -> None:
        try:
            asyncio.run(_with_prefect(self._run))
        except BaseException as error:
            self._error = error


@contextmanager
def _stopping(workers: Workers) -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP kill the running stages, so that the flow ends by itself."""
    before = {number: signal.getsignal(number) for number in ending.heard()}
    for number in before:
        signal.signal(number, lambda n, _: workers.stop(n))
    if ending.asked():  # and something swallowed it
        workers.stop(ending.asked())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _with_prefect(run: Run) -> None:
    """Import Prefect (only now: it takes a second) and run the flow."""
    from prefect import flow, task
    from prefect.artifacts import create_link_artifact, create_table_artifact
    from prefect.cache_policies import NO_CACHE
    from prefect.context import FlowRunContext, TaskRunContext
    from prefect.task_runners import ThreadPoolTaskRunner

    # Asked before MLflow is imported, which sets the variable that this looks at.
    mlflow = mlflow_url(run.root)

    def retry_crashes(task: Any, task_run: Any, state: Any) -> bool:
        error = state.result(raise_on_failure=False)
        return isinstance(error, StageCrashed)

    @task(
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=RETRIES,
        retry_condition_fn=retry_crashes,
        log_prints=False,
    )
    def stage(address: str) -> str:
        node = next(node for node in run.nodes if node.address == address)
        context = TaskRunContext.get()
        identifier = str(context.task_run.id) if context else ""
        last = context is None or context.task_run.run_count > RETRIES
        return perform(run, node, identifier, last_attempt=last)

    @flow(
        name="edit-models",
        task_runner=ThreadPoolTaskRunner(max_workers=run.workers.slots.total + 2),  # type: ignore[arg-type]
        persist_result=False,
        validate_parameters=False,
        log_prints=False,
    )
    async def edit_models(stages: list[str]) -> None:
        del stages  # shown by Prefect as the parameter of the run
        context = FlowRunContext.get()
        flow_run = context.flow_run if context else None
        run.begun.set()
        run.tracker.start(_run_tags(run, str(flow_run.id) if flow_run else ""))
        futures: dict[str, Any] = {}
        for node in run.nodes:
            upstream = [futures[address] for address in node.upstream if address in futures]
            named: Any = stage.with_options(task_run_name=node.name)
            futures[node.address] = named.submit(node.address, wait_for=upstream)
        await asyncio.to_thread(lambda: [future.wait() for future in futures.values()])
        for node in run.nodes:
            if node.address not in run.outcomes:
                run.outcomes[node.address] = Outcome(node.name, "not run", error="upstream failed")
        run.settled.set()
        with suppress(Exception):  # what Prefect shows of other runs must not stop this one
            await crashed.tell(Artifacts(run.root).top)
        await create_table_artifact(  # type: ignore[misc]
            key="stages", table=_table(run), description="What became of each stage"
        )
        if link := run.tracker.link(mlflow):
            await create_link_artifact(  # type: ignore[misc]
                key="mlflow", link=link, link_text="this run in MLflow"
            )
        failed = [o for o in run.outcomes.values() if o.how == "failed"]
        if failed or run.workers.stopped:
            raise StageFailed(f"{len(failed)} stages failed: {', '.join(o.name for o in failed)}")

    run.asked = time.monotonic()
    try:
        await edit_models([node.name for node in run.nodes])
    except StageFailed:
        return  # told through the outcomes


def perform(run: Run, node: Node, prefect_task_run: str, *, last_attempt: bool) -> str:
    """Bring one stage up to date; return how. The body of a Prefect task."""
    with run.workers.slots.take(node.gpus) as devices:
        if run.workers.stopped:
            raise StageFailed(f"{node.name} was not started")
        return _perform(run, node, devices, prefect_task_run, last_attempt=last_attempt)


def _perform(
    run: Run, node: Node, devices: list[str], prefect_task_run: str, *, last_attempt: bool
) -> str:
    started = time.monotonic()
    try:
        how = run.dag.begin(node.address)
    except Exception as error:
        code = error.exit_code if isinstance(error, TaskvecError) else 1
        _finish(run, node, Outcome(node.name, "failed", error=str(error), exit_code=code))
        raise
    if how == "skip":
        return _finish(run, node, Outcome(node.name, "unchanged"))
    because = "; ".join(reason.words for reason in node.reasons)
    label = "run" if how == "run" else "run-cache"
    run.tracker.begin(
        StageRecord(
            node.address, node.name, node.command, node.params, label, because, prefect_task_run
        )
    )
    run.listener.started(node)
    usage: Usage = {}
    try:
        if how == "run":
            with run.dag.guard(node.address, owner="taskvec run"):
                usage = run.workers.run(node, devices, _throttled(run, node))
        outs = run.dag.commit(node.address)
    except Exception as error:
        run.tracker.end(node.address, "FAILED", {}, {})
        if isinstance(error, StageCrashed) and not last_attempt:
            run.listener.note(f"{error}; trying again")
        else:
            code = error.exit_code if isinstance(error, TaskvecError) else 1
            seconds = time.monotonic() - started
            _finish(run, node, Outcome(node.name, "failed", seconds, str(error), code))
        raise
    inputs = run.dag.inputs(node.address)
    said = run.workers.described.pop(node.address, None)
    run.tracker.end(node.address, "FINISHED", outs, inputs, usage, said)
    with suppress(Exception):  # what Prefect shows of files must not stop the work
        place = run.root.relative_to(Artifacts(run.root).top.parent).as_posix()
        assets.emit(place, outs, inputs, label)
    return _finish(run, node, Outcome(node.name, label, time.monotonic() - started))


def _finish(run: Run, node: Node, outcome: Outcome) -> str:
    run.outcomes[node.address] = outcome
    run.listener.finished(node, outcome)
    return outcome.how


def _throttled(run: Run, node: Node) -> Callable[[Progress], None]:
    """Return what takes a stage's progress: the terminal gets all of it, MLflow a sample."""
    last = 0.0

    def emit(progress: Progress) -> None:
        nonlocal last
        run.listener.progress(node, progress)
        now = time.monotonic()
        if now - last < PROGRESS_SECONDS and progress["step"] < progress["steps"]:
            return
        last = now
        metrics = {name: v for name, v in progress.items() if name not in ("step", "steps")}
        if metrics:
            run.tracker.progress(node.address, int(progress["step"]), metrics)

    return emit


def _table(run: Run) -> list[list[str]]:
    rows = [["stage", "outcome", "seconds", "why"]]
    for node in run.nodes:
        outcome = run.outcomes[node.address]
        why = outcome.error or "; ".join(reason.words for reason in node.reasons)
        rows.append([node.name, outcome.how, f"{outcome.seconds:.1f}", why])
    return rows


def _run_tags(run: Run, flow_run: str) -> dict[str, str]:
    """Return the tags of the parent MLflow run that only the flow knows."""
    return {"name": f"taskvec run ({len(run.nodes)} stages)", "prefect.flow_run": flow_run}
