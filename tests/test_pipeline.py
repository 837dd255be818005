"""The whole pipeline on a tiny experiment: what reruns, what is recorded, what survives a kill."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from ruamel.yaml import YAML

from flows import outbox
from flows.records import chunks
from tests.project import ALL, CANARY, Project, result

pytestmark = pytest.mark.pipeline


def wait_until(condition: "object", seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def stage_processes(driver: int) -> list[psutil.Process]:
    """Return the running stage processes below a driver: children of its fork server."""
    found = []
    for child in psutil.Process(driver).children():
        if "forkserver" in " ".join(_command(child)):
            found += child.children()
    return found


def test_the_flow_and_dvc_repro_leave_byte_identical_lock_files(
    finished: Project, project: Project
) -> None:
    # some stages are executed again, by DVC
    names = ["prepare@digits", "fine_tune@digits-0", "edits/dvc.yaml:search-both-0", "report"]
    for kept in (".dvc/cache/runs", "dvc.lock", "edits/dvc.lock"):
        place = project.root / kept
        assert place.exists()
        if place.is_dir():
            shutil.rmtree(place)
    for name in ("dvc.lock", "edits/dvc.lock"):
        entries = YAML(typ="safe").load((finished.root / name).read_text())
        for stage in entries["stages"].values():
            stage["cmd"] = "never run so"
        with (project.root / name).open("w") as file:
            YAML().dump(entries, file)
    done = project.command("dvc", "repro", "--force", "--single-item", *names)
    assert done.code == 0, done.err
    for name in ("dvc.lock", "edits/dvc.lock"):
        found, expected = (
            dict(chunks((root / name).read_text())) for root in (project.root, finished.root)
        )
        assert found.keys() == expected.keys()
        again = {stage for stage, text in found.items() if "never run so" not in text}
        assert again == {stage.rpartition(":")[2] for stage in names} & expected.keys()
        assert again and {s: found[s] for s in again} == {s: expected[s] for s in again}


def test_nothing_changed_runs_nothing_and_imports_nothing_heavy(project: Project) -> None:
    code = (
        "import sys; sys.argv = ['taskvec', 'run']\n"
        "from flows.cli import app; app(standalone_mode=False)\n"
        "print([m for m in ('torch', 'prefect', 'mlflow') if m in sys.modules])"
    )
    done = project.command(sys.executable, "-c", code)
    assert done.code == 0, done.err
    assert "nothing to do" in done.err
    assert done.out.strip() == "[]"
    repro = project.command("dvc", "repro")
    assert "up to date" in repro.out + repro.err


def test_a_changed_range_reruns_the_search_of_its_edit_alone_and_put_back_nothing(
    project: Project,
) -> None:
    before = (project.root / "dvc.lock").read_bytes()
    text = (project.root / "params.yaml").read_text()
    project.replace("params.yaml", "{c: {low: 0, high: 1, points: 3}}\n    objective: {min",
                    "{c: {low: 0, high: 1, points: 4}}\n    objective: {min")  # fmt: skip
    reasons = project.stale()
    assert set(reasons) == {"search-forget-0", "evaluate-forget-0", "report"}
    assert reasons["search-forget-0"] == ["edits.forget.coefficients.c.points changed: 3 -> 4"]
    done = project.taskvec("run")
    assert done.code == 0, done.err
    assert done.stages("run") | done.stages("unchanged") == set(reasons)
    assert "search-forget-0" in done.stages("run") and "report" in done.stages("run")
    assert not project.stale()
    # what was made before comes from the run cache
    (project.root / "params.yaml").write_text(text)
    done = project.taskvec("run")
    assert done.code == 0, done.err
    assert not done.stages("run")
    assert "search-forget-0" in done.stages("run-cache")
    assert (project.root / "dvc.lock").read_bytes() == before


def test_changed_fine_tuning_reruns_its_chain_and_what_uses_it(project: Project) -> None:
    project.replace("params.yaml", 'templates: ["a photo of a {}."]}\n    fine_tune: {}',
                    'templates: ["a photo of a {}."]}\n    fine_tune: {steps: 7}')  # fmt: skip
    # `forget` does not contain the faces vector, so its basis stays; its constraint is on faces.
    assert set(project.stale()) == {
        "fine_tune@faces-0", "extract@faces-0", "evaluate@faces-0",
        "combine-both-0", "search-both-0", "evaluate-both-0",
        "search-forget-0", "evaluate-forget-0", "report",
    }  # fmt: skip


def test_comments_and_unused_methods_make_nothing_stale(project: Project) -> None:
    project.replace("taskvec/vectors.py", "import torch\n", "# why torch: tensors\nimport torch\n")
    project.replace("taskvec/vectors.py", "class TaskVector:\n", "class TaskVector:  # tau\n")
    (project.root / "taskvec/merging/novel.py").write_text(
        '"""Unused."""\n\n\ndef novel(x: int) -> int:\n    """Return x."""\n    return x\n'
    )
    assert not project.stale()


def test_changed_code_reruns_what_reaches_it(project: Project) -> None:
    project.replace("taskvec/metrics.py", "Z95 = 1.959963984540054", "Z95 = 1.96")
    reasons = project.stale()
    assert reasons["evaluate@digits-0"] == ["its code changed"]
    assert "fine_tune@digits-0" not in reasons and "head@digits" not in reasons


def test_a_new_task_does_not_rerun_the_base_but_changed_alignment_pictures_do(
    project: Project,
) -> None:
    params = project.root / "params.yaml"
    text = params.read_text()
    start, end = text.index("  digits:\n"), text.index("  faces:\n")
    more = text[start:end].replace("  digits:", "  digits_inverted:", 1)
    more = more.replace("dataset: digits\n", "dataset: digits\n      options: {invert: true}\n")
    params.write_text(text[:end] + more + text[end:])
    assert set(project.stale()) == {
        f"{stage}@digits_inverted{seed}"
        for stage, seed in (("prepare", ""), ("head", ""), ("fine_tune", "-0"), ("extract", "-0"),
                            ("evaluate", "-0"))
    } | {"report"}  # fmt: skip
    params.write_text(text.replace("train: 200", "train: 190"))
    assert "pretrain" in project.stale()  # until `prepare` shows that the pictures are equal
    done = project.taskvec("run", "pretrain")
    assert done.code == 0, done.err
    assert "pretrain" in done.stages("unchanged")
    params.write_text(text.replace("shots: 2", "shots: 3"))
    status = project.taskvec("status")
    assert "every vector then gets a new origin" in status.out


def test_a_killed_stage_is_tried_again(project: Project) -> None:
    project.replace("params.yaml", "{steps: 6,", "{steps: 60,")
    driver = project.start("run", "fine_tune")
    wait_until(lambda: stage_processes(driver.pid))
    stage_processes(driver.pid)[0].kill()
    out, errors = driver.communicate(timeout=300)
    done = result(driver.returncode, out, errors)
    assert done.code == 0, done.err
    assert "exit code -9" in done.err and "trying again" in done.err
    assert done.stages("run") == {"fine_tune@digits-0", "fine_tune@faces-0"}


def test_a_run_can_be_watched_and_stopped(sending: Project) -> None:
    project = sending
    project.replace("params.yaml", "{steps: 6,", "{steps: 600,")
    driver = project.start("run", "fine_tune@digits-0")

    def loss_of_a_running_stage() -> list[object]:
        with sqlite3.connect(f"file:{project.root}/mlflow.db?mode=ro", uri=True) as database:
            return database.execute(
                "SELECT m.value FROM metrics m JOIN runs r ON r.run_uuid = m.run_uuid "
                "WHERE r.status = 'RUNNING' AND r.name = 'fine_tune@digits-0' AND m.key = 'loss'"
            ).fetchall()

    wait_until(loss_of_a_running_stage, seconds=120)
    assert driver.poll() is None
    running = psutil.Process(driver.pid).children(recursive=True)
    assert running and not any(CANARY in " ".join(_command(process)) for process in running)
    started = time.monotonic()
    os.killpg(driver.pid, signal.SIGINT)
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert "goes on where this stopped" in errors and "Traceback" not in errors
    assert time.monotonic() - started < 15


def test_mlflow_holds_the_run_its_stages_and_models_without_copies(finished: Project) -> None:
    code = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient("sqlite:///mlflow.db")
experiment = client.get_experiment_by_name("taskvec").experiment_id
found = client.search_runs([experiment], max_results=200)
runs = [client.get_run(run.info.run_id) for run in found]
models = client.search_logged_models([experiment], max_results=200)
print(json.dumps({
    "runs": [{"name": r.info.run_name, "status": r.info.status, "tags": r.data.tags,
              "id": r.info.run_id, "metrics": r.data.metrics, "params": r.data.params,
              "inputs": [m.model_id for m in r.inputs.model_inputs]} for r in runs],
    "models": [{"id": m.model_id, "tags": m.tags} for m in models]}))
"""
    done = finished.command(sys.executable, "-W", "ignore", "-c", code)
    content = json.loads(done.out.splitlines()[-1])
    parents = [run for run in content["runs"] if "mlflow.parentRunId" not in run["tags"]]
    stages = {run["name"]: run for run in content["runs"] if "mlflow.parentRunId" in run["tags"]}
    assert len(parents) == 1 and parents[0]["status"] == "FINISHED"
    assert parents[0]["tags"]["prefect.flow_run"]
    assert parents[0]["tags"]["mlflow.source.git.commit"]
    assert set(stages) == ALL
    for run in stages.values():
        assert run["tags"]["mlflow.parentRunId"] == parents[0]["id"]
        assert run["tags"]["prefect.task_run"] and run["tags"]["dvc.outs"]
    lock = (finished.root / "edits/dvc.lock").read_text()
    search = stages["search-both-0"]
    assert all(md5 in lock for md5 in search["tags"]["dvc.outs"].split())
    assert search["params"]["edits.both.coefficients.c.points"] == "3"
    assert "coefficient.c" in search["metrics"]
    by_path = {model["tags"]["dvc.path"]: model for model in content["models"]}
    assert set(by_path) == {
        "data/checkpoints/pretrained.safetensors",
        *(f"data/{kind}/{t}-0.safetensors" for kind in ("checkpoints", "vectors")
          for t in ("digits", "faces")),
        *(f"data/edits/{edit}-0/model.safetensors" for edit in ("both", "forget")),
    }  # fmt: skip
    vectors = {by_path[f"data/vectors/{task}-0.safetensors"]["id"] for task in ("digits", "faces")}
    assert set(stages["combine-both-0"]["inputs"]) == vectors
    assert not list((finished.root / "mlartifacts").rglob("*.safetensors"))


