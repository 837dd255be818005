"""What MLflow holds of a run, during it and afterwards, and that it never stands in the way."""

import json
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flows.dag import Node
from flows.servers import free_port
from flows.tracking import StageRecord, Tracker, runs_by_output, tracking_uri
from tests.project import ROOT

# One process records a run, as `taskvec run` does, and looks at the database while it lasts.
RECORD = """
import json, sys, time
from pathlib import Path
import torch
from flows.dag import Node
from flows.tracking import StageRecord, Tracker
from taskvec.checkpoints import save

root = Path.cwd()
warnings = []
def weights(name, **metadata):
    path = root / "data" / name
    save(path, {"w": torch.ones(300_000)}, "vector", origin="abc", **metadata)
    return f"data/{name}"
def node(name, params=None):
    return Node(name, f"dvc:{name}", f"python -m tasks {name}", 0, 1.0, [], [], [], params or {})

tracker = Tracker(root, warnings.append)
tracker.start({"name": "taskvec run", "host": "here", "mlflow.source.git.commit": "c0ffee"})

pretrained = weights("checkpoints/pretrained.safetensors")
model = {"model": {"family": "bundled"}}
tracker.begin(StageRecord(node("pretrain", model), "run", "never run", "p1"))
tracker.end("dvc:pretrain", "FINISHED", {pretrained: "1" * 32}, {})

params = {"fine_tune": {"steps": 80, "learning_rate": 5e-5}, "code.yaml:python": "3.11",
          "files": {f"odd (name) + {i}*.png": "x" * 7000 for i in range(250)}}
because = "fine_tune.steps changed: 6 -> 80"
tracker.begin(StageRecord(node("fine_tune", params), "run", because, "p2"))
for step in range(1, 6):
    tracker.progress("dvc:fine_tune", step, {"loss": 1 / step})
tracker.begin(StageRecord(node("broken"), "run", "never run", ""))
tracker.end("dvc:broken", "FAILED", {}, {})
print("look", flush=True)
sys.stdin.readline()

checkpoint = weights("checkpoints/mnist-0.safetensors")
vector = weights("vectors/mnist-0.safetensors", expression="c * mnist")
basis = weights("edits/both-0/basis.safetensors")
(root / "data/accuracy.json").write_text(json.dumps({"accuracy": 0.5, "items": 3}))
(root / "data/table.csv").write_text("a,b\\n")
tracker.end("dvc:fine_tune", "FINISHED",
            {checkpoint: "2" * 32, vector: "3" * 32, basis: "4" * 32,
             "data/accuracy.json": "5" * 32, "data/table.csv": "6" * 32}, {pretrained: "1" * 32})
tracker.close("FINISHED")
print(json.dumps(warnings))
"""

