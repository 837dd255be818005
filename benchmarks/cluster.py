"""Stages on a Ray cluster against stages on one machine: the price of a stage, and how it scales.

Stages that sleep need no core, so that hosts on one machine do not slow each other down: what is
measured is everything around the work. A simulation then says what larger graphs cost.
"""

import heapq
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measuring import Times, conditions, ratio_cell, table, timed
from benchmarks.pipeline import _environment, _template
from flows.dag import Dag
from flows.servers import started_prefect
from flows.sparse import SparseDag
from tests import bucket
from tests.project import Project
from tests.ray_cluster import running

SLEEP = 3.0  # seconds of a stage
STAGES = tuple(f"combine-edit_{number}-0" for number in range(10, 18))
PATCH = """

_combine = combine


def combine(*arguments: object, **keywords: object) -> None:
    import time

    time.sleep({seconds})
    _combine(*arguments, **keywords)
"""
# Seconds of the stages of the default experiment on one core, medians of two runs.
RECORDED = {
    "prepare": 2.4, "pretrain": 6.3, "head": 1.9, "fine_tune": 14.0, "extract": 0.8,
    "combine": 1.0, "search": 12.3, "evaluate": 4.7,
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """Where the stages run."""

    name: str
    slots: int
    ray: bool


WAYS = tuple(
    Way(f"{'Ray, hosts' if ray else 'one machine, slots'}: {slots}", slots, ray)
    for slots in (1, 2, 4)
    for ray in (False, True)
)
QUICK = WAYS[:2]


def measure(*, quick: bool) -> str:
    """Return the section of docs/benchmarks.md."""
    load = os.getloadavg()[0]
    ways, names = (QUICK, STAGES[:2]) if quick else (WAYS, STAGES)
    with tempfile.TemporaryDirectory(prefix="tv-") as place:
        directory = Path(place)
        template = _prepared(directory)
        with (
            started_prefect(directory / "prefect", ui=False) as server,
            bucket.running(directory) as store,
        ):
            os.environ.update(store.environment)
            seconds: dict[str, tuple[float, float]] = {}
            for way in ways:
                with _environment_of(way, directory, store) as more:
                    environment = {**server.environment, **more}
                    seconds[way.name] = tuple(  # type: ignore[assignment]
                        _timed(directory, template, store, way, environment, some)
                        for some in (names[:1], names)
                    )
            with chdir(directory / "checkout"):
                driver = _books(directory / "checkout", names)
    return _section(load, ways, len(names), seconds, driver)


def _books(root: Path, names: tuple[str, ...]) -> float:
    """Return the seconds of one core that the books of a stage cost the driver."""
    addresses = [f"edits/dvc.yaml:{name}" for name in names]
    entries = Dag(root).entries()
    (root / "edits/dvc.lock").unlink()
    shutil.rmtree(root / ".dvc/cache/runs")
    dag, known = SparseDag(root), set[str]()
    dag.upload(addresses[0], known)

    started = time.process_time()
    for address in addresses:
        assert dag.begin(address) == "run"
        dag.upload(address, known)
        dag.adopt(address, entries[address], {})
        dag.commit(address)
    return (time.process_time() - started) / len(addresses)


def _prepared(directory: Path) -> Path:
    """Return a checkout in which everything but the stages that are timed has run."""
    template = _template(directory / "template")
    path = template / "tasks/combine.py"
    path.write_text(path.read_text() + PATCH.format(seconds=SLEEP))
    project = Project(template, {})
    done = project.taskvec("run", "extract@faces-0")
    assert done.code == 0, done.err
    return template


@contextmanager
def _environment_of(way: Way, directory: Path, store: bucket.Store) -> Iterator[dict[str, str]]:
    """Yield what `taskvec run` needs to run in a way; a cluster is up meanwhile."""
    if not way.ray:
        yield {}
        return
    home = directory / f"ray-{way.slots}"
    with running(home, way.slots, store.environment) as cluster:
        yield {**cluster.environment, **store.environment}
    shutil.rmtree(home)


def _timed(
    directory: Path,
    template: Path,
    store: bucket.Store,
    way: Way,
    environment: Mapping[str, str],
    names: tuple[str, ...],
) -> float:
    """Return the seconds of a run of some stages in a fresh copy of the checkout."""
    root = directory / "checkout"
    shutil.rmtree(root, ignore_errors=True)
    subprocess.run(["cp", "-a", str(template), str(root)], check=True)
    project = Project(root, dict(environment))
    if way.ray:
        store.configure(root, f"{way.slots}-{len(names)}")
        assert project.command("dvc", "push", "-q").code == 0
    command = [sys.executable, "-m", "flows.cli", "run", "--slots", str(way.slots), *names]

    def run() -> None:
        done = subprocess.run(
            command, cwd=root, env=_environment(project), capture_output=True, text=True
        )
        assert done.returncode == 0 and f"{len(names)} run" in done.stderr, done.stderr

    return timed(run)


def _section(
    load: float,
    ways: tuple[Way, ...],
    stages: int,
    seconds: Mapping[str, tuple[float, float]],
    driver: float,
) -> str:
    rows = []
    for way in ways:
        one, all_of_them = seconds[way.name]
        local = seconds[way.name if not way.ray else _beside(way)]
        rounds = -(-stages // way.slots) - 1
        each = (all_of_them - one) / rounds - SLEEP if rounds else 0.0
        rows.append(
            [
                way.name, f"{one:.1f}", f"{all_of_them:.1f}",
                ratio_cell(Times((all_of_them,)), Times((local[1],))), f"{each:.2f}",
            ]
        )  # fmt: skip
    whole = len(ways) == len(WAYS)
    parts = [
        "## Stages on a cluster",
        conditions(load, ("ray", "dvc", "prefect")),
        table(
            [
                "where",
                "1 stage, s",
                f"{stages} stages, s",
                "times one machine",
                "s beside the work",
            ],
            rows,
        ),
        f"Every stage sleeps {SLEEP:g} s and then combines one vector. Wall times of `taskvec "
        "run`, one way after the other, with a Prefect server that runs already; hosts have "
        "directories of their own on this machine and exchange files through an S3 server on it. "
        "*Beside the work* is what a further stage takes longer than its sleep, where stages "
        "follow each other in one slot. One stage includes the start: with Ray that of the "
        "driver's connection and of the host's checkout, graph and fork server. The other hosts "
        "start side by side with the further stages, and each takes seconds of a core for that: "
        "where there are more hosts than cores, it is most of what is beside the work.",
    ]
    if whole:
        host = _beside_work(seconds, WAYS[1], stages)
        parts += ["### Larger graphs", *_simulated(driver, max(0.0, host))]
    return "\n\n".join(parts)


def _beside(way: Way) -> str:
    return next(other.name for other in WAYS if other.slots == way.slots and not other.ray)


def _beside_work(seconds: Mapping[str, tuple[float, float]], way: Way, stages: int) -> float:
    one, several = seconds[way.name]
    return (several - one) / (stages - 1) - SLEEP


# The simulation


def _simulated(driver: float, host: float) -> list[str]:
    """Return a table and words: what graphs of many stages take on many slots."""
    rows = []
    for tasks, edits in ((7, 8), (20, 300), (20, 10_000)):
        graph = stages(tasks, edits)
        work = sum(seconds for seconds, _ in graph.values())
        row = [f"{len(graph):,}", f"{edits:,}", f"{work / 3600:.2f}"]
        for slots in (1, 4, 16, 100):
            taken = makespan(graph, slots, driver, host)
            row.append(f"{taken / 3600:.2f} ({work / taken / slots:.0%})")
        rows.append(row)
    return [
        table(["stages", "edits", "work, h", *(f"{n} slots, h" for n in (1, 4, 16, 100))], rows),
        "A simulation: every stage takes what it took in the default experiment on one core, "
        f"plus {host:.2f} s on its host (measured above), and {driver:.2f} s of the driver "
        "(measured, of one core), which keeps the books of one stage after the other; a slot "
        "takes the first stage that can run. In "
        "brackets: the share of the slots' time that is work.",
    ]


def stages(tasks: int, edits: int) -> dict[str, tuple[float, list[str]]]:
    """Return a graph: stage -> its seconds and the stages before it."""
    found: dict[str, tuple[float, list[str]]] = {}
    for task in range(tasks):
        found[f"prepare-{task}"] = (RECORDED["prepare"], [])
    found["pretrain"] = (RECORDED["pretrain"], [f"prepare-{task}" for task in range(tasks)])
    for task in range(tasks):
        found[f"head-{task}"] = (RECORDED["head"], [f"prepare-{task}", "pretrain"])
        found[f"fine_tune-{task}"] = (RECORDED["fine_tune"], [f"head-{task}"])
        found[f"extract-{task}"] = (RECORDED["extract"], [f"fine_tune-{task}"])
        found[f"evaluate-{task}"] = (RECORDED["evaluate"], [f"fine_tune-{task}"])
    for edit in range(edits):
        task = edit % tasks
        found[f"combine-e{edit}"] = (RECORDED["combine"], [f"extract-{task}"])
        before = [f"combine-e{edit}", f"evaluate-{task}"]
        found[f"search-e{edit}"] = (RECORDED["search"], before)
        found[f"evaluate-e{edit}"] = (RECORDED["evaluate"], [f"search-e{edit}"])
    return found


def makespan(
    graph: Mapping[str, tuple[float, list[str]]], slots: int, driver: float, host: float
) -> float:
    """Return the seconds until every stage is done.

    Args:
        graph: of `stages`.
        slots: stages at once.
        driver: seconds of the one driver for every stage.
        host: seconds of a slot for every stage, beside its own.
    """
    order = {name: place for place, name in enumerate(graph)}
    waits = {name: len(before) for name, (_, before) in graph.items()}
    after: dict[str, list[str]] = {name: [] for name in graph}
    for name, (_, before) in graph.items():
        for other in before:
            after[other].append(name)
    ready = [order[name] for name, number in waits.items() if not number]
    heapq.heapify(ready)
    names = list(graph)
    running_: list[tuple[float, int]] = []
    now = books = 0.0
    while ready or running_:
        while ready and len(running_) < slots:
            place = heapq.heappop(ready)
            books = max(books, now) + driver  # one stage after the other
            heapq.heappush(running_, (books + graph[names[place]][0] + host, place))
        now, place = heapq.heappop(running_)
        for name in after[names[place]]:
            waits[name] -= 1
            if not waits[name]:
                heapq.heappush(ready, order[name])
    return max(now, books)
