"""Shared fixtures: a Prefect server for the session, and a finished tiny project."""

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests import session
from tests.project import Project

settings.register_profile(
    "mutation",  # tests/mutate.py: a few examples, always the same, and no search for a small one
    max_examples=10,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
MUTATION = os.environ.get("HYPOTHESIS_PROFILE") == "mutation"
if MUTATION:
    settings.load_profile("mutation")
SESSION = pytest.StashKey[session.Session]()


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # while thousands of tests are collected
    if not hasattr(config, "workerinput"):  # its environment is that of the workers, too
        config.stash[SESSION] = session.Session()


def pytest_collection_finish() -> None:
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # as in stages: other tests have the other cores
    gc.collect()
    gc.freeze()  # what is no garbage is not looked through any more
    gc.enable()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.stash[SESSION].end()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest first: with several processes the short files fill the gaps at the end. And no
    # two begin with a finished project: one would wait until the other has made it.
    needing = {item.path for item in items if "finished" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: (item.get_closest_marker("pipeline") is None, item.path in needing))
    if not MUTATION:
        return
    few = settings.get_profile("mutation").max_examples
    for item in items:
        own = getattr(getattr(item, "obj", None), "_hypothesis_internal_use_settings", None)
        if own and own.max_examples > few:
            item.obj._hypothesis_internal_use_settings = settings(own, max_examples=few)  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def prefect_server() -> dict[str, str]:
    """Return the environment of a running Prefect server."""
    return session.prefect_server()


@pytest.fixture(scope="session")
def finished(prefect_server: dict[str, str]) -> Project:
    """Return a project in which everything has run once; copy it, do not change it."""
    return session.finished(prefect_server)


@pytest.fixture
def sending(finished: Project) -> Iterator[Project]:
    """Return a copy of the finished project, to change at will."""
    with tempfile.TemporaryDirectory() as directory:
        yield finished.copy(Path(directory) / "checkout")


@pytest.fixture
def project(sending: Project) -> Project:
    """Return a copy whose runs wait to be sent to MLflow, which takes a third of their time."""
    sending.server = {**sending.server, "TASKVEC_MLFLOW": "later"}
    return sending
