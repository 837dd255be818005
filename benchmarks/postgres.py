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
from pathlib import Path

DRIVER = "psycopg2"
PROGRAMS = Path("/usr/lib/postgresql")  # where Debian puts each version
USER = "postgres"  # who runs it if we are root: the server refuses to


@contextmanager
def running() -> Iterator[str]:
    """Yield the address of a fresh server on loopback; empty if it is not installed."""
    programs = _programs()
    if programs is None or importlib.util.find_spec(DRIVER) is None:
        yield ""
        return
    with tempfile.TemporaryDirectory(prefix="postgres-") as name, socket.socket() as free:
        directory = Path(name)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        if os.geteuid() == 0:
            shutil.chown(directory, USER)
        data = str(directory / "data")
        options = f"-h 127.0.0.1 -p {port} -k {directory}"
        _run(programs / "initdb", "-D", data, "-U", USER, "-A", "trust")
        _run(programs / "pg_ctl", "-D", data, "-w", "-o", options, "-l", f"{data}.log", "start")
        try:
            yield f"postgresql+{DRIVER}://{USER}@127.0.0.1:{port}/postgres"
        finally:
            _run(programs / "pg_ctl", "-D", data, "-m", "immediate", "stop")


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
