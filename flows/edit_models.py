"""The Prefect flow: one Prefect task a stage that may have to run, edges as in DVC's graph.

The flow has no list of stages. It reads the graph (flows/dag.py), runs stale stages in worker
processes (flows/workers.py) as soon as their upstream is done, and records what happened
(flows/recording.py). DVC is the only cache: Prefect's is off, and only names travel between tasks.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows import assets, runner
from flows.dag import Dag, Node
from flows.recording import StageRecord, Tracker
from flows.servers import mlflow_url, running_prefect, started_prefect
from flows.workers import Slots, StageCrashed, StageFailed, Workers
from tasks.artifacts import Artifacts
from tasks.stages import Progress
from taskvec.errors import Interrupted, TaskvecError

RETRIES = 1
FLUSH_SECONDS = 1.0
PROGRESS_SECONDS = 0.5  # at most one metric a stage in this time; the last step always


@dataclass
class Outcome:
    """What became of one stage.

    Attributes:
        how: run, run-cache, unchanged, failed or "not run".
        seconds: wall time, for people; never part of an artifact.
        error: the failure in words.
        exit_code: of the failure.
    """

    name: str
    how: str
    seconds: float = 0.0
    error: str = ""
    exit_code: int = 0


@dataclass
class Listener:
    """Whom the flow tells what happens; both may be called from any thread."""

    started: Callable[[Node], None] = lambda node: None
    progress: Callable[[Node, Progress], None] = lambda node, progress: None
    finished: Callable[[Node, Outcome], None] = lambda node, outcome: None
    note: Callable[[str], None] = lambda text: None


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
    workers = runner.workers(root, slots, dag, stale, listener.note)
    workers.start()
    with ExitStack() as stack:
        # The server needs seconds; so do the fork server and MLflow, at the same time.
        server = running_prefect(root) or stack.enter_context(started_prefect(root, ui=False))
        os.environ.update({"PREFECT_LOGGING_LEVEL": "CRITICAL", **server.environment})
        tracker = Tracker(root, listener.note)
        run = Run(root, dag, stale, workers, tracker, listener)
        stack.enter_context(_stopping(workers))
        status = "FAILED"
        try:
            asyncio.run(_with_prefect(run))
            failed = any(outcome.how in ("failed", "not run") for outcome in run.outcomes.values())
            status = "FAILED" if failed else "FINISHED"
        finally:
            dag.flush()
            tracker.close(status)
    if workers.stopped:
        raise Interrupted(workers.stopped)
    return [run.outcomes[node.address] for node in stale if node.address in run.outcomes]


@contextmanager
def _stopping(workers: Workers) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM kill the running stages, so that the flow ends by itself."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda n, _: workers.stop(n)) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
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
    try:
        if how == "run":
            with run.dag.guard(node.address, owner="taskvec run"):
                run.workers.run(node, devices, _throttled(run, node))
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
    run.dag.flush(at_most_every=FLUSH_SECONDS)
    inputs = run.dag.inputs(node.address)
    said = run.workers.described.pop(node.address, None)
    run.tracker.end(node.address, "FINISHED", outs, inputs, said)
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