READ = """
import json
from mlflow import MlflowClient
client = MlflowClient("sqlite:///mlflow.db")
experiment = client.get_experiment_by_name("taskvec").experiment_id
print(json.dumps({
    "runs": {r.info.run_name: {
        "id": r.info.run_id, "status": r.info.status, "tags": r.data.tags,
        "metrics": r.data.metrics, "params": r.data.params,
        # search_runs leaves these out
        "inputs": [m.model_id for m in client.get_run(r.info.run_id).inputs.model_inputs],
        "outputs": [m.model_id for m in r.outputs.model_outputs],
        "files": [f.path for f in client.list_artifacts(r.info.run_id)]}
        for r in client.search_runs([experiment])},
    "models": {m.tags["dvc.path"]: {"id": m.model_id, "tags": m.tags, "type": m.model_type}
               for m in client.search_logged_models([experiment])}}))
"""


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    return {**kept, "PYTHONPATH": str(ROOT), **more}


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return a directory with the record of a run, and what could be read during the run."""
    root = tmp_path_factory.mktemp("recorded")
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", RECORD],
        cwd=root, env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "look\n"
        during = look(root)
        process.stdin.write("\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline()) == []
    assert process.returncode == 0
    return root, during


def look(root: Path) -> dict[str, Any]:
    """Return status and losses of every run, read while somebody else writes."""
    deadline = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        try:
            uri = f"{(root / 'mlflow.db').as_uri()}?mode=ro"
            with closing(sqlite3.connect(uri, uri=True)) as database:
                status = dict(database.execute("SELECT name, status FROM runs").fetchall())
                query = "SELECT step, value FROM metrics WHERE key = 'loss' ORDER BY step"
                losses = database.execute(query).fetchall()
        except sqlite3.OperationalError:
            continue  # the tables are being created
        if status.get("broken") == "FAILED":
            return {"status": status, "losses": losses}


@pytest.fixture(scope="module")
def content(recorded: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ],
        cwd=recorded[0], env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_metrics_can_be_read_while_the_stage_runs(recorded: tuple[Path, dict[str, Any]]) -> None:
    _, during = recorded
    assert during["status"]["fine_tune"] == "RUNNING"
    assert during["status"]["taskvec run"] == "RUNNING"
    assert during["losses"] == [(step, 1 / step) for step in range(1, 6)]


def test_every_stage_is_a_child_of_the_run(content: dict[str, Any]) -> None:
    runs = content["runs"]
    parent = runs.pop("taskvec run")
    assert parent["status"] == "FINISHED"
    assert parent["tags"]["host"] == "here"
    assert parent["tags"]["mlflow.source.git.commit"] == "c0ffee"
    assert {name: run["status"] for name, run in runs.items()} == {
        "pretrain": "FINISHED", "fine_tune": "FINISHED", "broken": "FAILED",
    }  # fmt: skip
    for name, run in runs.items():
        assert run["tags"]["mlflow.parentRunId"] == parent["id"]
        assert run["tags"]["dvc.stage"] == f"dvc:{name}"
        assert run["tags"]["how"] == "run"
    assert runs["fine_tune"]["tags"]["stale.because"] == "fine_tune.steps changed: 6 -> 80"
    assert runs["fine_tune"]["tags"]["prefect.task_run"] == "p2"
    runs["taskvec run"] = parent


def test_tags_hold_the_digests_of_inputs_and_outputs(content: dict[str, Any]) -> None:
    tags = content["runs"]["fine_tune"]["tags"]
    assert tags["dvc.outs"].split() == [digit * 32 for digit in "23456"]
    assert tags["dvc.deps"] == "1" * 32
    assert "dvc.deps" not in content["runs"]["pretrain"]["tags"]


def test_parameters_and_final_metrics_are_recorded(content: dict[str, Any]) -> None:
    run = content["runs"]["fine_tune"]
    assert run["params"]["fine_tune.steps"] == "80"
    assert run["params"]["fine_tune.learning_rate"] == "5e-05"
    assert run["params"]["code.yaml/python"] == "3.11"
    assert run["metrics"]["accuracy"] == 0.5 and run["metrics"]["loss"] == 0.2
    assert set(run["files"]) == {"accuracy.json", "table.csv"}


def test_names_that_mlflow_does_not_take_are_changed_and_long_values_cut(
    content: dict[str, Any],
) -> None:
    params = content["runs"]["fine_tune"]["params"]
    odd = {name: value for name, value in params.items() if name.startswith("files")}
    assert "files.odd _name_ _ 0_.png" in odd
    assert len(params) == 200
    assert max(len(value) for value in odd.values()) <= 6000


def test_weights_are_models_that_point_to_their_files(
    recorded: tuple[Path, dict[str, Any]], content: dict[str, Any]
) -> None:
    root, _ = recorded
    models = content["models"]
    assert {path: model["type"] for path, model in models.items()} == {
        "data/checkpoints/pretrained.safetensors": "checkpoint",
        "data/checkpoints/mnist-0.safetensors": "checkpoint",
        "data/vectors/mnist-0.safetensors": "task vector",
    }
    run = content["runs"]["fine_tune"]
    assert run["inputs"] == [models["data/checkpoints/pretrained.safetensors"]["id"]]
    assert set(run["outputs"]) == {
        models["data/checkpoints/mnist-0.safetensors"]["id"],
        models["data/vectors/mnist-0.safetensors"]["id"],
    }
    tags = models["data/vectors/mnist-0.safetensors"]["tags"]
    assert tags["dvc.md5"] == "3" * 32
    assert tags["taskvec.origin"] == "abc" and tags["taskvec.expression"] == "c * mnist"
    stored = [path for path in root.rglob("*") if path.is_file() and "data" not in path.parts]
    assert not [path for path in stored if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in (root / "mlartifacts").rglob("*")) < 100_000


def test_the_run_of_an_output_is_found_without_importing_mlflow(
    recorded: tuple[Path, dict[str, Any]], content: dict[str, Any]
) -> None:
    code = (
        "import json, sys; from pathlib import Path; from flows.tracking import runs_by_output\n"
        "print(json.dumps([runs_by_output(Path.cwd()), 'mlflow' in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=recorded[0], env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    runs, imported = json.loads(done.stdout)
    assert not imported
    assert set(runs) == {digit * 32 for digit in "123456"}
    assert runs["3" * 32]["run_id"] == content["runs"]["fine_tune"]["id"]
    assert runs["3" * 32]["dvc.stage"] == "dvc:fine_tune"


def test_no_record_is_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs_by_output(tmp_path) == {}
    (tmp_path / "mlflow.db").touch()  # MLflow is about to create its tables
    assert runs_by_output(tmp_path) == {}
    (tmp_path / "mlflow.db").write_text("this is no database, but it is long enough to be read")
    assert runs_by_output(tmp_path) == {}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert runs_by_output(tmp_path) == {}


def test_the_store_is_the_checkouts_own_unless_the_environment_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere")
    assert tracking_uri(tmp_path) == "http://somewhere"


def test_a_path_with_odd_characters_is_read(tmp_path: Path) -> None:
    root = tmp_path / "a b#c?d%41"
    root.mkdir()
    database = sqlite3.connect(root / "mlflow.db")
    database.executescript(
        "CREATE TABLE runs (run_uuid, lifecycle_stage, status, end_time);"
        "CREATE TABLE tags (run_uuid, key, value);"
        "INSERT INTO runs VALUES ('r1', 'active', 'FINISHED', 1), ('r2', 'active', 'FINISHED', 2),"
        " ('r3', 'active', 'FAILED', 3), ('r4', 'deleted', 'FINISHED', 4);"
        "INSERT INTO tags VALUES ('r1', 'dvc.outs', 'x y'), ('r2', 'dvc.outs', 'y'),"
        " ('r3', 'dvc.outs', 'x'), ('r4', 'dvc.outs', 'x');"
    )
    database.close()
    found = {md5: tags["run_id"] for md5, tags in runs_by_output(root).items()}
    assert found == {"x": "r1", "y": "r2"}  # the latest that finished


BROKEN = """
import json, os, time
from pathlib import Path
from flows.dag import Node
from flows.tracking import StageRecord, Tracker
warnings = []
began = time.monotonic()
tracker = Tracker(Path.cwd(), warnings.append)
tracker.start({"name": "run"})
node = Node("a", "a", "python -m tasks a", 0, 1.0, [], [], [])
for _ in range(3):
    tracker.begin(StageRecord(node, "run", "never run", ""))
    tracker.progress("a", 1, {"loss": 1.0})
    tracker.end("a", "FINISHED", {"missing.json": "x"}, {})
