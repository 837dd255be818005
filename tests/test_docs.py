"""The documents say what is true: code runs, commands exist, the results are those of the stage."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_of_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", block], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_the_first_edit_of_the_readme_is_valid() -> None:
    from taskvec import params

    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    text = (ROOT / "params.yaml").read_text() + block
    from ruamel.yaml import YAML

    loaded = params.validate(YAML(typ="rt", pure=True).load(text))
    assert loaded.edits["two_tasks"].evaluate == ["letters", "faces"]


def test_every_command_is_in_the_readme() -> None:
    from flows.cli import app

    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        assert f"`taskvec {name}" in README


def test_every_stage_is_in_the_graph_and_every_exit_code_in_the_readme() -> None:
    from tasks.stages import NAMES
    from taskvec import errors

    files = ("dvc.yaml", "edits/dvc.yaml", "experiments/addition/dvc.yaml")
    graph = "".join((ROOT / name).read_text() for name in files)
    few = (ROOT / "experiments/analogy/dvc.yaml").read_text()
    assert "python -m tasks few_shot" in few
    for name in set(NAMES) - {"few_shot"}:
        assert f"python -m tasks {name}" in graph
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.TaskvecError):
            assert re.search(rf"\b{kind.exit_code} \w", README)


def test_the_readme_holds_the_results_of_the_report_stage() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from copy_results import with_results  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    results = ROOT / "docs/results/default.md"
    if not results.is_file():
        pytest.fail("docs/results/default.md is missing; make results")
    assert with_results(README, results.read_text()) == README


def test_every_method_is_described_with_its_options_and_their_defaults() -> None:
    from taskvec import plugins

    text = (ROOT / "docs/method.md").read_text()
    described = dict(re.findall(r"^\*\*.*`(\w+)\((.*?)\)`\*\*$", text, re.M))
    methods = plugins.names("merging")
    assert sorted(described) == methods
    for method in methods:
        given = dict(re.findall(r"(\w+)=([^,]+)", described[method]))
        required = {"task": "a"} if method == "tall_mask" else {}
        options = plugins.complete("merging", method, required)
        assert given.keys() == options.keys(), method
        for name, value in options.items():
            shown = given[name].strip('"')
            assert shown == value if isinstance(value, str) else float(shown) == value, method


def test_constraints_pin_every_dependency_that_is_declared() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    pinned = {
        re.sub(r"[-_.]+", "-", line.split("==")[0]).lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    for requirement in wanted:
        name = re.split(r"[\[<>=!~ ]", requirement)[0]
        if name == project["name"]:  # an extra that is made of another one
            continue
        assert re.sub(r"[-_.]+", "-", name).lower() in pinned, name
