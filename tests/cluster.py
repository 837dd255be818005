"""`python -m tests.cluster [--demo] [SCENARIO ...]`: an experiment on a cluster in trouble.

Hosts of a Ray cluster have directories of their own and nothing in common but an S3 store; the
driver records in PostgreSQL, through a Prefect server and an MLflow server. Where this may make
network namespaces (as root), every host is one, and a cut cable is a cut cable; elsewhere all are
on loopback, and a host whose network is cut is stopped instead. Prints a table; exit code 1 if any
output differs from that of a run on one machine. Nothing is left behind. The experiment is the
one of the tests, or with --demo that of the repository, which takes several times as long.
"""

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import postgres
from benchmarks.measuring import table
from flows.outbox import executions
from flows.servers import free_port, spawn, started_prefect, stop, wait_for
from flows.tracking import server_command
from tests import bucket
from tests.project import ROOT, Project, result
from tests.ray_cluster import Node, RayCluster, loopback

HOSTS = 3
CUT_SECONDS = 20
LONG = {False: "fine_tune@digits-0", True: "fine_tune@mnist-0"}  # while it runs, things happen
INSIDE = "TASKVEC_CLUSTER_NETWORK"  # tells this program that it runs in the driver's namespace
NETWORK = "10.77.0"
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0"}  # else Ray's own


@dataclass
class Network:
    """Where the hosts are, and how one is cut off."""

    name: str  # of the namespaces; empty: loopback

    @property
    def addresses(self) -> Iterator[str]:
        return (f"{NETWORK}.{number}" for number in range(1, 99)) if self.name else loopback()

    @property
    def prefixes(self) -> dict[str, list[str]]:
        """What a command on each host begins with; the driver's host is where this runs."""
        return {
            f"{NETWORK}.{number}": ["ip", "netns", "exec", f"{self.name}{number}"]
            for number in range(2, HOSTS + 3)
            if self.name
        }

    def cut(self, node: Node) -> str:
        """Cut a host off for a while."""
        if not self.name:
            node.signal(signal.SIGSTOP)
            time.sleep(CUT_SECONDS)
            node.signal(signal.SIGCONT)
            return f"its processes stopped for {CUT_SECONDS} s"
        port = f"p{node.address.rpartition('.')[2]}"
        for state in ("down", "up"):
            _ip("-n", f"{self.name}0", "link", "set", port, state)
            time.sleep(CUT_SECONDS if state == "down" else 0)
        return f"its cable out for {CUT_SECONDS} s"


@dataclass
class Place:
    """Everything that runs beside the hosts."""

    directory: Path
    network: Network
    cluster: RayCluster
    database: postgres.Server | None
    environment: dict[str, str]
    store: bucket.Store
    long: str  # the stage while which things happen
    expected: dict[str, str] = field(default_factory=dict)
    stages: set[str] = field(default_factory=set)  # those of the run on one machine


Trouble = Callable[[Place, Node], str]  # what happens while a host fine-tunes; in words


def kill(place: Place, node: Node) -> str:
    """Cut the power of the host, then add another one."""
    node.kill()
    place.cluster.add(1, place.store.environment)
    return "its power cut"


def cut(place: Place, node: Node) -> str:
    """Cut the network of the host."""
    return place.network.cut(node)


def restart(place: Place, _: Node) -> str:
    """Restart the database."""
    if place.database is None:
        return "the package postgresql is not installed: nothing happened"
    place.database.restart()
    return "PostgreSQL restarted"


SCENARIOS: dict[str, Trouble | None] = {
    "nothing happens": None,
    "a host dies": kill,
    "a host is cut off": cut,
    "the database restarts": restart,
}


