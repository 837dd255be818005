"""A PostgreSQL server of its own, from the system's package, for the time of a measurement."""

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

DRIVER = "psycopg2"
PROGRAMS = Path("/usr/lib/postgresql")  # where Debian puts each version
USER = "postgres"  # who runs it if we are root: the server refuses to


@dataclass(frozen=True)
class Server:
    """A running server."""

    programs: Path
    data: str
    options: str
    port: int

    def uri(self, driver: str = DRIVER, database: str = USER) -> str:
        """Return the address of a database for SQLAlchemy."""
        return f"postgresql+{driver}://{USER}@127.0.0.1:{self.port}/{database}"

    def create(self, database: str) -> None:
        """Create an empty database."""
        _run(
            self.programs / "createdb",
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
            "-U",
            USER,
            database,
        )

    def restart(self) -> None:
        """Stop it, whoever is connected, and start it again."""
        self._control("-m", "fast", "-o", self.options, "restart")

    def start(self) -> None:
        """Start it."""
        self._control("-o", self.options, "start")

    def stop(self) -> None:
        """End it at once."""
        self._control("-m", "immediate", "stop")

    def _control(self, *arguments: str) -> None:
        log = f"{self.data}.log"
        _run(self.programs / "pg_ctl", "-D", self.data, "-w", "-l", log, *arguments)


@contextmanager
def running() -> Iterator[str]:
    """Yield the address of a fresh server on loopback; empty if it is not installed."""
    with server() as found:
        yield found.uri() if found else ""


@contextmanager
def server() -> Iterator[Server | None]:
    """Yield a fresh server on loopback; None if it is not installed."""
    programs = _programs()
    if programs is None or importlib.util.find_spec(DRIVER) is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="postgres-") as name, socket.socket() as free:
        directory = Path(name)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        if os.geteuid() == 0:
            shutil.chown(directory, USER)
        data = str(directory / "data")
        _run(programs / "initdb", "-D", data, "-U", USER, "-A", "trust")
        found = Server(programs, data, f"-h 127.0.0.1 -p {port} -k {directory}", port)
        found.start()
        try:
            yield found
        finally:
            found.stop()


def _programs() -> Path | None:
    found = sorted(PROGRAMS.glob("*/bin/initdb"))
    return found[-1].parent if found else None


def _run(program: Path, *arguments: str) -> None:
    user = pwd.getpwnam(USER) if os.geteuid() == 0 else None
    done = subprocess.run(
        [str(program), *arguments], cwd="/", capture_output=True, text=True,
        user=user.pw_uid if user else None, group=user.pw_gid if user else None,
    )  # fmt: skip
    assert done.returncode == 0, f"{program.name}: {done.stdout}{done.stderr}"
