"""Stages that a bare `dvc repro` ran are recorded afterwards, once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows import outbox
from flows.backfill import backfill, record, unrecorded
from flows.recording import StageRecord, Tracker
from tests.project import ROOT
from tests.test_tracking import rows

GRAPH = """
stages:
  last:
    cmd: python made.py last
    deps: [middle.txt, source.txt]
    outs: [last.txt]
  middle:
    cmd: python made.py middle
    params: [seed, deep.api_key]
    deps: [source.txt]
    outs: [middle.txt]
"""
MADE = """
import sys
open(f"{sys.argv[1]}.txt", "w").write("made by " + sys.argv[1])
"""
# As `taskvec backfill` does.
BACKFILL = """
import json, sys
from pathlib import Path
from flows.backfill import backfill
from flows.dag import Dag
from taskvec.errors import ServiceUnreachable
root = Path.cwd()
entries = Dag(root).entries()
try:
    print(json.dumps([list(backfill(root, entries, print)) for _ in range(int(sys.argv[1]))]))
except ServiceUnreachable as error:
    print(json.dumps(str(error)))
"""


def run(root: Path, *words: str, **more: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    done = subprocess.run(
        words, cwd=root, capture_output=True, text=True, check=False,
        env={**kept, "PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1",
             "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **more},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def repro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project whose two stages a bare `dvc repro` has run."""
    root = tmp_path_factory.mktemp("repro")
    (root / "dvc.yaml").write_text(GRAPH)
    (root / "params.yaml").write_text("seed: 7\ndeep: {api_key: sesame-open, rate: 0.1}\n")
    (root / "source.txt").write_text("source")
    (root / "made.py").write_text(MADE)
    run(root, "dvc", "init", "--no-scm", "-q")
    run(root, "dvc", "repro", "-q")
    return root


def test_what_dvc_ran_is_recorded_once(repro: Path) -> None:
    down = {"MLFLOW_TRACKING_URI": "http://user:canary-password@127.0.0.1:9"}
    said = json.loads(run(repro, sys.executable, "-W", "ignore", "-c", BACKFILL, "1", **down))
    assert said.startswith("MLflow does not answer (") and "taskvec backfill` again" in said
    assert "canary" not in said
    assert [item["mlflow_run"] for item in outbox.executions(repro)] == ["", ""]

    first, second = json.loads(run(repro, sys.executable, "-W", "ignore", "-c", BACKFILL, "2"))
    assert first == ["0 of 2 stages were not recorded", "1 run was sent to MLflow"]
    assert second == ["0 of 2 stages were not recorded"]
    found = list(outbox.executions(repro))
    assert [item["stage"] for item in found] == ["middle", "last"]
    assert {item["how"] for item in found} == {"backfill"}
    assert all(item["mlflow_run"] and item["status"] == "FINISHED" for item in found)
    assert found[1]["deps"].keys() == {"middle.txt", "source.txt"}
    assert found[1]["deps"]["middle.txt"] == found[0]["outs"]["middle.txt"]
    assert found[1]["command"] == "python made.py last"

    database = repro / "mlflow.db"
    assert rows(database, "SELECT COUNT(*) FROM runs") == [(3,)]
    how = rows(database, "SELECT COUNT(*) FROM tags WHERE key = 'how' AND value = 'backfill'")
    assert how == [(3,)]
    params = dict(rows(database, "SELECT key, value FROM params"))
    assert params == {"seed": "7", "deep.api_key": "***"}


def entry(outs: dict[str, str], deps: dict[str, str], **params: Any) -> dict[str, Any]:
    return {
        "cmd": "python -m tasks x",
        "outs": [{"path": path, "md5": md5} for path, md5 in outs.items()],
        "deps": [{"path": path, "md5": md5} for path, md5 in deps.items()],
        "params": {"params.yaml": params, "code.yaml": {"x": "1"}},
    }


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_only_what_a_run_recorded_counts_as_recorded(tmp_path: Path) -> None:
    outs, deps = {"data/a": "a" * 32, "data/b": "b" * 32}, {"data/c": "c" * 32}
    entries = {"x": entry(outs, deps, seed=1)}
    assert [found.address for found in unrecorded(tmp_path, entries)] == ["x"]
    for status, left in (("FAILED", ["x"]), ("FINISHED", [])):
        tracker = Tracker(tmp_path, pytest.fail)
        tracker.keep({"name": "run"})
        tracker.begin(StageRecord("x", "x", "python -m tasks x", {}, "run"))
        tracker.end("x", status, outs, deps)
        tracker.close(status)
        assert [found.address for found in unrecorded(tmp_path, entries)] == left
    for other in (entry({"data/a": "a" * 32}, deps), entry(outs, {"data/c": "d" * 32})):
        assert len(unrecorded(tmp_path, {"x": other})) == 1
    assert len(unrecorded(tmp_path, {"edits/dvc.yaml:x": entries["x"]})) == 1


def test_an_experiment_is_not_taken_for_the_repository(tmp_path: Path) -> None:
    root = tmp_path / "experiments" / "addition"
    (root / "data").mkdir(parents=True)
    entries = {"x": entry({"data/a": "a" * 32}, {})}
    record(root, unrecorded(root, entries), pytest.fail)
    assert unrecorded(root, entries) == []
    assert len(unrecorded(tmp_path, entries)) == 1
    (item,) = outbox.executions(tmp_path)
    assert (item["experiment"], item["outs"]) == ("addition", {"data/a": "a" * 32})


def test_stages_come_after_those_whose_files_they_read(tmp_path: Path) -> None:
    names = ["d", "c", "b", "a", "e"]
    above = {"d": ["c"], "c": ["b"], "b": ["a"], "a": [], "e": ["a", "d"]}
    entries = {n: entry({n: n * 32}, {d: d * 32 for d in above[n]}) for n in names}
    order = [found.address for found in unrecorded(tmp_path, entries)]
    assert sorted(order) == sorted(names)
    assert all(order.index(d) < order.index(n) for n in names for d in above[n])


def test_nothing_to_record_leaves_no_log(tmp_path: Path) -> None:
    record(tmp_path, [], pytest.fail)
    assert outbox.logs(tmp_path) == []
    assert list(backfill(tmp_path, {}, pytest.fail)) == ["0 of 0 stages were not recorded"]