called = time.monotonic() - began
tracker.close("FINISHED")
print(json.dumps({"warnings": warnings, "called": called, "seconds": time.monotonic() - began}))
"""


@pytest.mark.parametrize("store", ["dead server", "no such directory", "no scheme"])
def test_a_broken_store_warns_once_and_stops_nothing(tmp_path: Path, store: str) -> None:
    uri = {
        "dead server": f"http://127.0.0.1:{free_port()}",
        "no such directory": "sqlite:////proc/no/mlflow.db",
        "no scheme": "nonsense://x",
    }[store]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BROKEN], cwd=tmp_path, text=True, check=False,
        env=environment(MLFLOW_TRACKING_URI=uri), capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    (warning,) = found["warnings"]
    assert warning.startswith("MLflow does not answer; this run is not recorded (")
    assert "\n" not in warning
    assert found["called"] < 0.5  # nobody waits for it
    assert found["seconds"] < 40
    assert "Traceback" not in done.stderr


def test_a_tracker_that_never_started_can_be_closed(tmp_path: Path) -> None:
    warnings: list[str] = []
    Tracker(tmp_path, warnings.append).close("FAILED")
    assert warnings == []


def test_an_error_without_words_is_reported_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    tracker = Tracker(tmp_path, warnings.append)

    def fail(tags: dict[str, str]) -> None:
        raise KeyError

    monkeypatch.setattr(tracker, "_open", fail)
    tracker.start({})
    tracker.begin(StageRecord(Node("a", "a", "", 0, 1.0, [], [], []), "run", "", ""))
    tracker.close("FINISHED")
    assert warnings == ["MLflow does not answer; this run is not recorded (KeyError:)"]
