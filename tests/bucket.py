"""An S3 server of its own on one machine, for the time of a test."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flows.servers import free_port, spawn, stop

BUCKET = "models"


@dataclass(frozen=True)
class Store:
    """A server with one empty bucket."""

    endpoint: str
    process: "subprocess.Popen[bytes]"

    def url(self, prefix: str = "store") -> str:
        """Return the address of a DVC remote in the bucket."""
        return f"s3://{BUCKET}/{prefix}"

    @property
    def environment(self) -> dict[str, str]:
        """What whoever uses it needs; the server takes any key."""
        return {
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "anything-at-all",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def configure(self, root: Path, prefix: str) -> None:
        """Make it the default remote of a checkout."""
        for words in (
            ["add", "-d", "store", self.url(prefix)],
            ["modify", "store", "endpointurl", self.endpoint],
            ["modify", "store", "verify", "true"],
        ):
            subprocess.run(["dvc", "remote", *words], cwd=root, check=True, capture_output=True)


CREATE = """
import sys, time, urllib.request
url, end = sys.argv[1], time.monotonic() + 60
while True:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=2)
        break
    except OSError:
        if time.monotonic() > end:
            raise
        time.sleep(0.1)
"""


@contextmanager
def running(
    directory: Path, host: str = "127.0.0.1", prefix: tuple[str, ...] = ()
) -> Iterator[Store]:
    """Yield a server on an address of this machine.

    Args:
        directory: for its log.
        host: the address.
        prefix: what commands begin with, such as a network namespace.
    """
    port = free_port()
    endpoint = f"http://{host}:{port}"
    server = [*prefix, sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)]
    process = spawn(server, directory / "s3.log", {})
    try:
        create = [*prefix, sys.executable, "-c", CREATE, f"{endpoint}/{BUCKET}"]
        subprocess.run(create, check=True)
        yield Store(endpoint, process)
    finally:
        stop(process)