def test_prefect_shows_the_run_and_its_table(finished: Project) -> None:
    code = """
import anyio, json, sys
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
async def main():
    this = FlowRunFilter(id={"any_": sys.argv[1:]})
    async with get_client() as client:
        tasks = [run.name for run in await client.read_task_runs(flow_run_filter=this)]
        found = await client.read_artifacts(flow_run_filter=this)
        tables = [a.data for a in found if a.key == "stages"]
    print(json.dumps({"tasks": tasks, "tables": tables}))
anyio.run(main)
"""
    (log,) = outbox.logs(finished.root)
    begun = json.loads(log.read_text().splitlines()[0])
    flow_run = begun["tags"]["prefect.flow_run"]
    done = finished.command(sys.executable, "-W", "ignore", "-c", code, flow_run)
    content = json.loads(done.out.splitlines()[-1])
    assert set(content["tasks"]) == ALL
    (table,) = content["tables"]
    assert "search-both-0" in table


def test_prefect_is_told_which_files_were_made_of_which(finished: Project) -> None:
    code = """
import anyio, json
from prefect.client.orchestration import get_client
async def main():
    async with get_client() as client:
        found, asked = [], {"filter": {"event": {"prefix": ["prefect.asset"]}}, "limit": 50}
        page = (await client._client.post("/events/filter", json=asked)).json()
        while page["events"]:
            found += page["events"]
            if not page["next_page"]:
                break
            page = (await client._client.get(page["next_page"])).json()
    print(json.dumps(found))
anyio.run(main)
"""
    done = finished.command(sys.executable, "-W", "ignore", "-c", code)
    assert done.code == 0, done.err
    project = finished.root.name
    made: dict[str, Any] = {}
    for event in json.loads(done.out.splitlines()[-1]):
        key = event["resource"]["prefect.resource.id"]
        if event["event"].endswith("materialization.succeeded") and f"//{project}/" in key:
            made[key.removeprefix(f"dvc://{project}/")] = event
    locked = {
        item["path"]: item["md5"]
        for name in ("dvc.lock", "edits/dvc.lock")
        for entry in YAML(typ="safe").load((finished.root / name).read_text())["stages"].values()
        for item in entry["outs"]
    }
    assert {path: event["payload"]["md5"] for path, event in made.items()} == locked
    event = made["data/vectors/digits-0.safetensors"]
    roles = [(item["prefect.resource.role"], item["prefect.resource.id"])
             for item in event["related"]]  # fmt: skip
    for name in ("pretrained", "digits-0"):
        assert ("asset", f"dvc://{project}/data/checkpoints/{name}.safetensors") in roles
    assert {"flow-run", "task-run"} <= {role for role, _ in roles}


