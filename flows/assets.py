"""Prefect asset events: which files a stage materialised, and which it referred to.

They have the form of Prefect's own ``@materialize``, which wants assets to be known when a task is
defined; here the digests are those of what a stage really read and wrote. Prefect keeps them as
events (``POST /api/events/filter``, prefix ``prefect.asset``); its asset page is one of its cloud.
"""

from collections.abc import Mapping
from urllib.parse import quote

ROLE = "prefect.resource.role"
ID = "prefect.resource.id"
MOST_RELATED = 90  # Prefect refuses an event with more than 100, those of its own included


def key(project: str, path: str) -> str:
    """Return the key of a file that DVC tracks, a URI."""
    return f"dvc://{quote(project)}/{quote(path)}"


def emit(project: str, outs: Mapping[str, str], inputs: Mapping[str, str], how: str) -> None:
    """Emit the events of a stage that has ended.

    Args:
        project: its repository's name, and below it the directory of its experiment, if any.
        outs: path -> md5 of what it wrote.
        inputs: path -> md5 of what it read.
        how: "run", or "run-cache" if the files were there already.
    """
    from prefect.events import emit_event

    for path, md5 in inputs.items():
        emit_event(
            "prefect.asset.referenced", _resource(project, path), payload={"md5": md5}, related=[]
        )
    related = [{ID: key(project, path), ROLE: "asset"} for path in sorted(inputs)[:MOST_RELATED]]
    for path, md5 in outs.items():
        emit_event(
            "prefect.asset.materialization.succeeded",
            _resource(project, path),
            related=[*related, {ID: "dvc", ROLE: "asset-materialized-by"}],
            payload={"md5": md5, "how": how, "inputs": dict(inputs)},
        )


def _resource(project: str, path: str) -> dict[str, str]:
    return {ID: key(project, path), "prefect.resource.name": path}
