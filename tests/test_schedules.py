"""What is checked and decided before a server is asked: prefect.yaml, values, databases, inputs."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows import databases, deploy, keeper, overrides, services, store, watcher
from flows.tracking import server_command, server_environment
from taskvec.errors import InvalidInput, TaskvecError
from tests.project import ROOT, Project

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # in DVC


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project.create(tmp_path_factory.mktemp("schedules") / "checkout", {})


@pytest.fixture(autouse=True)
def _no_databases(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*databases.PREFECT_VARIABLES, databases.MLFLOW_VARIABLE, databases.VARIABLE):
        monkeypatch.delenv(name, raising=False)


# prefect.yaml


def test_what_is_committed_can_be_deployed() -> None:
    assert deploy.check(ROOT) == ["run", "nightly", "study"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "deployed.py:edit_models",
            "deployed.py:edit_model",
            "no flow .*; did you mean",
        ),
        ("targets: []", "target: []", "no parameter 'target'; did you mean 'targets'"),
        ("targets: []", "targets: [digit]", "did you mean 'digits'"),
        ("targets: []", "targets: digits", "expected a list"),
        ('experiment: ""', "experiment: additon", "did you mean 'addition'"),
        ("name: addition", "name: forgeting", "did you mean 'forgetting'"),
        ("overrides: {}", "overrides: {fine_tune.step: 3}", "did you mean 'fine_tune.steps'"),
        ("overrides: {}", "overrides: {fine_tune: 3}", "fine_tune of params.yaml is a section"),
        ("overrides: {}", "overrides: {fine_tune.steps: -1}", "greater than or equal to 1"),
        ('cron: "0 3 * * *"', 'cron: "0 33 * * *"', "cron '0 33 . . .'"),
        ('cron: "0 3 * * *"', 'cron: "soon"', "expected five fields"),
        ('cron: "0 3 * * *"', "cron: '0 3 * * *'\n        interval: 5", "exactly one of cron"),
        ("timezone: Etc/UTC", "timezone: Europe/Berlino", "no time zone 'Europe/Berlino'"),
        ("        timezone: Etc/UTC\n", "", "has no timezone"),
        ("name: nightly", "name: run", "two deployments are called 'run'"),
        ("work_pool: {name: taskvec}", "work_pool: {}", "no work pool"),
        ("name: run\n", "description: run\n", "deployment 1 has no name"),
    ],
)
def test_what_prefect_yaml_gets_wrong_is_told_with_the_deployment(
    project: Project, old: str, new: str, message: str
) -> None:
    path = project.root / "prefect.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    try:
        with pytest.raises(InvalidInput, match=message) as error:
            deploy.check(project.root)
        assert str(error.value).startswith(str(path))
        assert error.value.exit_code == 3
    finally:
        path.write_text(text)


def test_deploying_without_a_server_says_how_to_start_one(project: Project) -> None:
    done = project.taskvec("deploy")
    assert done.code == 7
    assert "`taskvec services up`" in done.err


# Other values


@pytest.mark.parametrize("word", ["", "a", "=1", "a=[1]", "a={b: 1}", "a=1: 2: 3", "a='"])
def test_values_that_are_no_scalars_are_refused(word: str) -> None:
    with pytest.raises(InvalidInput, match="expected a key and a value"):
        overrides.parsed([word])


def test_values_are_read_as_in_params_yaml() -> None:
    words = ["a.b=1e-5", "c=text", "d=true", "e= 3", "f=null", "g=a=b"]
    values = {"a.b": 1e-5, "c": "text", "d": True, "e": 3, "f": None, "g": "a=b"}
    assert overrides.parsed(words) == values
    with pytest.raises(InvalidInput, match="gives 'a' twice"):
        overrides.parsed(["a=1", "a=2"])


def test_a_run_with_other_values_leaves_the_checkout_alone(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    before = project.command("git", "status", "--porcelain").out
    text = (project.root / "params.yaml").read_text()
    place = overrides.checkout(project.root, {"fine_tune.steps": 9})
    assert place.parent == project.root / ".taskvec/worktrees"
    assert "steps: 9" in (place / "params.yaml").read_text()
    assert (project.root / "params.yaml").read_text() == text
    assert project.command("git", "status", "--porcelain").out == before
    assert str(project.root / ".dvc/cache") in (place / ".dvc/config.local").read_text()
    other = overrides.checkout(project.root, {"fine_tune.steps": 10})
    assert other != place

    (place / "data").mkdir(exist_ok=True)
    (place / "data/made").write_text("by a run")
    (project.root / "params.yaml").write_text(text.replace("shots: 2", "shots: 1"))
    try:
        again = overrides.checkout(project.root, {"fine_tune.steps": 9})
    finally:
        (project.root / "params.yaml").write_text(text)
    assert again == place
    params = (place / "params.yaml").read_text()
    assert ("shots: 1" in params, "steps: 9" in params) == (True, True)
    assert (place / "data/made").read_text() == "by a run"


# Databases

URL = "postgresql://user:p%40ss-word@db.example:5433/lab?sslmode=require"


def test_one_address_names_a_database_for_each_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (databases.prefect(), databases.mlflow(), databases.create()) == ({}, "", [])
    monkeypatch.setenv(databases.VARIABLE, URL)
    place = "user:p%40ss-word@db.example:5433"
    (found,) = databases.prefect().values()
    assert found == f"postgresql+asyncpg://{place}/lab_prefect?ssl=require"
    assert databases.mlflow() == f"postgresql+psycopg2://{place}/lab_mlflow?sslmode=require"
    monkeypatch.setenv(databases.VARIABLE, "postgresql://host/")
    assert databases.mlflow() == "postgresql+psycopg2://host/taskvec_mlflow"


def test_the_variables_of_the_tools_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(databases.VARIABLE, URL)
    monkeypatch.setenv(databases.PREFECT_VARIABLES[0], "postgresql+asyncpg://other/p")
    monkeypatch.setenv(databases.MLFLOW_VARIABLE, "postgresql://other/m")
    assert databases.prefect() == {}  # the server reads its own variable
    assert databases.mlflow() == "postgresql://other/m"


@pytest.mark.parametrize(
    "url", ["mysql://u:sesame-42@h/x", "postgresql://", "sesame-42", "postgresql://u:sesame-42@h:x/",
            "postgresql://u:sesame-42@h/a/b"],
)  # fmt: skip
def test_a_wrong_address_is_refused_and_not_repeated(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv(databases.VARIABLE, url)
    with pytest.raises(InvalidInput, match="expected postgresql://") as error:
        databases.prefect()
    assert "sesame" not in str(error.value)


def test_a_run_finds_the_database_of_running_services_and_no_password_is_an_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from flows.services_file import write_services

    own = f"sqlite:///{tmp_path}/mlflow.db"
    assert store.tracking_uri(tmp_path) == own
    assert own in server_command(tmp_path, 1)
    uri = "postgresql://u:sesame-42@h/m"
    write_services(tmp_path, {"mlflow": {"url": "http://127.0.0.1:1", "store": uri}})
    assert store.tracking_uri(tmp_path) == uri
    assert "sesame-42" not in " ".join(server_command(tmp_path, 1))
    assert server_environment(tmp_path)["MLFLOW_BACKEND_STORE_URI"] == uri


# Inputs


@pytest.fixture
def watched(tmp_path: Path) -> Path:
    (tmp_path / ".taskvec").mkdir()
    (tmp_path / "tasks").mkdir()
    for name in ("params.yaml", "README.md", "tasks/report.py", "table.csv"):
        (tmp_path / name).write_text("1\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/raw.csv").write_text("1\n")
    (tmp_path / "data/made.csv").write_text("1\n")
    (tmp_path / "pictures.dvc").write_text("outs:\n- md5: x.dir\n  path: pictures\n")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/1.png").write_text("1")
    (tmp_path / ".gitignore").write_text("data\npictures/\n.taskvec\n")
    (tmp_path / "dvc.lock").write_text(
        "schema: '2.0'\nstages:\n  one:\n    cmd: x\n    deps:\n    - path: data/raw.csv\n"
        "      md5: a\n    - path: table.csv\n      md5: b\n    outs:\n    - path: data/made.csv\n"
        "      md5: c\n  two:\n    cmd: y\n    deps:\n    - path: data/made.csv\n      md5: c\n"
    )
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    return tmp_path


def git(place: Path, *words: str) -> None:
    name = ("-c", "user.name=t", "-c", "user.email=t@localhost")
    subprocess.run(["git", *name, *words], cwd=place, check=True, capture_output=True)


def commit(place: Path) -> None:
    git(place, "add", "-A")
    git(place, "commit", "-qm", "x", "--allow-empty")


def looks(found: watcher.Watcher, number: int = 2) -> list[str]:
    """Return what some looks find, the second of which finds that a file is at rest."""
    return [name for _ in range(number) for name in found.look()]


def write(name: str, text: str = "22\n") -> Callable[[Path], Any]:
    return lambda place: (place / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "committed", "expected"),
    [
        (write("params.yaml"), True, {"params.yaml"}),
        (write("params.yaml"), False, set()),
        (write("tasks/report.py"), True, {"tasks/report.py"}),
        (write("README.md"), True, set()),
        (write("table.csv"), True, {"table.csv"}),
        (write("table.csv"), False, set()),
        (write("data/raw.csv"), False, {"data/raw.csv"}),
        (write("data/raw.csv", "1\n"), False, set()),  # written again, the same
        (write("data/made.csv"), False, set()),
        (write("pictures/1.png"), False, {"pictures/1.png"}),
        (write("pictures.dvc", "outs:\n- path: pictures\n"), False, {"pictures.dvc"}),
    ],
)  # fmt: skip
def test_a_change_of_inputs_is_seen_once(
    watched: Path, change: Callable[[Path], Any], committed: bool, expected: set[str]
) -> None:
    looking = watcher.Watcher(watched)
    assert looks(looking) == []
    change(watched)
    if committed:
        commit(watched)
    assert set(looks(looking, 3)) == expected
    looking.keep()
    assert looks(looking) == []


def test_what_changed_while_nobody_looked_is_seen_at_the_next_start(watched: Path) -> None:
    looks(watcher.Watcher(watched))
    (watched / "params.yaml").write_text("3\n")
    commit(watched)
    (watched / "data/raw.csv").write_text("3\n")
    again = watcher.Watcher(watched)
    assert set(looks(again)) == {"params.yaml", "data/raw.csv"}
    again.keep()
    assert looks(watcher.Watcher(watched)) == []


def test_a_file_that_is_still_written_is_no_change_yet(watched: Path) -> None:
    looking = watcher.Watcher(watched)
    looks(looking)
    for text in ("22", "333", "4444"):
        (watched / "data/raw.csv").write_text(text)
        assert looking.look() == []
    assert looking.look() == ["data/raw.csv"]


def test_a_commit_that_is_gone_counts_as_a_change(watched: Path) -> None:
    looks(watcher.Watcher(watched))
    state = watched / ".taskvec/watched.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "commit": "0" * 40}))
    (found,) = watcher.Watcher(watched).look()
    assert found.startswith("commit ")


# What runs


def test_without_services_there_is_nothing_to_stop(project: Project) -> None:
    for command in ("status", "down"):
        done = project.taskvec("services", command)
        assert done.code == 0
        assert "no services run" in done.out + done.err
    assert services.status(project.root) == []


def test_a_wrong_database_is_told_before_anything_starts(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(databases.VARIABLE, "mysql://u:sesame-42@h/x")
    done = project.taskvec("services", "up")
    assert (done.code, "expected postgresql://" in done.err) == (3, True)
    assert "sesame" not in done.err
    assert not (project.root / ".taskvec/services.json").exists()


def test_what_a_killed_supervisor_left_counts_as_not_running(tmp_path: Path) -> None:
    from flows.services_file import write_services

    gone = {"pid": 2**22 + 1, "started": 1.0, "mark": keeper.new_mark()}
    process = {"state": "up", "probe": {}, "address": "http://x", "restarts": 2, "pid": 1}
    write_services(tmp_path, {"supervisor": gone, "processes": {"worker": process}})
    rows = services.status(tmp_path)
    assert [row["state"] for row in rows] == ["not running"]
    assert not services.healthy(rows)
    assert "2 restarts" in services.table(rows)
    services.down(tmp_path, lambda text: None)
    assert services.status(tmp_path) == []


def test_nothing_is_ended_without_a_mark() -> None:
    with pytest.raises(ValueError, match="empty mark"):
        keeper.end("")


def test_a_webhook_that_is_no_address_is_refused_and_not_repeated(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import automations

    monkeypatch.setenv(automations.VARIABLE, "sesame-42")
    with pytest.raises(TaskvecError, match="no address") as error:
        automations.create(project.root, ["run"])
    assert "sesame" not in str(error.value)


# Containers


def test_the_compose_file_is_what_its_specification_says() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec",
         str(ROOT / "compose.yaml")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_containers_show_themselves_on_loopback_only_and_hold_no_secret() -> None:
    text = (ROOT / "compose.yaml").read_text()
    found = YAML(typ="safe", pure=True).load(text)
    for name, service in found["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert "healthcheck" in service, name
        assert set(service.get("depends_on", {})) <= set(found["services"])
    mlflow = found["services"]["mlflow"]["command"]
    assert "mlflow:5000,127.0.0.1:5000,localhost:5000" in mlflow
    # every password is a variable that must be set
    for secret in ("TASKVEC_POSTGRES_PASSWORD", "TASKVEC_PREFECT_AUTH"):
        assert text.count("${" + secret) == text.count("${" + secret + ":?") >= 2
    prefect = found["services"]["prefect"]["environment"]
    assert prefect["PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED"] == "true"
    assert prefect["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"] == "http://127.0.0.1:4200"
