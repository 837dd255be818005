"""Stages on the hosts of a Ray cluster, for the flow as if they ran here.

A stage becomes a task of Ray with the resources of its meta. Hosts share no files with the driver:
the code travels as a git commit through Ray's object store, files by digest through the DVC
remote, and the lock entry comes back to the driver, which alone writes lock files. What a host
does is in flows/host.py and flows/agent.py.
"""

import base64
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flows import host, snapshot
from flows.nodes import Node
from flows.redaction import reason, redacted
from flows.slots import Slots
from flows.sparse import SparseDag
from flows.usage import Usage
from flows.workers import ASSIST_AFTER, StageCrashed, StageFailed, Workers, check_command
from tasks.artifacts import Artifacts
from tasks.stages import ASSISTED, Progress
from taskvec.errors import InvalidInput, MissingDependency, ServiceUnreachable

ADDRESS = "TASKVEC_RAY_ADDRESS"
CONNECT_SECONDS = 5.0
HERE = ("prepare",)  # reads data that DVC does not version; meta.local says otherwise
LOSSES = 3  # hosts that a stage may lose before it counts as crashed
GIB = 1 << 30
MOST_ASSISTANTS = 16  # of one stage
NAMES = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}  # option -> resource of Ray
FEWEST, MOST = 16, 512  # stages that are handed to Ray at once


class AnyNumber(Slots):
    """Slots of a cluster: Ray decides what waits."""

    def __init__(self, total: int) -> None:
        super().__init__(total, [])

    @contextmanager
    def take(self, *_: object) -> Iterator[list[str]]:
        """Never wait; the devices are those that Ray chooses."""
        yield []


