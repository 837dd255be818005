"""`taskvec`: quick to answer, light to import, and one line for every mistake."""

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows import locking
from tests.project import EXPERIMENT, ROOT, Project

COMMANDS = (
    "run", "status", "results", "trace", "why", "diff", "verify", "reproduce", "retract",
    "promote", "export", "backfill", "edit", "similarity", "merge", "import", "ui",
)  # fmt: skip
HEAVY = ("torch", "prefect", "mlflow", "dvc", "pandas", "rich.progress", "open_clip")

# Runs the command line, then says which of the heavy modules are loaded.
PROBE = f"""
import atexit, sys
from pathlib import Path
found = Path(sys.argv.pop(1))
atexit.register(lambda: found.write_text(" ".join(m for m in {HEAVY!r} if m in sys.modules)))
from flows.cli import main
sys.argv[0] = "taskvec"
main()
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Return a rendered checkout in which nothing has run; tests leave it as it is."""
    project = Project.create(tmp_path_factory.mktemp("project"), {})
    assert project.command(sys.executable, "-m", "flows.plan").code == 0
    return project


@pytest.fixture
def probe(project: Project, tmp_path: Path) -> "Probe":
    return Probe(project, tmp_path / "modules")


class Probe:
    """Runs `taskvec` and reports what it imported."""

    def __init__(self, project: Project, found: Path) -> None:
        self._project, self._found = project, found

    def __call__(self, *arguments: str) -> tuple["subprocess.CompletedProcess[str]", set[str]]:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROBE, str(self._found), *arguments],
            cwd=self._project.root, env=self._project.environment(), capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        return done, set(self._found.read_text().split())


