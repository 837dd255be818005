"""An empty database of a Prefect server, made once a session: the migrations take seconds."""

import os
import shutil
from pathlib import Path

from filelock import FileLock

from flows.servers import started_prefect

SHARED = "TASKVEC_TESTS_SHARED"  # the directory that all processes of a test session share


def seed(root: Path) -> Path:
    """Give a directory the database of its server if it has none; return the directory.

    Outside a test session nothing is done: the server makes its own.
    """
    if SHARED not in os.environ:
        return root
    shared = Path(os.environ[SHARED])
    made = shared / ".taskvec/prefect/prefect.db"
    with FileLock(shared / "prefect.lock"):
        if not made.exists():
            with started_prefect(shared, ui=False):
                pass  # it has made its tables
    home = root / ".taskvec/prefect"
    home.mkdir(parents=True, exist_ok=True)
    if not (home / made.name).exists():
        shutil.copy(made, home)
    return root