def test_no_secret_of_the_environment_is_written_anywhere(finished: Project) -> None:
    places = [finished.root, Path(finished.server["PREFECT_HOME"])]
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert {"mlflow.db", "dvc.lock", "prefect.db"} <= {path.name for path in files}
    found = []
    for path in files:
        with suppress(FileNotFoundError):  # the server works meanwhile
            if CANARY.encode() in path.read_bytes():
                found.append(path)
    assert found == [finished.root / ".env"]


def test_trace_leads_from_an_edited_model_back_to_the_data(finished: Project) -> None:
    done = finished.taskvec("trace", "data/edits/both-0/model.safetensors", "--json")
    assert done.code == 0, done.err
    chain = {link["stage"]: link for link in json.loads(done.out)["chain"]}
    assert set(chain) == {
        "search-both-0", "combine-both-0", "pretrain",
        *(f"{stage}@{task}{seed}" for task in ("digits", "faces") for stage, seed in (
            ("prepare", ""), ("head", ""), ("fine_tune", "-0"), ("extract", "-0"),
            ("evaluate", "-0"))),
    }  # fmt: skip
    source = chain["prepare@digits"]["parameters"]["tasks.digits.data"]["source"]
    assert source["package"] == "scikit-learn"
    assert chain["search-both-0"]["run"]["MLflow run"]
    missing = finished.taskvec("trace", "README.md")
    assert missing.code == 5