def cpu_seconds(project: Project, *arguments: str) -> float:
    """Return the least user and system time of three runs."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = project.taskvec(*arguments)
        assert done.code == 0, done.err
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def test_help_is_quick_and_names_every_command(project: Project) -> None:
    assert cpu_seconds(project, "--help") < 0.6
    done = project.taskvec("--help")
    for command in COMMANDS:
        assert f" {command} " in done.out
        assert project.taskvec(command, "--help").code == 0


def test_help_imports_nothing_heavy(probe: Probe) -> None:
    done, modules = probe("--help")
    assert done.returncode == 0, done.stderr
    assert modules == set()


def test_status_asks_dvc_and_nobody_else(probe: Probe) -> None:
    done, modules = probe("status")
    assert done.returncode == 0, done.stderr
    assert modules == {"dvc"}
    assert "never run" in done.stdout


def test_a_run_that_has_nothing_to_do_imports_no_more_than_status(
    project: Project, tmp_path: Path
) -> None:
    copy = project.copy(tmp_path / "copy")
    # Commit anything as the outputs, so that all is up to date.
    code = (
        "from pathlib import Path; from flows.dag import Dag\n"
        "dag = Dag(Path.cwd())\n"
        "for node in dag.plan():\n"
        "    assert dag.begin(node.address) == 'run'\n"
        "    for out in node.outs:\n"
        "        Path(out).write_text(out)\n"
        "    dag.commit(node.address)\n"
    )
    done = copy.command(sys.executable, "-W", "ignore", "-c", code)
    assert done.code == 0, done.err
    for command in ("run", "status"):
        done, modules = Probe(copy, tmp_path / "modules")(command)
        assert done.returncode == 0, done.stderr
        assert modules == {"dvc"}
        assert "up to date" in done.stdout + done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_whatever_stops_a_command_is_told_by_its_exit_code(project: Project, number: int) -> None:
    with locking.held(project.root, "a test", wait=False):
        waiting = project.start("run", "--wait")
        assert waiting.stderr is not None
        assert "`a test`" in (first := waiting.stderr.readline())
        waiting.send_signal(number)
        _, errors = waiting.communicate(timeout=30)
    assert waiting.returncode == 128 + number, first + errors
    assert "goes on where it stopped" in errors and "Traceback" not in errors


def test_under_nohup_a_run_goes_on_when_its_terminal_is_closed(project: Project) -> None:
    with locking.held(project.root, "a test", wait=False):
        waiting = project.start("run", "--wait", deaf=[signal.SIGHUP])
        assert waiting.stderr is not None and "`a test`" in waiting.stderr.readline()
        waiting.send_signal(signal.SIGHUP)
        waiting.send_signal(signal.SIGTERM)
        waiting.communicate(timeout=30)
    assert waiting.returncode == 128 + signal.SIGTERM


def test_status_in_json_says_what_is_stale_and_why(project: Project) -> None:
    content = json.loads(project.taskvec("status", "--json", "digits").out)
    assert content["up_to_date"] is False
    assert {stage["name"] for stage in content["stages"]} >= {"prepare@digits", "evaluate@digits-0"}
    for stage in content["stages"]:
        assert stage["stale"] and stage["why"][0]["kind"] == "never run"


@pytest.mark.parametrize("command", ["status", "run"])
def test_an_unknown_target_is_answered_with_the_nearest_names(
    project: Project, command: str
) -> None:
    done = project.taskvec(command, "digts")
    assert done.code == 3
    assert done.err.startswith("error: nothing is called 'digts'; did you mean 'digits'")
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("command", ["status", "run"])
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("c * (digits + faces)", "c * (digits + fases)", "did you mean 'faces'"),
        ("seeds: [0]", "seeds: [-1]", "seeds"),
        ("steps: 6", "steps: &x 6", "anchors"),
        ("tasks:\n", "tasks: [\n", ""),
    ],
)
def test_bad_parameters_end_with_one_line_that_names_the_place(
    project: Project, tmp_path: Path, command: str, old: str, new: str, words: str
) -> None:
    assert old in EXPERIMENT
    root = tmp_path / "bad"
    root.mkdir()
    text = (project.root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace(old, new, 1))
    (root / "dvc.yaml").write_bytes((project.root / "dvc.yaml").read_bytes())
    done = Project(root).command(
        "env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "flows.cli", command
    )
    assert done.code == 3
    (line,) = done.err.splitlines()
    assert line.startswith(f"error: {root}/params.yaml:")
    assert line.split(":")[2].isdigit()
    assert words in line
    assert {path.name for path in root.iterdir()} <= {"params.yaml", "dvc.yaml", ".taskvec"}


def test_a_syntax_error_in_a_stage_is_one_line_with_its_place(
    project: Project, tmp_path: Path
) -> None:
    copy = project.copy(tmp_path / "copy")
    copy.replace("taskvec/vectors.py", "import torch\n", "import torch torch\n")
    done = copy.taskvec("status")
    assert done.code == 3
    assert done.err.startswith(f"error: {copy.root}/taskvec/vectors.py:")
    assert len(done.err.splitlines()) == 1


def test_outside_of_a_project_it_says_where_to_go(tmp_path: Path, project: Project) -> None:
    done = Project(tmp_path).command(
        "env", f"PYTHONPATH={project.root}", sys.executable, "-m", "flows.cli", "status"
    )
    assert done.code == 3
    assert "params.yaml does not exist; run taskvec in the project's root" in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [["rnu"], ["run", "--slots", "0"], ["run", "--fast"], ["trace"], ["status", "-x"]]
)
def test_a_mistake_on_the_command_line_is_a_usage_error(
    project: Project, arguments: list[str]
) -> None:
    done = project.taskvec(*arguments)
    assert done.code == 2
    assert done.err.startswith("Usage: ")
    assert "Traceback" not in done.err


def test_a_file_that_no_stage_made_has_no_trace(project: Project) -> None:
    done = project.taskvec("trace", "params.yaml")
    assert done.code == 5
    assert done.err.startswith("error: nothing recorded is called 'params.yaml': ")
    assert len(done.err.splitlines()) == 1


def test_results_before_a_run_say_how_to_get_them(project: Project) -> None:
    done = project.taskvec("results")
    assert done.code == 5
    assert "taskvec run" in done.err
    assert len(done.err.splitlines()) == 1
