"""The stage search on a tiny real experiment: every strategy, the memory, and what is written."""

# ruff: noqa: F811  (fixtures of another module)

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional

from tasks import stages, validation
from tasks.artifacts import Artifacts
from tasks.inputs import architecture
from taskvec import answers, checkpoints, layered, metrics, params, plugins, tables
from taskvec.errors import InvalidInput
from taskvec.memo import Memo
from taskvec.search import SLOPE_PRICE
from taskvec.towers import Tower
from tests.test_stages import SEED, done, fresh, quiet, raw, setting  # noqa: F401  fixtures

OPTIONS: dict[str, dict[str, Any]] = {
    "gradient": {"steps": 4}, "adamerging": {"steps": 3, "rate": 0.05},
}  # fmt: skip
BUDGET = 20 * 24  # image evaluations
WRITTEN = (Artifacts.search_table, Artifacts.coefficients, Artifacts.edited)


def searched(
    raw: dict[str, Any], artifacts: Artifacts, edit: str, emit: stages.Emit = quiet, **search: Any
) -> tuple[pd.DataFrame, dict[str, Any]]:  # fmt: skip
    """Run the stage search with a strategy and return its table and its summary."""
    other = copy.deepcopy(raw)
    other["edits"][edit]["search"] = search
    stages.run("search", f"{edit}-{SEED}", params.validate(other), artifacts, emit)
    table = tables.read(artifacts.search_table(edit, SEED), tables.Search)
    return table, json.loads(artifacts.coefficients(edit, SEED).read_text())


