"""Experiments below experiments/: own files and locks, stages shared through the run cache."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from flows import studies
from taskvec.errors import InvalidInput
from tests.project import ALL, STUDY, Project

pytestmark = pytest.mark.pipeline

NEW = {
    *(f"{stage}-{name}-0" for stage in ("fine_tune", "extract", "evaluate")
      for name in ("together", "ascent")),
    "sweep-pair-0", "few_shot-few-0", "report",
}  # fmt: skip


@pytest.fixture
def project(sending: Project) -> Project:
    """Return a project whose runs are in MLflow, too."""
    return sending


@pytest.fixture
def trial(project: Project) -> Path:
    """Return an experiment that is the repository's own and more."""
    directory = project.root / "experiments" / "trial"
    directory.mkdir(parents=True)
    text = (project.root / "params.yaml").read_text()
    (directory / "params.yaml").write_text(text + STUDY)
    return directory


def test_equal_stages_come_from_the_run_cache_and_neither_makes_the_other_stale(
    project: Project, trial: Path
) -> None:
    done = project.taskvec("run", "--experiment", "trial")
    assert done.code == 0, done.err
    assert done.stages("run") == NEW
    assert done.stages("run-cache") == ALL - {"report"}
    assert not project.stale()
    again = project.taskvec("run", "-e", "trial")
    assert again.code == 0 and "nothing to do" in again.err
    for name in ("sweeps/pair-0.csv", "few_shots/few-0.csv", "vectors/ascent-0.safetensors"):
        assert (trial / "data" / name).is_file(), name
    table = (trial / "data/sweeps/pair-0.csv").read_text().splitlines()
    assert len(table) == 1 + 3 * 3  # digits, faces, both; three coefficients each
    few = (trial / "data/few_shots/few-0.csv").read_text().splitlines()
    assert len(few) == 1 + 2 * 2 * 2  # two starts, two numbers of shots, two splits
    # DVC itself is of the same opinion, and nothing was put beside the repository's own outputs
    repro = Project(trial, project.server).command("dvc", "repro")
    assert "up to date" in repro.out + repro.err
    assert not (project.root / "data" / "sweeps").exists()
    with closing(sqlite3.connect(project.root / "mlflow.db")) as database:
        tags = dict(database.execute("SELECT value, run_uuid FROM tags WHERE key = 'experiment'"))
        paths = [row[0] for row in database.execute(
            "SELECT tag_value FROM logged_model_tags WHERE tag_key = 'dvc.path'")]  # fmt: skip
    assert set(tags) == {"trial"}
    assert "experiments/trial/data/checkpoints/together-0.safetensors" in paths


def test_an_unknown_experiment_is_named_with_the_nearest(project: Project, trial: Path) -> None:
    done = project.taskvec("run", "--experiment", "trail")
    assert done.code == 3
    assert "no experiment 'trail'; did you mean 'trial'" in done.err


def test_a_study_needs_its_data_before_anything_runs(project: Project, trial: Path) -> None:
    raw = (trial / "params.yaml").read_text()
    digest = "0" * 64
    block = raw[raw.index("  faces:\n") :]
    start = raw.index("  faces:\n") + block.index("source:")
    end = raw.index("\n", start)
    source = json.dumps({"external": "absent", "files": {"absent/faces.npy": digest}})
    (trial / "params.yaml").write_text(raw[:start] + f"source: {source}" + raw[end:])
    done = project.taskvec("run", "--experiment", "trial")
    assert done.code == 5, done.err
    assert "absent" in done.err and "absent/faces.npy" in done.err and "TASKVEC_DATA" in done.err
    assert not (trial / "data").exists()


def test_studies_are_found_by_their_parameters(project: Project, trial: Path) -> None:
    found = studies.find(project.root, [])
    assert "trial" not in found and "addition" in found
    assert list(studies.find(project.root, ["addition"])) == ["addition"]
    with pytest.raises(InvalidInput, match="did you mean 'addition'"):
        studies.find(project.root, ["adition"])
