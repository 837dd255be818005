"""`python -m benchmarks.scheduling`: from a fresh checkout to a finished scheduled run, measured.

A tiny experiment (tests/project.py) in a directory of its own: services up, deploy, a cron schedule
of every minute, its first run, services down; with SQLite, and with PostgreSQL where it is
installed. docs/scheduling.md has the table that it prints.
"""

import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import postgres
from tests.project import Project

CRON = 'cron: "* * * * *"'
RUN_SECONDS = 600
COUNT = """
import sys
import mlflow
client = mlflow.MlflowClient(sys.argv[1])
found = client.search_runs([e.experiment_id for e in client.search_experiments()])
assert all(run.info.status == "FINISHED" for run in found), found
print(len(found))
"""


def main() -> None:
    rows = [("SQLite", measure(""))]
    with postgres.running() as address:
        if address:
            rows.append(("PostgreSQL", measure(re.sub(r"\+\w+(://.*)/postgres$", r"\1/", address))))
    names = list(rows[0][1])
    print(f"| seconds | {' | '.join(kind for kind, _ in rows)} |")
    print("|---|" + "---:|" * len(rows))
    for name in names:
        print(f"| {name} | {' | '.join(f'{times[name]:.1f}' for _, times in rows)} |")


def measure(database: str) -> dict[str, float]:
    """Return what each step takes, in seconds, and how many runs MLflow has."""
    with tempfile.TemporaryDirectory() as name:
        environment = {"TASKVEC_DATABASE_URL": database} if database else {}
        project = Project.create(Path(name) / "checkout", environment)
        text = (project.root / "prefect.yaml").read_text()
        text = text.replace('cron: "0 3 * * *"', CRON).replace("active: false", "active: true", 1)
        (project.root / "prefect.yaml").write_text(text)
        times: dict[str, float] = {}
        with timed(times, "services up"):
            ok(project, "services", "up")
        try:
            with timed(times, "deploy"):
                ok(project, "deploy")
            with timed(times, "until the first scheduled run starts"):
                message(project, "Beginning flow run '")
            with timed(times, "the run: 18 stages"):
                told = message(project, "- Finished in state (Completed|Failed)\\('")
            assert "Completed" in told, told
            known = json.loads((project.root / ".taskvec/services.json").read_text())
            done = project.command(
                sys.executable, "-W", "ignore", "-c", COUNT, known["mlflow"]["url"]
            )
            times["runs in MLflow, all finished"] = float(done.out)
        finally:
            with timed(times, "services down"):
                ok(project, "services", "down")
        return times


@contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    times[name] = time.monotonic() - began
    print(f"{name}: {times[name]:.1f} s", file=sys.stderr, flush=True)


def ok(project: Project, *arguments: str) -> None:
    done = project.taskvec(*arguments)
    assert done.code == 0, done.err


def message(project: Project, pattern: str) -> str:
    """Wait for a line in the log of the worker, and return it."""
    log = project.root / ".taskvec/logs/service-worker.log"
    deadline = time.monotonic() + RUN_SECONDS
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines():
            if re.search(pattern, line):
                return line
        time.sleep(0.1)
    raise AssertionError(f"no {pattern!r} in\n{log.read_text()}")


if __name__ == "__main__":
    main()
