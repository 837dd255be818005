"""MLflow's registry: models that were promoted, by name and alias."""

import re
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from flows.redaction import reason
from flows.store import database, tracking_uri
from flows.tracking import Connection
from taskvec.errors import InvalidInput, MissingArtifact, ServiceUnreachable

ADDRESS = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))")
ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
DIGEST = "dvc.md5"  # the tag of a version that says which bytes it is


def check_alias(alias: str) -> None:
    """Raise InvalidInput if MLflow would not take an alias, or would take it for a version."""
    if not ALIAS.fullmatch(alias) or re.fullmatch(r"v\d+", alias) or alias == "latest":
        raise InvalidInput(
            f"alias {alias!r}: expected a letter and at most 63 letters, digits, _ or -; neither "
            "`latest` nor `v` and a number"
        )


def register(
    root: Path, name: str, alias: str, tags: Mapping[str, str], parents: Sequence[str]
) -> str:
    """Make the model with some bytes a version of a registered model, and point an alias to it.

    Args:
        root: the directory of params.yaml.
        name: of the registered model.
        alias: that moves to this version.
        tags: of the version; `DIGEST` says which bytes it is.
        parents: md5 of the weights that it was made of; they become inputs of its run.

    Returns:
        The version; the one that there is if the same bytes were registered before.

    Raises:
        MissingArtifact: no run that made the bytes is in MLflow.
        ServiceUnreachable: MLflow does not answer.
    """
    connection = Connection(root)
    try:
        client = connection.client
        model = connection.model(DIGEST, tags[DIGEST])
        if model is None:
            raise MissingArtifact(
                f"MLflow knows no run that made {tags[DIGEST][:12]}; `taskvec backfill` records it"
            )
        connection.add_parents(model.source_run_id, DIGEST, parents)
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        known = [
            version
            for version in client.search_model_versions(f"name = '{name}'")
            if version.tags.get(DIGEST) == tags[DIGEST]
        ]
        version = known[0] if known else client.create_model_version(
            name, f"models:/{model.model_id}", model.source_run_id, model_id=model.model_id
        )  # fmt: skip
        for key, value in tags.items():
            client.set_model_version_tag(name, version.version, key, value)
        client.set_registered_model_alias(name, alias, version.version)
    except MissingArtifact:
        raise
    except Exception as error:  # whatever MLflow raises
        raise ServiceUnreachable(
            f"MLflow does not answer ({reason(error)}); start the server, or set "
            "MLFLOW_TRACKING_URI"
        ) from None
    return str(version.version)


def digest(root: Path, address: str) -> str:
    """Return the md5 that ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION`` means.

    MLflow's own SQLite file is read directly, since importing mlflow takes seconds.

    Raises:
        InvalidInput: it is no such address.
        MissingArtifact: nothing is registered so, or not by `taskvec promote`.
    """
    match = ADDRESS.fullmatch(address)
    if not match:
        raise InvalidInput(f"{address!r}: expected models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, version = match.groups()
    path = database(tracking_uri(root))
    found = _asked(root, *match.groups()) if path is None else _read(path, name, alias, version)
    if not found:
        raise MissingArtifact(f"nothing that `taskvec promote` registered is called {address}")
    return found


def _read(path: Path, name: str, alias: str | None, version: str | None) -> str:
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as opened:
            if alias:
                question = "SELECT version FROM registered_model_aliases WHERE name=? AND alias=?"
                rows = opened.execute(question, (name, alias)).fetchall()
                version = str(rows[0][0]) if rows else ""
            rows = opened.execute(
                "SELECT value FROM model_version_tags WHERE name=? AND version=? AND key=?",
                (name, version, DIGEST),
            ).fetchall()
    except sqlite3.DatabaseError:
        return ""
    return str(rows[0][0]) if rows else ""


def _asked(root: Path, name: str, alias: str | None, version: str | None) -> str:
    client = Connection(root).client
    try:
        found = (
            client.get_model_version_by_alias(name, alias)
            if alias
            else client.get_model_version(name, version)
        )
    except Exception:  # whatever MLflow raises: it is not there
        return ""
    return str(found.tags.get(DIGEST, ""))
