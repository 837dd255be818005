"""`python -m flows.studies [NAME ...]`: run all studies, or some, one after the other.

A study whose data is not there is left out and named. A run that was stopped goes on where it was.
"""

import subprocess
import sys
import time
from pathlib import Path

from tasks.artifacts import experiments
from taskvec import params as parameters
from taskvec.datasets import external
from taskvec.errors import InvalidInput, TaskvecError, nearest
from taskvec.params import Params


def main(names: list[str]) -> int:
    """Run studies and collect their pages; return the exit code."""
    try:
        studies = find(Path.cwd(), names)
        ready = {name: params for name, params in studies.items() if _has_data(name, params)}
    except TaskvecError as error:
        _say(str(error))
        return error.exit_code
    budget = sum(params.budget_minutes or 0 for params in ready.values())
    _say(f"{len(ready)} studies, at most {budget} minutes on two cores: {', '.join(ready)}")
    failed = []
    for name, params in ready.items():
        _say(f"\n{name}: at most {params.budget_minutes} minutes")
        started = time.monotonic()
        if _taskvec("run", "--experiment", name):
            failed.append(name)
        _say(f"{name}: {(time.monotonic() - started) / 60:.1f} minutes")
    if failed:
        _say(f"failed: {', '.join(failed)}; the same command goes on where they stopped")
        return 1
    return _taskvec("run", "report-studies") if ready else 0


def find(root: Path, names: list[str]) -> dict[str, Params]:
    """Return the experiments below ``root`` that are studies: name -> parameters.

    Raises:
        InvalidInput: one of the names is no study.
    """
    found = {}
    for name, directory in experiments(root).items():
        params = parameters.load(directory / "params.yaml")
        if params.study:
            found[name] = params
    for name in names:
        if name not in found:
            raise InvalidInput(f"no study {name!r}; {nearest(name, found)}")
    return {name: params for name, params in found.items() if not names or name in names}


def _has_data(name: str, params: Params) -> bool:
    lines = external.missing(params.tasks)
    if lines:
        _say("\n  ".join([f"{name} is left out, data is missing:", *lines]))
    return not lines


def _taskvec(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "flows.cli", *arguments], check=False).returncode


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