class RayWorkers(Workers):
    """Runs stages on the hosts of a Ray cluster, and those that must be here in child processes."""

    def __init__(
        self,
        root: Path,
        slots: Slots,
        dag: SparseDag,
        stale: list[Node],
        note: Callable[[str], None],
    ) -> None:
        """Take what `flows.runner.workers` is given; `start` connects."""
        super().__init__(root, slots, {node.stage for node in stale if _is_here(node)})
        self._here, self._dag, self._stale, self._note = slots, dag, stale, note
        self._known: set[str] = set()  # digests that the remote has
        self._streams: set[Any] = set()
        self._uploading = threading.Lock()
        self._gpus = 0.0
        self._waiting = 0  # stages that Ray has not placed yet
        self._assisted_now: set[str] = set()  # addresses
        self._exchange: Any = None

    def start(self) -> None:
        """Check the remote, connect to the cluster and give it the code.

        Raises:
            MissingDependency: ray is not installed.
            InvalidInput: there is no remote that verifies; no host can ever hold some stage.
            ServiceUnreachable: the remote or the cluster does not answer.
        """
        self._dag.remote.check()
        ray = _connected()
        hosts = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._gpus = max((item.get("GPU", 0.0) for item in hosts), default=0.0)
        remote = [node for node in self._stale if not _is_here(node)]
        for node in self._stale:
            check_command(node)
        for node in remote:
            self._check_fits(node, hosts)
        code = snapshot.take(Artifacts(self._root).top)
        self._check_sources(remote, code)
        self._pack = ray.put(code.pack)
        self._commit = code.commit
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(host)
        self._perform = ray.remote(host.perform)
        if any(node.stage in ASSISTED for node in remote):
            self._exchange = ray.remote(host.Exchange).options(num_cpus=0).remote()
        if len(remote) < len(self._stale):
            super().start()
        cpus = sum(item.get("CPU", 0.0) for item in hosts)
        self.slots = AnyNumber(int(min(MOST, max(FEWEST, 2 * cpus))))

    def stop(self, signal_number: int) -> None:
        """Kill all running stages, here and on the hosts, and start no more."""
        super().stop(signal_number)
        import ray

        for stream in list(self._streams):
            ray.cancel(stream, force=True)

    def run(self, node: Node, devices: list[str], emit: Callable[[Progress], None]) -> Usage:
        """Run one stage, wait for it and return what it used; errors as of `Workers.run`."""
        if _is_here(node):
            with self._here.take(node.gpus) as own:
                if self.stopped:
                    raise StageFailed(f"{node.name} was not started")
                return super().run(node, own, emit)
        with self._uploading:
            self._dag.upload(node.address, self._known)
        job = {
            "project": self._project(),
            "commit": self._commit,
            "root": str(self._root.relative_to(Artifacts(self._root).top)),
            "remote": self._dag.remote.name,
            "settings": self._dag.remote.settings,
            "address": node.address,
            "deps": self._dag.objects(node.address),
            "gpus": node.gpus if self._gpus else 0,
            "shared": node.stage in ASSISTED,
        }
        with self._helped(node, job):
            reply = self._performed(node, job, emit)
        files = {path: base64.b64decode(text) for path, text in reply["files"].items()}
        self._known |= {item["md5"] for item in reply["entry"]["outs"] if "md5" in item}
        self.described[node.address] = reply["described"]
        self._dag.adopt(node.address, reply["entry"], files)
        return dict(reply["usage"])

    def _performed(
        self, node: Node, job: host.Event, emit: Callable[[Progress], None]
    ) -> host.Event:
        """Have a host do a stage, another one if that is lost; return its last event."""
        from ray.exceptions import RayError, RayTaskError

        for loss in range(1, LOSSES + 1):
            try:
                event = self._followed(node, job, emit)
            except RayTaskError as error:
                raise StageFailed(
                    f"{node.name} failed on its host:\n{redacted(str(error))}"
                ) from None
            except RayError as error:
                if self.stopped:
                    raise StageFailed(f"{node.name} was stopped") from None
                words = f"{node.name} lost its host ({reason(error)})"
                if loss == LOSSES:
                    raise StageCrashed(f"{words}, {LOSSES} times in a row") from None
                self._note(f"{words}; it starts again on another one")
                continue
            match event["kind"]:
                case "done":
                    return event
                case "failed":
                    raise StageFailed(_named(node, event["message"]), event["code"])
                case _:
                    raise StageCrashed(_named(node, event["message"]))
        raise AssertionError

    def _followed(
        self, node: Node, job: host.Event, emit: Callable[[Progress], None]
    ) -> host.Event:
        """Submit a job, hand on its progress, return the event that ends it."""
        for address in list(self._assisted_now):  # a stage needs a slot more than assistants
            self._exchange.stop.remote(address)
        self._waiting += 1
        placed = False
        try:
            for event in self._events(node, job):
                if not placed:
                    self._waiting, placed = self._waiting - 1, True
                if event["kind"] not in ("began", "progress"):
                    return event
                if event["kind"] == "progress":
                    emit(event["progress"])
        finally:
            self._waiting -= not placed
        return {"kind": "died", "message": "its host ended without a word"}

    def _events(self, node: Node, job: host.Event) -> Iterator[host.Event]:
        """Submit a job; yield what is said of it."""
        import ray

        options = {"max_retries": 0, "num_returns": "streaming", "name": node.name}
        remote = self._perform.options(**options, **self._resources(node))
        stream = remote.remote(job, [self._pack], self._exchange if job["shared"] else None)
        self._streams.add(stream)
        try:
            if self.stopped:  # meanwhile
                ray.cancel(stream, force=True)
            for reference in stream:
                yield ray.get(reference)
        finally:
            self._streams.discard(stream)

    @contextmanager
    def _helped(self, node: Node, job: host.Event) -> Iterator[None]:
        """Let idle hosts help a stage that remembers what it computes."""
        if not job["shared"]:
            yield
            return
        ended = threading.Event()
        helper = threading.Thread(target=self._help, args=(node, job, ended), daemon=True)
        helper.start()
        try:
            yield
        finally:
            ended.set()
            self._exchange.stop.remote(node.address)
            helper.join()
            self._exchange.forget.remote(node.address)

    def _help(self, node: Node, job: host.Event, ended: threading.Event) -> None:
        """Give a stage assistants on all idle hosts, once, if nobody waits for them."""
        import ray
        from ray.exceptions import RayError

        while not ended.wait(ASSIST_AFTER):
            if self._waiting or self.stopped:
                continue
            wanted = self._resources(node)
            free = ray.available_resources()
            needs = [(NAMES[key], number) for key, number in wanted.items() if number]
            idle = min((int(free.get(name, 0.0) / number) for name, number in needs), default=0)
            if parts := min(idle, MOST_ASSISTANTS):
                break
        else:
            return
        self._assisted_now.add(node.address)
        jobs = [{**job, "part": part, "parts": parts} for part in range(parts)]

        def follow(part: host.Event) -> None:
            with suppress(RayError):  # a lost assistant is no loss
                for _ in self._events(node, part):
                    pass

        threads = [threading.Thread(target=follow, args=(part,), daemon=True) for part in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._assisted_now.discard(node.address)

    def _resources(self, node: Node) -> dict[str, float]:
        """Return what a stage wants of a host, as Ray names it."""
        wanted = {"num_cpus": _number(node, "cpu", 1.0), "num_gpus": 0.0}
        if self._gpus:  # on a cluster without GPU everything runs on the CPU, as on one machine
            wanted["num_gpus"] = float(node.gpus)
        if memory := _number(node, "memory", 0.0):
            wanted["memory"] = memory * GIB
        return wanted

    def _check_fits(self, node: Node, hosts: list[dict[str, float]]) -> None:
        """Raise InvalidInput if no host can ever hold a stage: Ray would let it wait for ever."""
        wanted = {NAMES[key]: value for key, value in self._resources(node).items()}
        if not any(all(item.get(k, 0.0) >= v for k, v in wanted.items()) for item in hosts):
            largest = {k: max((item.get(k, 0.0) for item in hosts), default=0.0) for k in wanted}
            raise InvalidInput(
                f"no host of the cluster can hold {node.name}: it wants {_told(wanted)}, hosts "
                f"have at most {_told(largest)}; change meta in dvc.yaml, or add a host"
            )

    def _check_sources(self, nodes: list[Node], code: snapshot.Snapshot) -> None:
        """Raise InvalidInput if a stage reads a file that would not travel."""
        place = self._root.relative_to(Artifacts(self._root).top)
        for node in nodes:
            for path in self._dag.sources(node.address):
                if os.path.normpath(place / path) not in code.names:
                    raise InvalidInput(
                        f"{node.name} reads {path}, which no stage makes and git does not track: "
                        f"it would not reach a host; `git add {path}`, or `dvc add {path}`"
                    )

    def _project(self) -> str:
        """Return a name under which hosts keep checkouts of this experiment."""
        top = Artifacts(self._root).top
        return f"{top.name}-{self._root.name}" if self._root != top else top.name


def _connected() -> Any:
    """Return the module ray, connected to the cluster.

    Raises:
        MissingDependency: it is not installed.
        InvalidInput: the address is none, or the cluster has another version.
        ServiceUnreachable: there is no cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise MissingDependency(
            "TASKVEC_RUNNER=ray needs ray; pip install 'taskvec[ray]', here and on every host"
        ) from None
    if ray.is_initialized():
        return ray
    address = os.environ.get(ADDRESS) or "auto"
    _check_address(address)
    try:
        ray.init(address=address, namespace="taskvec", log_to_driver=False, configure_logging=False)
    except ConnectionError as error:
        raise ServiceUnreachable(_unreachable(address, reason(error))) from None
    except RuntimeError as error:
        raise InvalidInput(
            f"the cluster at {address} does not fit: {redacted(str(error))}"
        ) from None
    return ray


def _check_address(address: str) -> None:
    """Raise unless an address is ``auto``, or HOST:PORT where somebody listens."""
    if address == "auto":
        return
    name, _, port = address.rpartition(":")
    if not name or not port.isdigit() or "/" in name:
        raise InvalidInput(
            f"{ADDRESS}={address} is no address of a cluster; expected HOST:PORT of its head, from "
            "a machine that belongs to it (`ray start --address=HOST:PORT --num-cpus=0`), or auto"
        )
    try:
        socket.create_connection((name, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise ServiceUnreachable(_unreachable(address, reason(error))) from None


def _unreachable(address: str, why: str) -> str:
    return (
        f"no Ray cluster answers at {ADDRESS}={address} ({why}); start one with `ray start --head "
        "--disable-usage-stats`, or unset TASKVEC_RUNNER to run on this machine"
    )


def _is_here(node: Node) -> bool:
    return bool(node.meta.get("local", node.stage in HERE))


def _number(node: Node, name: str, default: float) -> float:
    value = node.meta.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise InvalidInput(
            f"{node.name}: meta.{name} in dvc.yaml is {value!r}; expected a number of "
            f"{'GiB' if name == 'memory' else 'cores'}, 0 or more"
        )
    return float(value)


def _named(node: Node, message: str) -> str:
    return message if message.startswith(node.name) else f"{node.name}: {message}"


def _told(resources: dict[str, float]) -> str:
    shown = {k: v / GIB if k == "memory" else v for k, v in resources.items()}
    return ", ".join(f"{v:g} {'GiB' if k == 'memory' else k}" for k, v in shown.items() if v)
