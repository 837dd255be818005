"""The file that says which servers of a checkout run, and how to reach them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.artifacts import Artifacts


def services_file(root: Path) -> Path:
    """Where running servers say how to reach them; readable by its owner only."""
    return Artifacts(root).top / ".taskvec" / "services.json"


def write_services(root: Path, services: Mapping[str, Any]) -> None:
    """Write the services file as a whole; it holds passwords.

    ``prefect`` is the environment of a client, ``mlflow`` has the ``url`` of the server and, if
    runs do not go to the repository's own file, ``store``; the rest is of `flows.services`.
    """
    path = services_file(root)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".writing-{path.name}")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(services, file)
    temporary.replace(path)


def known_services(root: Path) -> dict[str, dict[str, Any]]:
    """Return what the services file says; empty without one, or if it is damaged."""
    try:
        content = json.loads(services_file(root).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
