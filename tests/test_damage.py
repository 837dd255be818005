"""A few of the faults that tests/soak.py does by the thousand."""

import json
import random

import pytest

from flows.lineage import Lineage
from tests import soak
from tests.project import Project
from tests.soak import DAMAGES, MUTATIONS, ROWS, clean, damage, damaged, mutated, page, raced

pytestmark = pytest.mark.pipeline


def test_damaged_objects_are_named(project: Project) -> None:
    with Lineage(project.root) as lineage:
        assert [damaged(lineage, random.Random(seed)) for seed in range(20)] == [""] * 20
        assert [clean(lineage, random.Random(seed)) for seed in range(5)] == [""] * 5


def test_edited_records_are_named(project: Project) -> None:
    assert [mutated(project.root, random.Random(seed)) for seed in range(35)] == [""] * 35
    with Lineage(project.root) as lineage:
        assert clean(lineage, random.Random(0)) == ""  # everything was put back


def test_writers_that_race_leave_whole_files_and_every_line() -> None:
    assert [raced(random.Random(seed)) for seed in range(2)] == [""] * 2


@pytest.mark.parametrize("how", [name for name in DAMAGES if name != "swap"])
def test_damage_changes_a_file(how: str) -> None:
    content = bytes(range(1, 251)) * 40
    for seed in range(20):
        assert damage(content, how, random.Random(seed)) != content


def test_the_page_adds_up() -> None:
    text = page({"bytes": {"trials": 7, "failures": ["3: x"]}})
    assert "| 7 of 2000 | 1 |" in text and "\n- bytes 3: x\n" in text
    assert text.count("\n| ") == 1 + len(ROWS) and len(MUTATIONS) == 7
    assert soak.PAGE.read_text() == page(json.loads(soak.STATE.read_text()))
