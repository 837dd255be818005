"""What all processes of a test session share: each of it takes seconds to make.

The first process of the session owns it: a directory, and a Prefect server from the moment somebody
wants one.
"""

import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

from filelock import FileLock

from flows.servers import started_prefect
from taskvec.atomic import write_text
from tests.project import ALL, Project

SHARED = "TASKVEC_TESTS_SHARED"  # the directory
WANTED, SERVER, FINISHED = "server.wanted", "server.json", "finished.txt"
SECONDS = 120.0  # that the server may take to start


class Session:
    """The owner of what is shared."""

    def __init__(self) -> None:
        """Make the directory, which processes that are started from now on find."""
        self._directory = Path(tempfile.mkdtemp(prefix="taskvec-tests-"))
        os.environ[SHARED] = str(self._directory)
        self._over = threading.Event()
        self._server = threading.Thread(target=self._serve, daemon=True)
        self._server.start()

    def end(self) -> None:
        """Stop the server and remove the directory."""
        self._over.set()
        self._server.join()
        del os.environ[SHARED]
        shutil.rmtree(self._directory)

    def _serve(self) -> None:
        while not (self._directory / WANTED).exists():
            if self._over.wait(0.1):
                return
        with started_prefect(seed(self._directory / "server"), ui=False) as server:
            write_text(self._directory / SERVER, json.dumps(server.environment))
            self._over.wait()


def prefect_server() -> dict[str, str]:
    """Return the environment of the running Prefect server."""
    found = _shared() / SERVER
    (_shared() / WANTED).touch()
    deadline = time.monotonic() + SECONDS
    while not found.exists():
        assert time.monotonic() < deadline, f"no Prefect server, see {_shared()}/server"
        time.sleep(0.1)
    return dict(json.loads(found.read_text()))


def finished(server: dict[str, str]) -> Project:
    """Return a project in which everything has run once."""
    found = _shared() / FINISHED
    with FileLock(found.with_suffix(".lock")):
        if not found.exists():
            root = Path(tempfile.mkdtemp(prefix="finished-", dir=_shared()))
            done = Project.create(root, server).taskvec("run")
            assert done.code == 0, done.err
            assert done.stages("run") == ALL, done.err
            assert "Warning" not in done.err, done.err  # nor do its processes leak anything
            write_text(found, str(root))
    return Project(Path(found.read_text()), server)


def seed(root: Path) -> Path:
    """Give a directory the database of its Prefect server if it has none; return the directory.

    Outside a test session nothing is done: the server makes its own.
    """
    if SHARED not in os.environ:
        return root
    made = _shared() / "empty/.taskvec/prefect/prefect.db"
    with FileLock(_shared() / "empty.lock"):
        if not made.exists():
            with started_prefect(_shared() / "empty", ui=False):
                pass  # it has made its tables
    home = root / ".taskvec/prefect"
    home.mkdir(parents=True, exist_ok=True)
    if not (home / made.name).exists():
        shutil.copy(made, home)
    return root


def _shared() -> Path:
    return Path(os.environ[SHARED])
