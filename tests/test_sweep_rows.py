"""Rows of sweeps in the lineage: edits that no stage ever wrote."""

import csv
import hashlib
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows import trace
from flows.lineage import Lineage
from taskvec.errors import MissingArtifact

BASE = "data/checkpoints/pretrained.safetensors"
VECTOR = "data/vectors/{}-0.safetensors"
TABLE = "data/sweeps/pairs-0.csv"
ROWS = [
    # subset, coefficient, screen, objective, chosen
    ("a", 0.5, True, 0.1, False),
    ("a", 0.5, False, 0.5, False),
    ("a", 1.0, False, 0.7, True),
    ("a+b", 0.5, True, 0.6, False),
    ("a+b", 1.0, False, 0.8, True),
    ("b", 0.5, False, 0.4, True),
]


def entry(command: str, deps: dict[str, str], outs: dict[str, str]) -> dict[str, Any]:
    def listed(found: dict[str, str]) -> list[dict[str, str]]:
        return [{"path": path, "hash": "md5", "md5": md5} for path, md5 in found.items()]

    return {"cmd": f"python -m tasks {command}", "deps": listed(deps), "outs": listed(outs)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a repository with a lock file and the table of a sweep."""
    md5 = {name: hashlib.md5(name.encode()).hexdigest() for name in ("base", "a", "b", "chosen")}
    place = tmp_path / TABLE
    place.parent.mkdir(parents=True)
    with place.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["subset", "coefficient", "screen", "objective", "chosen"])
        lines.writerows(ROWS)
    vectors = {VECTOR.format(name): md5[name] for name in "ab"}
    table = hashlib.md5(place.read_bytes()).hexdigest()
    stages = {
        "pretrain": entry("pretrain", {}, {BASE: md5["base"]}),
        **{
            f"extract@{name}-0": entry(f"extract {name}-0", {BASE: md5["base"]}, {path: md5[name]})
            for name, path in zip("ab", vectors, strict=True)
        },
        "sweep-pairs-0": entry(
            "sweep pairs-0",
            {BASE: md5["base"], **vectors},
            {"data/sweeps/pairs-0.chosen.csv": md5["chosen"], TABLE: table},
        ),
    }
    with (tmp_path / "dvc.lock").open("w") as file:
        YAML().dump({"schema": "2.0", "stages": stages}, file)
    return tmp_path


def test_the_rows_below_a_vector_are_those_that_add_it(root: Path) -> None:
    with Lineage(root) as lineage:
        for name in "ab":
            vector = lineage.find(VECTOR.format(name))
            rows = lineage.rows([vector])
            places = {(row.subset, row.coefficient) for row in rows}
            assert places == {(s, c) for s, c, *_ in ROWS if name in s.split("+")}
        base = [lineage.find("pretrain")]
        found = {(row.subset, row.coefficient): row for row in lineage.rows(base)}
        assert len(found) == 5  # of the two rows of one edit, that on all images counts
        assert found["a", 0.5].objective == 0.5
        text = trace.render_below(trace.below(lineage, lineage.find(VECTOR.format("b"))))
        assert f"{TABLE}: 3 edits contain it; the chosen ones:\n    a+b at 1\n    b at 0.5" in text


@pytest.mark.parametrize("name", ["pairs-0:a+b", "pairs:a+b", "pairs-0:a+b:1"])
def test_a_row_is_traced_to_what_it_is_made_of(root: Path, name: str) -> None:
    with Lineage(root) as lineage:
        row = lineage.find(name)
        assert row.kind == "sweep row" and row.name == "pairs-0:a+b:1"
        stages = [lineage.stage(execution) for execution in lineage.chain(row)]
        assert stages[0] == "taskvec sweep row" and stages[-1] == "pretrain"
        assert sorted(stages[1:-1]) == ["extract@a-0", "extract@b-0"]
        assert {part.name for part in lineage.contents(row)} == {
            BASE, VECTOR.format("a"), VECTOR.format("b"),
        }  # fmt: skip
        assert lineage.find("pairs-0:a+b:0.5") != row
        assert trace.trace(lineage, row)["digest"] == row.key


@pytest.mark.parametrize("name", ["pairs-0:a:3", "pairs-0:c", "other:a", "pairs-0:", ":a"])
def test_a_row_that_is_not_there_is_not_found(root: Path, name: str) -> None:
    with Lineage(root) as lineage, pytest.raises(MissingArtifact):
        lineage.find(name)


def test_a_sweep_whose_table_is_gone_or_changed_has_no_rows(root: Path) -> None:
    (root / TABLE).write_text("subset,coefficient\n")
    with Lineage(root) as lineage:
        assert lineage.rows([lineage.find("pretrain")]) == []
