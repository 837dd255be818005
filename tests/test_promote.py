"""Promotion: what speaks against it, what an override leaves, and what a registered name means."""

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from flows import registry
from flows.promote import promote
from flows.registry import check_alias
from flows.tracking import Connection
from taskvec.errors import GateClosed, InvalidInput, ServiceUnreachable
from tests.project import Project
from tests.soak import reproduced

pytestmark = [pytest.mark.pipeline, pytest.mark.filterwarnings("ignore:The ``noload``")]
MODEL = "data/edits/both-0/model.safetensors"


def commit(project: Project) -> None:
    project.command("git", "add", "-A")
    project.command("git", "-c", "user.name=t", "-c", "user.email=t@b", "commit", "-qm", "done")


def registered(project: Project, alias: str) -> Any:
    client = Connection(project.root).client
    version = client.get_model_version_by_alias("both", alias)
    run = client.get_run(version.run_id)
    models = [client.get_logged_model(item.model_id) for item in run.inputs.model_inputs]
    parents = sorted(model.tags["dvc.path"] for model in models)
    return {"version": version.version, "tags": version.tags, "parents": parents}


def test_a_model_is_promoted_when_nothing_speaks_against_it(project: Project) -> None:
    dirty = project.taskvec("promote", "both", "--alias", "champion")
    assert dirty.code == 8 and "uncommitted changes" in dirty.err
    commit(project)
    done = project.taskvec("promote", "both", "--alias", "champion")
    assert done.code == 0, done.err
    assert "models:/both/1 is champion now" in done.err
    found = registered(project, "champion")
    lock = (project.root / "edits/dvc.lock").read_text()
    assert found["tags"]["dvc.md5"] in lock
    assert "override" not in found["tags"]
    assert found["parents"] == [
        "data/checkpoints/digits-0.safetensors", "data/checkpoints/faces-0.safetensors",
        "data/checkpoints/pretrained.safetensors", "data/vectors/digits-0.safetensors",
        "data/vectors/faces-0.safetensors",
    ]  # fmt: skip
    # the name leads back to the file, without mlflow
    for name in ("models:/both@champion", "models:/both/1"):
        traced = json.loads(project.taskvec("trace", name, "--json").out)
        assert (traced["path"], traced["md5"]) == (MODEL, found["tags"]["dvc.md5"])
    assert project.taskvec("trace", "models:/both@nobody").code == 5
    # the same bytes are one version; another alias points to it as well
    promote(project.root, "both", "stable")
    assert registered(project, "stable")["version"] == found["version"]

    # what contains a checkpoint is registered, whichever way MLflow's record is read
    below = json.loads(project.taskvec("trace", "digits", "--down", "--json").out)
    assert below["registered"] == [
        {"address": "models:/both/1", "aliases": ["champion", "stable"], "path": MODEL,
         "md5": found["tags"]["dvc.md5"]}
    ]  # fmt: skip
    edges = {(edge["source"], edge["target"]) for edge in below["graph"]["edges"]}
    assert (found["tags"]["dvc.md5"], "models:/both/1") in edges
    assert project.taskvec("trace", "digits", "--down", "--page").code == 0
    assert "models:/both/1, champion" in (project.root / "data/pages/lineage.html").read_text()
    (version,) = registry.versions(project.root)
    assert (version.name, version.number) == ("both", "1")
    assert registry._of_database(f"sqlite+pysqlite:///{project.root}/mlflow.db") == [version]

    # a damaged file, a retraction: refused, and what can be overridden is recorded
    vector = project.root / "data/vectors/digits-0.safetensors"
    content = bytearray(vector.read_bytes())
    content[-3] ^= 1
    vector.chmod(0o644)
    vector.write_bytes(content)
    with pytest.raises(GateClosed, match=r"digits-0\.safetensors"):
        promote(project.root, "both", "champion")
    promote(project.root, "both", "risky", override="only a test")
    tags = registered(project, "risky")["tags"]
    assert tags["override"] == "only a test" and "digits-0" in tags["overridden"]
    assert project.taskvec("retract", "faces", "--why", "its labels are wrong").code == 0
    with pytest.raises(GateClosed, match="its labels are wrong"):
        promote(project.root, "both", "champion", override="please")


def test_an_artifact_is_rebuilt_bit_for_bit_under_other_circumstances(project: Project) -> None:
    commit(project)
    before = subprocess.run(
        ["git", "status", "--porcelain"], cwd=project.root, capture_output=True, text=True
    ).stdout
    done, _ = reproduced(project, random.Random(1), "forget")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["equal"] and found["expected"] == found["found"]
    assert found["stages"] == 12  # all that it needs, none of it from a cache
    after = subprocess.run(
        ["git", "status", "--porcelain"], cwd=project.root, capture_output=True, text=True
    ).stdout
    assert after == before
    assert "tree" not in project.command("git", "worktree", "list").out.replace("worktree", "")


def test_a_database_that_does_not_answer_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert registry.versions(tmp_path) == []  # nothing was recorded yet
    (tmp_path / "mlflow.db").write_bytes(b"no database at all")
    with pytest.raises(ServiceUnreachable, match="which models are registered"):
        registry.versions(tmp_path)
    for uri in ("sqlite+pysqlite:////nowhere/mlflow.db", "http://user:hidden@127.0.0.1:9"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(ServiceUnreachable, match="MLFLOW_TRACKING_URI") as error:
            registry.versions(tmp_path)
        assert "hidden" not in str(error.value)


@pytest.mark.parametrize("alias", ["", "v1", "latest", "a b", "x" * 65, "1st"])
def test_a_malformed_alias_is_refused(alias: str) -> None:
    with pytest.raises(InvalidInput, match="alias"):
        check_alias(alias)


def test_only_edited_models_are_promoted(finished: Project, tmp_path: Path) -> None:
    for name, code in (("digits", 3), ("nothing", 5), ("models:nothing", 5)):
        assert finished.taskvec("promote", name, "--alias", "champion").code == code
    assert not list(tmp_path.iterdir())