def main() -> int:
    """Make the network, run the scenarios in it, take everything down."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # take all down
    parser = argparse.ArgumentParser(prog="python -m tests.cluster")
    parser.add_argument("scenarios", nargs="*", help=f"of {', '.join(map(repr, SCENARIOS))}")
    parser.add_argument("--demo", action="store_true", help="the repository's own experiment")
    asked = parser.parse_args()
    if unknown := set(asked.scenarios) - SCENARIOS.keys():
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    name = os.environ.get(INSIDE)
    if name is not None:
        return scenarios(Network(name), asked.scenarios or list(SCENARIOS), demo=asked.demo)
    with namespaces() as made:
        command = [sys.executable, "-m", "tests.cluster", *sys.argv[1:]]
        prefix = ["ip", "netns", "exec", f"{made}1"] if made else []
        process = subprocess.Popen([*prefix, *command], env={**os.environ, INSIDE: made})
        try:
            return process.wait()
        finally:
            process.terminate()
            process.wait()


def scenarios(network: Network, names: list[str], *, demo: bool) -> int:
    """Run scenarios; return the exit code."""
    with (
        tempfile.TemporaryDirectory(prefix="tv-") as directory,
        running(Path(directory), network, LONG[demo]) as place,
    ):
        template = _template(place.directory / "template", demo=demo)
        rows = [_row("one machine, no cluster", *_run(place, template, "local", None))]
        for scenario in names if place.expected else []:
            rows.append(_row(scenario, *_run(place, template, scenario, SCENARIOS[scenario])))
        said = "network namespaces" if network.name else "loopback"
    _say(f"\n{HOSTS} hosts with one slot each, {said}:\n")
    _say(table(["what happens", "seconds", "stages run", "differences", "notes"], rows))
    bad = [row for row in rows if row[3] != "0"]
    _say(f"\n{len(rows)} runs, {len(bad)} that differ")
    return 1 if bad or len(rows) <= len(names) else 0


def _template(root: Path, *, demo: bool) -> Project:
    """Return a checkout with the experiment, in which nothing has run."""
    if demo:
        project = Project.create(root, {}, (ROOT / "params.yaml").read_text())
    else:
        project = Project.create(root, {})
        project.replace("params.yaml", "steps: 6,", "steps: 60,")
    assert project.command(sys.executable, "-m", "flows.plan").code == 0
    _commit(project)
    return project


def _row(scenario: str, seconds: float, stages: int, differences: int, notes: str) -> list[str]:
    row = [scenario, f"{seconds:.0f}", str(stages), str(differences), notes]
    _say("  ".join(row))
    return row


def _run(
    place: Place, template: Project, scenario: str, trouble: Trouble | None
) -> tuple[float, int, int, str]:
    """Run the experiment once; return seconds, stages run, differences and notes."""
    project = template.copy(place.directory / scenario.replace(" ", "-"))
    project.server = dict(place.environment)
    if scenario != "local":
        project.server |= place.cluster.environment | place.store.environment
        place.store.configure(project.root, scenario.replace(" ", "-"))
    notes = []
    started = time.monotonic()
    process = project.start("run")
    if trouble:
        node = _busy(place, process)
        notes.append(trouble(place, node) if node else f"{place.long} was not seen on a host")
    _, err = process.communicate(timeout=3600)
    seconds = time.monotonic() - started
    done = result(process.returncode, "", err)
    if process.returncode:
        notes.append(f"exit code {process.returncode}: {err[-2000:]}")
    lost = [line.strip() for line in err.splitlines() if "lost its host" in line]
    notes += [f"stages that started again elsewhere: {len(lost)}"] * bool(lost)
    differences = _differences(place, project, pull=scenario != "local")
    finished = {e["name"] for e in executions(project.root) if e["status"] == "FINISHED"}
    place.stages = place.stages or finished
    differences += [f"no record of {name}" for name in sorted(place.stages - finished)]
    if "MLflow does not answer" in err:
        notes.append("MLflow gets the record with the next run")
    return seconds, len(done.stages("run")), len(differences), "; ".join([*notes, *differences[:3]])


def _busy(place: Place, process: "subprocess.Popen[str]") -> Node | None:
    """Wait until a host does the long stage; return it, or None if the run ended before."""
    log = f"checkouts/*/*/.taskvec/logs/{place.long.replace('@', '-')}.log"
    since = time.time()
    while process.poll() is None:
        for node in place.cluster.nodes[1:]:
            if any(path.stat().st_mtime > since for path in node.home.glob(log)):
                time.sleep(1)  # into the middle
                return node
        time.sleep(0.02)
    return None


def _differences(place: Place, project: Project, *, pull: bool) -> list[str]:
    """Compare lock files and every file with those of the first run."""
    if pull:
        pulled = project.command("dvc", "pull", "-q", "dvc.yaml", "edits/dvc.yaml")
        if pulled.code:
            return [f"dvc pull: {pulled.err[-500:]}"]
    paths = [project.root / "dvc.lock", project.root / "edits/dvc.lock"]
    paths += [p for p in (project.root / "data").rglob("*") if p.is_file()]
    found = {
        str(p.relative_to(project.root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in paths
        if p.is_file()
    }
    if not pull:
        place.expected = found
        return []
    names = sorted(place.expected.keys() | found.keys())
    return [name for name in names if place.expected.get(name) != found.get(name)]


def _commit(project: Project) -> None:
    name = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    assert project.command("git", "add", "-A").code == 0
    assert (
        project.command("git", *name, "commit", "-q", "--allow-empty", "-m", "rendered").code == 0
    )


@contextmanager
def running(directory: Path, network: Network, long: str) -> Iterator[Place]:
    """Start database, servers, store and hosts; end them all."""
    with ExitStack() as stack:
        database = stack.enter_context(postgres.server())
        environment = {}
        mlflow = server_command(directory, port := free_port())
        if database:
            for name in ("prefect", "mlflow"):
                database.create(name)
            os.environ["PREFECT_API_DATABASE_CONNECTION_URL"] = database.uri("asyncpg", "prefect")
            place = mlflow.index("--backend-store-uri") + 1
            mlflow[place] = database.uri(database="mlflow")
        prefect = stack.enter_context(started_prefect(directory / "prefect", ui=False))
        os.environ.pop("PREFECT_API_DATABASE_CONNECTION_URL", None)
        log = directory / "mlflow.log"
        process = spawn(mlflow, log, {"MLFLOW_DISABLE_TELEMETRY": "true"})
        stack.callback(stop, process)
        wait_for(f"http://127.0.0.1:{port}/health", process, log, "the MLflow server")
        environment = {**prefect.environment, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
        address = f"{NETWORK}.1" if network.name else "127.0.0.1"
        store = stack.enter_context(bucket.running(directory, address))
        cluster = RayCluster(directory / "c", network.addresses, network.prefixes, SETTINGS)
        stack.callback(cluster.stop)
        cluster.add(HOSTS, store.environment)
        yield Place(directory, network, cluster, database, environment, store, long)


@contextmanager
def namespaces() -> Iterator[str]:
    """Make a switch (0), the driver's host (1) and further ones; yield what their names begin with.

    Yields an empty string where that is not allowed.
    """
    name = f"tv{os.getpid()}-"
    if os.geteuid() != 0 or not shutil.which("ip"):
        yield ""
        return
    made = []
    try:
        for number in range(HOSTS + 3):
            _ip("netns", "add", f"{name}{number}")
            made.append(f"{name}{number}")
            _ip("-n", made[-1], "link", "set", "lo", "up")
        _ip("-n", f"{name}0", "link", "add", "switch", "type", "bridge")
        _ip("-n", f"{name}0", "link", "set", "switch", "up")
        for number in range(1, HOSTS + 3):
            own, port = f"{name}{number}", f"p{number}"
            _ip("link", "add", "eth0", "netns", own, "type", "veth",
                "peer", "name", port, "netns", f"{name}0")  # fmt: skip
            _ip("-n", f"{name}0", "link", "set", port, "master", "switch", "up")
            _ip("-n", own, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            _ip("-n", own, "link", "set", "eth0", "up")
            _ip("-n", own, "route", "add", "default", "dev", "eth0")
        yield name
    except subprocess.CalledProcessError as error:
        if made:
            raise
        _say(f"no network namespaces here ({error.stderr.decode().strip()})")
        yield ""
    finally:
        for one in made:
            _ip("netns", "del", one)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


if __name__ == "__main__":
    sys.exit(main())