def written(artifacts: Artifacts, edit: str) -> list[bytes]:
    return [path(artifacts, edit, SEED).read_bytes() for path in WRITTEN]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of items of every chunk that a tower really looks at."""
    found: list[int] = []

    def counted(ask: Callable[..., Any]) -> Callable[..., Any]:
        def call(tower: Tower, head: Any, pictures: Any, chunk: int) -> Any:
            found.append(len(pictures.chunk(chunk)[1]))
            return ask(tower, head, pictures, chunk)

        return call

    monkeypatch.setattr(answers, "answer", counted(answers.answer))
    for name, loss in validation.LOSSES.items():
        monkeypatch.setitem(validation.LOSSES, name, counted(loss))
    return found


def forget(artifacts: Artifacts) -> None:
    for path in artifacts.memo().parent.glob("answers*"):
        path.unlink()


NAMES = plugins.names("strategies")
CASES = [
    *[("forget", name, {}) for name in NAMES if name != "adamerging"],  # entropy does not forget
    *[("merged", name, {}) for name in NAMES],
    *[("both", name, {}) for name in NAMES if name != "golden"],  # it takes one coefficient
    ("both", "gradient", {"layerwise": True}),
]


@pytest.mark.parametrize(("edit", "strategy", "options"), CASES)
def test_the_written_model_is_the_chosen_row_and_the_memory_changes_no_byte(
    edit: str, strategy: str, options: dict[str, Any], raw: dict[str, Any], fresh: Artifacts,
    asked: list[int],
) -> None:  # fmt: skip
    search = {"strategy": strategy, "options": {**OPTIONS.get(strategy, {}), **options},
              "budget": BUDGET}  # fmt: skip
    forget(fresh)
    table, summary = searched(raw, fresh, edit, **search)
    first, cost = written(fresh, edit), sum(asked)
    slopes = (SLOPE_PRICE - 1) * sum(asked) if strategy in ("gradient", "adamerging") else 0
    assert cost <= summary["image_evaluations"] <= cost + slopes
    assert summary["image_evaluations"] <= BUDGET
    assert summary["strategy"] == strategy

    asked.clear()
    searched(raw, fresh, edit, **search)
    assert sum(asked) == 0
    assert written(fresh, edit) == first

    (row,) = table[table["chosen"]].to_dict("records")
    assert row["complete"] and row["not_worse"]
    model = checkpoints.load(fresh.edited(edit, SEED), "checkpoint")
    tower = architecture(params.validate(raw).model)
    tower.load(model.tensors)
    for task in ("straight", "shifted"):
        classifier = checkpoints.load(fresh.head(task), "head").tensors["head"]
        data = checkpoints.load(fresh.images(task, "validation"), "images").tensors
        with torch.inference_mode():
            logits = tower.features(data["images"]).cpu() @ classifier.T
        correct = (logits.argmax(1) == data["labels"]).float().mean()
        assert float(correct) == pytest.approx(row[f"accuracy.{task}"])
        loss = float(functional.cross_entropy(logits, data["labels"]))
        assert loss == pytest.approx(row[f"loss.{task}"], rel=1e-4)
    coefficients = {name: row[f"coefficient.{name}"] for name in model.metadata["coefficients"]}
    assert model.metadata["coefficients"] == pytest.approx(coefficients)
    if strategy == "adamerging" or options:
        assert {layered.base(name) for name in coefficients} < set(coefficients) | {"a", "b", "c"}
        assert all(layered.MARK in name for name in coefficients)


@pytest.mark.parametrize("strategy", ["grid", "gradient"])
def test_after_a_crash_nothing_is_asked_twice(
    strategy: str, raw: dict[str, Any], fresh: Artifacts, asked: list[int]
) -> None:
    search = {"strategy": strategy, "options": OPTIONS.get(strategy, {}), "budget": BUDGET}
    forget(fresh)
    _, summary = searched(raw, fresh, "both", **search)
    whole, total = written(fresh, "both"), len(asked)
    for stop in (1, 4):
        forget(fresh)
        asked.clear()

        def crash(progress: stages.Progress, stop: int = stop) -> None:
            if progress["step"] == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            searched(raw, fresh, "both", crash, **search)
        assert 0 < len(asked) < total
        _, again = searched(raw, fresh, "both", **search)
        assert len(asked) == total
        assert again == summary
        assert written(fresh, "both") == whole


def test_a_search_that_overlaps_an_earlier_one_pays_only_for_what_is_new(
    raw: dict[str, Any], fresh: Artifacts, asked: list[int]
) -> None:
    forget(fresh)
    searched(raw, fresh, "forget")
    asked.clear()
    finer = copy.deepcopy(raw)
    finer["edits"]["forget"]["coefficients"]["c"]["points"] = 5
    table, summary = searched(finer, fresh, "forget")
    assert table["coefficient.c"].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert sum(asked) == 2 * 24
    assert summary["image_evaluations"] == summary["grid_image_evaluations"] == 5 * 24


def test_other_vectors_are_asked_anew(
    raw: dict[str, Any], fresh: Artifacts, asked: list[int]
) -> None:
    forget(fresh)
    searched(raw, fresh, "forget")
    other = copy.deepcopy(raw)
    other["edits"]["forget"]["expression"] = "0.5 * shifted - 2 * c * straight"
    stages.run("combine", f"forget-{SEED}", params.validate(other), fresh, quiet)
    asked.clear()
    searched(other, fresh, "forget")
    assert sum(asked) == 3 * 24


def test_the_interval_holds_the_chosen_coefficient_and_what_is_as_good(
    raw: dict[str, Any], fresh: Artifacts
) -> None:
    for edit in ("both", "merged"):
        table, summary = searched(raw, fresh, edit)
        options = [c for c in table if c.startswith("option.")]
        (chosen,) = table[table["chosen"]].to_dict("records")
        good = table[table["not_worse"]]
        for option in options:
            good = good[good[option] == chosen[option]]
        for name in ("a", "b") if edit == "both" else ("c",):
            values = good[f"coefficient.{name}"]
            assert summary[f"interval.{name}.low"] == values.min()
            assert summary[f"interval.{name}.high"] == values.max()
            assert values.min() <= chosen[f"coefficient.{name}"] <= values.max()


def test_part_of_the_items_is_a_row_that_is_not_complete(
    raw: dict[str, Any], fresh: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "CHUNK", 4)
    monkeypatch.setattr(metrics, "BATCH", 4)
    table, _ = searched(raw, fresh, "both", strategy="halving")
    assert set(table["items"]) == {8, 16, 24}
    assert (table["complete"] == (table["items"] == 24)).all()
    assert not table[~table["complete"]][["chosen", "not_worse"]].to_numpy().any()


def test_the_tower_is_set_once_for_the_chunks_of_a_point(
    done: Artifacts, raw: Any, tmp_path: Path
) -> None:
    applied: list[str] = []
    tower = architecture(params.validate(raw).model)
    with Memo(tmp_path / "answers.sqlite") as memo:
        data = validation.Validation(done, tower, ["straight", "shifted"], memo)
        for point in ("a", "a", "b", "a"):
            for task in ("straight", "shifted"):
                found = data.answers({"x": point}, lambda p=point: applied.append(p), task, 0)
                assert len(found) == 12
    assert applied == ["a", "b"]  # the last "a" was remembered
    assert data.asked == 4 * 12


def test_progress_counts_evaluations_and_slopes_up_to_the_budget(
    raw: dict[str, Any], fresh: Artifacts
) -> None:
    told: list[stages.Progress] = []
    searched(raw, fresh, "both", told.append, strategy="gradient", options={"steps": 4}, budget=960)
    assert [p["step"] for p in told] == list(range(1, len(told) + 1))
    assert all(p["step"] <= p["steps"] and p["steps"] >= 40 for p in told)
    assert {"objective" in p or "loss" in p for p in told} == {True}
    assert np.isfinite([v for p in told for v in p.values()]).all()


def test_a_budget_that_is_too_small_is_refused(raw: dict[str, Any], fresh: Artifacts) -> None:
    before = written(fresh, "both")
    with pytest.raises(InvalidInput, match="search.budget is 23 image evaluations"):
        searched(raw, fresh, "both", budget=23)
    assert written(fresh, "both") == before
