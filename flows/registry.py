"""MLflow's registry: models that were promoted, by name and alias."""

import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.redaction import reason
from flows.store import database, tracking_uri
from flows.tracking import Connection
from taskvec.errors import InvalidInput, MissingArtifact, ServiceUnreachable

ADDRESS = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))")
ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
ANSWER_SECONDS = 1.0
PAGE = 1000  # entries in one answer
DIGEST = "dvc.md5"  # the tag of a version that says which bytes it is


@dataclass(frozen=True)
class Version:
    """A version of a registered model.

    Attributes:
        name: of the model.
        number: of the version, from 1.
        aliases: that point to it.
        md5: of its bytes.
    """

    name: str
    number: str
    aliases: tuple[str, ...]
    md5: str

    @property
    def address(self) -> str:
        """What MLflow calls it."""
        return f"models:/{self.name}/{self.number}"


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

    Raises:
        InvalidInput: it is no such address.
        MissingArtifact: nothing is registered so, or not by `taskvec promote`.
        ServiceUnreachable: MLflow does not answer.
    """
    match = ADDRESS.fullmatch(address)
    if not match:
        raise InvalidInput(f"{address!r}: expected models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = match.groups()
    for version in versions(root):
        if version.name == name and (alias in version.aliases or number == version.number):
            return version.md5
    raise MissingArtifact(f"nothing that `taskvec promote` registered is called {address}")


def versions(root: Path) -> list[Version]:
    """Return what `taskvec promote` registered, by name and number.

    Databases are read directly, since importing mlflow takes seconds; a server is asked.

    Raises:
        ServiceUnreachable: MLflow does not answer.
    """
    uri = tracking_uri(root)
    try:
        if (path := database(uri)) is not None:
            found = _of_sqlite(path)
        elif uri.startswith(("http:", "https:")):
            found = list(_of_server(uri))
        else:
            found = _of_database(uri)
    except Exception as error:  # whatever drivers raise
        raise ServiceUnreachable(
            f"MLflow does not say which models are registered ({reason(error)}); start the "
            "server, or set MLFLOW_TRACKING_URI"
        ) from None
    return sorted(found, key=lambda version: (version.name, int(version.number)))


def _of_sqlite(path: Path) -> list[Version]:
    if not path.is_file():
        return []
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as opened:
        tables = opened.execute("SELECT name FROM sqlite_schema").fetchall()
        if ("registered_model_aliases",) not in tables:  # MLflow has not finished creating it
            return []
        return _versions(lambda question: opened.execute(question).fetchall())


def _of_database(uri: str) -> list[Version]:
    from sqlalchemy import create_engine, text

    engine = create_engine(uri)
    try:
        with engine.connect() as opened:
            return _versions(lambda question: opened.execute(text(question)).fetchall())
    finally:
        engine.dispose()


def _versions(ask: Callable[[str], Iterable[Any]]) -> list[Version]:
    aliases: dict[tuple[str, str], list[str]] = {}
    for name, alias, number in ask("SELECT name, alias, version FROM registered_model_aliases"):
        aliases.setdefault((name, str(number)), []).append(alias)
    rows = ask(f"SELECT name, version, value FROM model_version_tags WHERE key = '{DIGEST}'")
    return [
        Version(name, str(number), tuple(sorted(aliases.get((name, str(number)), ()))), md5)
        for name, number, md5 in rows
    ]


def _of_server(uri: str) -> Iterator[Version]:
    """Ask a server in its own language: to import mlflow takes seconds."""
    from requests import Session

    with Session() as session:
        user, password, token = (
            os.environ.get(f"MLFLOW_TRACKING_{name}", "")
            for name in ("USERNAME", "PASSWORD", "TOKEN")
        )
        if user:
            session.auth = (user, password)
        elif token:
            session.headers["Authorization"] = f"Bearer {token}"
        if certificate := os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"):
            session.verify = certificate

        def pages(kind: str) -> Iterator[dict[str, Any]]:
            asked: dict[str, str | int] = {"max_results": PAGE}
            while True:
                address = f"{uri.rstrip('/')}/api/2.0/mlflow/{kind.replace('_', '-')}/search"
                answer = session.get(address, params=asked, timeout=ANSWER_SECONDS)
                answer.raise_for_status()
                content = answer.json()
                yield from content.get(kind, [])
                if not content.get("next_page_token"):
                    return
                asked["page_token"] = content["next_page_token"]

        aliases: dict[tuple[str, str], list[str]] = {}
        for model in pages("registered_models"):
            for item in model.get("aliases", []):
                place = model["name"], str(item["version"])
                aliases.setdefault(place, []).append(item["alias"])
        for version in pages("model_versions"):
            name, number = version["name"], str(version["version"])
            tags = {tag["key"]: tag.get("value", "") for tag in version.get("tags", [])}
            if md5 := tags.get(DIGEST):
                yield Version(name, number, tuple(sorted(aliases.get((name, number), ()))), md5)
