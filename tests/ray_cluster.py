"""A Ray cluster of several hosts on one machine, each with a directory of its own."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from flows.servers import free_port

START_SECONDS = 90
STOP_SECONDS = 10
# Ray has defaults for real networks; a lost host is noticed in seconds here.
QUICK = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "5",
}
MEMORY = 80_000_000  # bytes of the object store of a host, the least that Ray takes


@dataclass
class Node:
    """A host: its processes are one group."""

    address: str
    home: Path
    process: "subprocess.Popen[bytes]"
    log: Path

    def kill(self) -> None:
        """End the host as a power cut would."""
        self.signal(signal.SIGKILL)
        self.process.wait()

    def signal(self, number: int) -> None:
        """Send all processes of the host a signal."""
        os.killpg(self.process.pid, number)


class RayCluster:
    """A head without slots, for drivers, and hosts that do the work."""

    def __init__(
        self,
        directory: Path,
        addresses: Iterator[str],
        prefixes: Mapping[str, list[str]] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Start the head.

        Args:
            directory: for everything that it writes; their logs and checkouts.
            addresses: the next one is the head's, then one for every host.
            prefixes: address -> what a command on that host begins with, such as a namespace.
            settings: of Ray, by environment; default: `QUICK`.
        """
        self._settings = QUICK if settings is None else settings
        self._directory, self._addresses = directory, addresses
        self._prefixes = prefixes or {}
        self.nodes: list[Node] = []
        self._port = free_port()
        self._sockets = tempfile.mkdtemp(prefix="ray-")  # their names may have 107 bytes
        options = [f"--temp-dir={self._sockets}", "--num-cpus=0", "--include-dashboard=false"]
        if find_spec("grpc"):  # Ray then serves its client protocol, too, on a port of its own
            options.append(f"--ray-client-server-port={free_port()}")
        head = self._start("--head", f"--port={self._port}", *options, environment={})
        self.address = f"{head.address}:{self._port}"
        self._wait(head)

    def add(
        self, hosts: int, environment: Mapping[str, str] | None = None, slots: int = 1
    ) -> list[Node]:
        """Start hosts, one after another: Ray fails if several start at once."""
        found = []
        for _ in range(hosts):
            found.append(
                self._start(
                    f"--address={self.address}",
                    f"--num-cpus={slots}",
                    environment=environment or {},
                )
            )
            self._wait(found[-1])
        return found

    @property
    def environment(self) -> dict[str, str]:
        """What a driver needs."""
        return {"TASKVEC_RUNNER": "ray", "TASKVEC_RAY_ADDRESS": self.address, **self._settings}

    def stop(self) -> None:
        """End all hosts."""
        for node in self.nodes:
            if node.process.poll() is None:
                node.kill()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _start(self, *options: str, environment: Mapping[str, str]) -> Node:
        address = next(self._addresses)
        home = self._directory / f"host-{len(self.nodes)}"
        home.mkdir(parents=True)
        log = home / "ray.log"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("TASKVEC_", "RAY_"))}
        command = [
            *self._prefixes.get(address, []),
            str(Path(sys.executable).with_name("ray")), "start", "--block",
            "--disable-usage-stats", f"--node-ip-address={address}",
            f"--object-store-memory={MEMORY}", *options,
        ]  # fmt: skip
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=home, start_new_session=True, stdout=output, stderr=output,
                env={**kept, **self._settings, "TASKVEC_HOST_DIRECTORY": str(home), **environment},
            )  # fmt: skip
        self.nodes.append(Node(address, home, process, log))
        return self.nodes[-1]

    def _wait(self, node: Node) -> None:
        """Wait until Ray says that a host runs."""
        deadline = time.monotonic() + START_SECONDS
        while b"Ray runtime started" not in (said := node.log.read_bytes()):
            if node.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise AssertionError(f"Ray did not start:\n{said.decode(errors='replace')}")
            time.sleep(0.1)


def loopback() -> Iterator[str]:
    """Yield addresses of the loopback interface; Ray takes 127.0.0.1 for the outer one."""
    part = f"127.{random.SystemRandom().randrange(1, 255)}.{os.getpid() % 251}"
    return (f"{part}.{number}" for number in range(2, 250))


@contextmanager
def running(
    directory: Path, hosts: int, environment: Mapping[str, str], slots: int = 1
) -> Iterator[RayCluster]:
    """Yield a cluster of hosts on loopback; nothing of it stays."""
    cluster = RayCluster(directory, loopback())
    try:
        cluster.add(hosts, environment, slots)
        yield cluster
    finally:
        cluster.stop()
