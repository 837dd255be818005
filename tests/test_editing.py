"""Edits outside params.yaml, similarity, and where such models came from."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from flows import editing
from taskvec import headers
from taskvec.errors import InvalidInput
from taskvec.vectors import TaskVector
from tests.project import Project

pytestmark = pytest.mark.pipeline

READ = """
import json
from mlflow import MlflowClient
client = MlflowClient("sqlite:///mlflow.db")
experiment = client.get_experiment_by_name("taskvec").experiment_id
runs = [r for r in client.search_runs([experiment]) if r.info.run_name == "taskvec edit"]
print(json.dumps([{
    "status": run.info.status, "tags": run.data.tags, "metrics": run.data.metrics,
    "parents": [client.get_logged_model(m.model_id).name
                for m in client.get_run(run.info.run_id).inputs.model_inputs],
    "outputs": [client.get_logged_model(m.model_id).name for m in run.outputs.model_outputs],
} for run in runs]))
"""


def test_an_edit_at_the_chosen_coefficient_is_the_edited_model_of_the_pipeline(
    project: Project, tmp_path: Path
) -> None:
    chosen = json.loads((project.root / "data/edits/both-0/coefficients.json").read_text())
    out = tmp_path / "model.safetensors"
    at = f"c={chosen['coefficient.c']}"
    done = project.taskvec("edit", "c * (faces + digits)", "--at", at, "--out", str(out))
    assert done.code == 0, done.err
    mine = load_file(out)
    theirs = load_file(project.root / "data/edits/both-0/model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(mine[name].numpy().tobytes() == theirs[name].numpy().tobytes() for name in mine)
    assert not project.stale()


def test_an_edit_by_a_method_is_evaluated_and_recorded_and_traced(
    sending: Project, tmp_path: Path
) -> None:
    project = sending
    out = tmp_path / "merged.safetensors"
    expression = 'c * ties(digits, faces, density=0.3, variant="sum")'
    done = project.taskvec(
        "edit", expression, "--at", "c=0.5", "--out", str(out), "--evaluate", "--task", "digits"
    )
    assert done.code == 0, done.err
    assert "accuracy on validation data" in done.out
    assert "digits" in done.out
    assert "faces" not in done.out
    (run,) = json.loads(project.command("python", "-c", READ).out)
    assert run["status"] == "FINISHED"
    assert run["tags"]["taskvec.expression"].startswith("c * ties(digits, faces, density=0.3")
    assert 0 <= run["metrics"]["validation.accuracy.digits"] <= 1
    assert sorted(run["parents"]) == [
        "checkpoints-pretrained", "vectors-digits-0", "vectors-faces-0"
    ]  # fmt: skip
    assert len(run["outputs"]) == 1

    traced = project.taskvec("trace", str(out), "--json")
    assert traced.code == 0, traced.err
    chain = json.loads(traced.out)
    assert (
        chain["fingerprint"] == headers.read_metadata(headers.read_header(out), out)["fingerprint"]
    )
    stages = [link["stage"] for link in chain["chain"]]
    assert stages[0].startswith("taskvec edit ")
    for wanted in ("extract@digits-0", "fine_tune@faces-0", "prepare@digits", "pretrain"):
        assert any(stage.endswith(wanted) for stage in stages), wanted
    assert chain["chain"][0]["parameters"]["coefficients"] == {"c": 0.5}


def test_without_coefficients_that_move_the_edit_is_the_pre_trained_model(
    project: Project, tmp_path: Path
) -> None:
    out = tmp_path / "same.safetensors"
    done = project.taskvec("edit", "c * digits", "--at", "c=0", "--out", str(out))
    assert done.code == 0, done.err
    mine, base = load_file(out), load_file(project.root / "data/checkpoints/pretrained.safetensors")
    assert all(mine[name].numpy().tobytes() == base[name].numpy().tobytes() for name in base)


@pytest.mark.parametrize(
    ("expression", "at", "tasks", "split", "said"),
    [
        ("c * digits", "", None, "validation", "neither a task nor a coefficient"),
        ("c * digits", "c=x", None, "validation", "expected a coefficient and a number"),
        ("c * digits", "c=nan", None, "validation", "expected a coefficient and a number"),
        ("c * digits", "c=1 c=2", None, "validation", "twice"),
        ("c * digits", "c=1,d=2", None, "validation", "values are given for c, d"),
        ("c * digist", "c=1", None, "validation", "did you mean 'digits'"),
        ("c * ties(digits, density=[0.1, 0.2])", "c=1", None, "validation", "has 2 values"),
        ("c * digits", "c=1", ["mnist"], "validation", "unknown task 'mnist'"),
        ("c * digits", "c=1", [], "train", "validation or test"),
    ],
)
def test_a_wrong_edit_is_refused_before_anything_is_written(
    finished: Project, tmp_path: Path, expression: str, at: str, tasks: list[str] | None,
    split: str, said: str,
) -> None:  # fmt: skip
    out = tmp_path / "model.safetensors"
    with pytest.raises(InvalidInput, match=re.escape(said)):
        editing.edit(finished.root, expression, at.split(), out, None, tasks, split)
    assert not list(tmp_path.iterdir())


def test_an_edit_does_not_overwrite_what_belongs_to_stages(finished: Project) -> None:
    for out in ("data/vectors/digits-0.safetensors", "model.pt"):
        done = finished.taskvec("edit", "digits", "--out", out)
        assert done.code == 3, out
        assert "Traceback" not in done.err
    assert not finished.stale()


def test_vectors_of_a_seed_that_never_ran_are_missing(finished: Project, tmp_path: Path) -> None:
    out = str(tmp_path / "x.safetensors")
    done = finished.taskvec("edit", "digits", "--seed", "7", "--out", out)
    assert done.code == 5
    assert "digits-7.safetensors" in done.err


def test_a_file_that_nobody_made_cannot_be_traced(finished: Project, tmp_path: Path) -> None:
    (tmp_path / "alien.safetensors").write_bytes(b"nothing")
    done = finished.taskvec("trace", str(tmp_path / "alien.safetensors"))
    assert done.code == 5
    assert "nothing recorded is called" in done.err


def test_similarity_prints_and_draws_the_cosines(finished: Project, tmp_path: Path) -> None:
    page = tmp_path / "similarity.html"
    done = finished.taskvec("similarity", "--json", "--plot", str(page))
    assert done.code == 0, done.err
    found = json.loads(done.out)
    vectors = {
        task: TaskVector.load(finished.root / f"data/vectors/{task}-0.safetensors")
        for task in ("digits", "faces")
    }
    cosine = vectors["digits"].cosine(vectors["faces"])
    assert found["whole"]["digits"]["faces"] == pytest.approx(cosine, abs=1e-12)
    assert found["whole"]["digits"]["digits"] == 1
    assert all(-1 <= row["digits, faces"] <= 1 for row in found["by layer"].values())
    assert len(found["by layer"]) > 1
    assert page.read_text().count("<svg") == 2
    told = finished.taskvec("similarity", "digits", "faces", "--plot", str(page))
    assert f"{cosine:.3f}" in told.out
    assert finished.taskvec("similarity", "digits").code == 3