def test_dvc_shows_metrics_and_plots_and_runs_experiments(project: Project) -> None:
    metrics = project.command("dvc", "metrics", "show", "--json")
    assert "data/evaluations/both-0.json" in metrics.out
    plots = project.command("dvc", "plots", "show", "--json")
    assert "data/edits/both-0/search.csv" in plots.out
    project.command("git", "add", "-A")
    project.command(
        "git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "locks"
    )  # fmt: skip
    done = project.command("dvc", "exp", "run", "-S", "edits.forget.coefficients.c.points=2")
    assert done.code == 0, done.err
    assert "Ran experiment" in done.out


def test_a_run_without_a_server_starts_one_and_leaves_no_process(sending: Project) -> None:
    project = Project(sending.root)
    project.replace(
        "params.yaml", "points: 3}}\n    objective: {min", "points: 2}}\n    objective: {min"
    )
    driver = project.start("run")
    seen: set[psutil.Process] = set()
    commands: set[str] = set()
    while driver.poll() is None:
        try:
            below = psutil.Process(driver.pid).children(recursive=True)
            seen |= set(below)
            commands |= {" ".join(_command(process)) for process in below}
        except psutil.NoSuchProcess:
            break
        time.sleep(0.2)
    _, errors = driver.communicate()
    assert driver.returncode == 0, errors
    assert any("flows.keeper" in command for command in commands)
    _, alive = psutil.wait_procs(seen, timeout=10)
    assert not alive, [_command(process) for process in alive]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("c * (digits + faces)", "c * (digits + fases)", "did you mean 'faces'"),
        ("  both:\n", "  'bo; th':\n", "is no name"),
        ("expression: -c * digits", "expression: -k * digits", "coefficient needs a range"),
        ("tasks: [faces], min_ratio", "tasks: [elephants], min_ratio", "not evaluated"),
        ("learning_rate: 1e-4", "learning_rate: .nan", "learning_rate"),
        ("steps: 6", "steps: many", "found 'many'"),
        ("seeds: [0]", "seeds: [0]\nsedes: 1", "unknown key"),
    ],
)
def test_bad_parameters_stop_before_any_work(
    project: Project, old: str, new: str, words: str
) -> None:
    project.replace("params.yaml", old, new)
    before = snapshot(project.root)
    done = project.taskvec("run")
    assert done.code == 3
    assert words in done.err
    assert "params.yaml:" in done.err
    assert "Traceback" not in done.err
    assert snapshot(project.root) == before


def test_a_wrong_digest_of_a_data_file_stops_the_run(project: Project) -> None:
    text = (project.root / "params.yaml").read_text()
    digest = text.split('digits.csv.gz": "')[1][:64]
    project.replace("params.yaml", digest, "0" * 64)
    lock = (project.root / "dvc.lock").read_bytes()
    done = project.taskvec("run")
    assert done.code == 3
    assert "wrong digest" in done.err and "0" * 64 in done.err
    assert (project.root / "dvc.lock").read_bytes() == lock


def snapshot(root: Path) -> dict[str, bytes]:
    """Return the files that a run would change."""
    listing = subprocess.run(
        ["git", "status", "--porcelain", "-z"], cwd=root, capture_output=True, check=True
    )
    names = ("dvc.yaml", "dvc.lock", "edits/dvc.yaml", "edits/dvc.lock", "code.yaml", "mlflow.db")
    return {"git": listing.stdout, **{name: (root / name).read_bytes() for name in names}}
