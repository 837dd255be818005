"""Sweeps: what is tried and kept follows laws, and the tables hold what models really reach."""

import hashlib
import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tasks import stages
from tasks.artifacts import Artifacts
from tasks.inputs import architecture
from tasks.inputs import head as read_head
from tasks.inputs import images as read_images
from tasks.sweep import sweep
from taskvec import answers, checkpoints, params, tables
from taskvec.errors import IncompatibleWeights, InvalidData
from taskvec.metrics import Pictures, count_correct, wilson_interval
from taskvec.params import Params, Range, Sweep
from taskvec.study_tables import SweepChosen, SweepTable, shares
from taskvec.sweeps import best, climb, coarse, going_on, refined, subsets, usual_price
from taskvec.vectors import TaskVector
from tests.test_models import install, register_tiny_models, write_tiny_weights

law = settings(deadline=None, max_examples=200)
ROOT = Path(__file__).parent.parent
SEED = 3
TASKS = ["one", "three", "two"]
SIZES = {"train": 60, "validation": 230, "test": 110}  # three chunks of validation, two of test


# --------------------------------------------------------------------------------------------
# Decisions

grids = st.lists(
    st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=40, unique=True
).map(sorted)
numbers = st.one_of(st.integers(0, 5).map(float), st.just(math.nan))


@law
@given(st.sets(st.sampled_from("abcdefg"), min_size=1), st.data())
def test_every_subset_of_the_sizes_comes_once_by_size_then_by_names(
    names: set[str], data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(1, len(names)), unique=True, min_size=1))
    found = subsets(data.draw(st.permutations(sorted(names))), sizes)
    assert len(found) == len(set(found)) == sum(math.comb(len(names), size) for size in sizes)
    assert found == sorted(found, key=lambda subset: (len(subset), subset))
    assert all(list(subset) == sorted(set(subset) & names) for subset in found)


@law
@given(grids, st.data())
def test_the_best_is_no_worse_than_any_and_smallest_among_equals(
    values: list[float], data: st.DataObject
) -> None:
    scores = {value: data.draw(numbers) for value in values}
    top = best(scores)
    known = {value: score for value, score in scores.items() if not math.isnan(score)}
    if known:
        assert scores[top] == max(known.values())
    equal = [v for v, score in (known or scores).items() if not known or score == scores[top]]
    assert abs(top) == min(map(abs, equal))
    assert top == min(value for value in equal if abs(value) == abs(top))
    turned = dict(reversed(scores.items()))
    assert best(turned) == top


@law
@given(grids)
def test_coarse_values_hold_both_ends_and_leave_gaps_of_at_most_three(
    values: list[float],
) -> None:
    places = [values.index(value) for value in coarse(values)]
    assert places[0] == 0
    assert places[-1] == len(values) - 1
    assert all(0 < b - a <= 4 for a, b in zip(places, places[1:], strict=False))
    assert len(places) <= len(values) // 4 + 2


@law
@given(grids, st.data())
def test_climbing_asks_for_each_value_once_and_ends_where_no_neighbour_is_better(
    values: list[float], data: st.DataObject
) -> None:
    scores = {value: data.draw(numbers) for value in values}
    start = data.draw(
        st.one_of(st.just(coarse(values)), st.sampled_from(values).map(lambda v: [v]))
    )
    asked: list[float] = []

    def score(value: float) -> float:
        asked.append(value)
        return scores[value]

    found = climb(values, start, score)
    assert asked == list(dict.fromkeys(asked))
    assert all(math.isnan(s) or s == scores[v] for v, s in found.items())
    assert refined(values, found) == []
    place = values.index(best(found))
    near = values[max(0, place - 1) : place + 2]
    assert all(value in found for value in near)
    assert best({value: scores[value] for value in near}) == values[place]


@law
@given(grids, st.data())
def test_climbing_finds_the_one_peak_of_a_curve_from_anywhere(
    values: list[float], data: st.DataObject
) -> None:
    peak = data.draw(st.integers(0, len(values) - 1))
    fall, rise = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    scores = {v: float(-abs(i - peak) * (rise if i < peak else fall)) for i, v in enumerate(values)}
    start = data.draw(
        st.one_of(st.just(coarse(values)), st.sampled_from(values).map(lambda v: [v]))
    )
    assert best(climb(values, start, scores.__getitem__)) == values[peak]


@law
@given(grids, st.data())
def test_from_coarse_values_at_most_four_more_are_tried(
    values: list[float], data: st.DataObject
) -> None:
    scores = {value: data.draw(numbers) for value in values}
    found = climb(values, coarse(values), scores.__getitem__)
    assert len(found) <= usual_price(values, coarse(values)) <= len(values)


def test_the_paper_s_grid_costs_ten_values_instead_of_twenty_one() -> None:
    values = Range(low=0, high=1, points=21).values()
    found = climb(values, coarse(values), lambda c: -abs(c - 0.37))
    assert sorted(found) == [0, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.8, 1]
    fine = climb(values, [0.35], lambda c: -abs(c - 0.37))
    assert sorted(fine) == [0.25, 0.3, 0.35, 0.4, 0.45]


@law
@given(st.integers(1, 5), st.integers(1, 12), st.data())
def test_the_best_subsets_go_on_and_the_largest_sum_with_them(
    number: int, keep: int, data: st.DataObject
) -> None:
    sizes = data.draw(st.sets(st.integers(1, number), min_size=1))
    found = subsets("abcde"[:number], sizes)
    scores = {subset: data.draw(numbers) for subset in data.draw(st.permutations(found))}
    kept = going_on(scores, keep)
    assert kept == [subset for subset in found if subset in kept]
    largest = [subset for subset in found if len(subset) == max(sizes)]
    assert set(kept) & set(largest)
    assert min(keep, len(found)) <= len(kept) <= min(keep + 1, len(found))

    def rank(subset: tuple[str, ...]) -> tuple[bool, float, int, tuple[str, ...]]:
        score = scores[subset]
        return math.isnan(score), 0 if math.isnan(score) else -score, len(subset), subset

    without = sorted(kept, key=rank)[:keep]
    assert all(rank(k) < rank(other) for k in without for other in found if other not in kept)


# --------------------------------------------------------------------------------------------
# One small experiment


def pictures_file(seed: int, shift: int) -> bytes:
    """Return an .npz whose label is the brightest channel, counted from another one by shift."""
    generator, arrays = np.random.default_rng(seed), {}
    for short, count in zip(("train", "val", "test"), SIZES.values(), strict=True):
        labels = np.arange(count) % 3
        images = generator.integers(0, 200, (count, 16, 16, 3))
        images[np.arange(count), :, :, (labels + shift) % 3] += 55
        arrays[f"x_{short}"], arrays[f"y_{short}"] = images.astype(np.uint8), labels
    file = BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def raw_params(model: dict[str, Any], files: dict[str, str]) -> dict[str, Any]:
    """Return the contents of a params.yaml with three tasks, sweeps and a few-shot study."""
    unit = {"low": 0, "high": 1, "points": 3}
    return {
        "seeds": [SEED],
        "model": model,
        "fine_tune": {
            "steps": 6, "batch_size": 8, "learning_rate": 5e-3, "weight_decay": 0.0,
            "warmup": 0.2, "clip_norm": 1.0,
        },
        "tasks": {
            task: {
                "data": {
                    "dataset": "npz",
                    "source": {
                        "package": "taskvec-test-data", "version": "1.0",
                        "files": {f"pictures/{task}.npz": files[f"pictures/{task}.npz"]},
                    },
                    **SIZES,
                },
                "head": {"kind": "prototypes", "classes": ["red", "green", "blue"]},
                "fine_tune": {},
            }
            for task in TASKS
        },
        "edits": {
            "both": {
                "expression": "c * (one + two)",
                "coefficients": {"c": unit},
                "objective": {"maximize": "normalized_accuracy", "tasks": ["one", "two"]},
                "evaluate": ["one", "two"],
            },
        },
        "sweeps": {
            "own": {"vectors": TASKS, "sizes": [1, 2, 3], "coefficient": unit, "ensembles": True},
            "all": {"vectors": TASKS, "sizes": [2], "coefficient": unit, "evaluate": "all"},
            "screened": {
                "vectors": TASKS, "sizes": [3, 1, 2], "screen": 150, "keep": 2, "evaluate": "all",
                "coefficient": {"low": 0, "high": 1.5, "points": 13},
            },
        },
        "few_shots": {"few": {"task": "two", "edits": ["both"], "shots": [4, 0, 1]}},
    }  # fmt: skip


STAGES = [
    *[("prepare", task) for task in TASKS],
    ("pretrain", ""),
    *[("head", task) for task in TASKS],
    *[(stage, f"{t}-{SEED}") for stage in ("fine_tune", "extract", "evaluate") for t in TASKS],
    *[(stage, f"both-{SEED}") for stage in ("combine", "search")],
]


def quiet(progress: stages.Progress) -> None:
    del progress


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute as stages do: the memory tells answers of several threads apart."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Params]:
    """Return the parameters of an experiment whose weights and pictures exist."""
    directory = tmp_path_factory.mktemp("inputs")
    register_tiny_models(directory)
    model = {"family": "open_clip", **write_tiny_weights(directory / "weights.safetensors")}
    content = {
        f"pictures/{task}.npz": pictures_file(place, place) for place, task in enumerate(TASKS)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        yield params.validate(raw_params(model, dict(install(directory, content).files)))


@pytest.fixture(scope="module")
def trained(setting: Params, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Return the artifacts with vectors and evaluations; copy them, do not change them."""
    artifacts = Artifacts(tmp_path_factory.mktemp("trained"))
    for stage, item in STAGES:
        stages.run(stage, item, setting, artifacts, quiet)
    return artifacts


@pytest.fixture
def fresh(trained: Artifacts, tmp_path: Path) -> Artifacts:
    """Return a copy of the experiment, to change at will."""
    shutil.copytree(trained.root, tmp_path / "copy")
    return Artifacts(tmp_path / "copy")


@pytest.fixture(scope="module")
def swept(
    setting: Params, trained: Artifacts, tmp_path_factory: pytest.TempPathFactory
) -> Artifacts:
    """Return the artifacts with all sweeps; do not change them."""
    artifacts = Artifacts(tmp_path_factory.mktemp("swept") / "copy")
    shutil.copytree(trained.root, artifacts.root)
    for name in setting.sweeps:
        run(artifacts, setting, name)
    return artifacts


def run(
    artifacts: Artifacts,
    setting: Params,
    name: str,
    emit: Callable[[stages.Progress], None] = quiet,
    **changes: Any,
) -> None:
    given = setting.sweeps[name].model_dump()
    changed = Sweep.model_validate({**given, **changes})
    sweep(artifacts, name=name, seed=SEED, model=setting.model, sweep=changed, emit=emit)


def table(artifacts: Artifacts, name: str) -> pd.DataFrame:
    return tables.read(artifacts.sweep_table(name, SEED), SweepTable)


def chosen(artifacts: Artifacts, name: str) -> pd.DataFrame:
    return tables.read(artifacts.sweep_chosen(name, SEED), SweepChosen)


def written(artifacts: Artifacts, name: str) -> list[str]:
    paths = (artifacts.sweep_table(name, SEED), artifacts.sweep_chosen(name, SEED))
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def finetuned(artifacts: Artifacts, task: str, split: str) -> float:
    rows = tables.read(artifacts.evaluation(task, SEED), tables.Evaluation)
    rows = rows[(rows["model"] == "finetuned") & (rows["split"] == split)]
    return float(rows["accuracy"].iloc[0])


class Plain:
    """The edits as new state dicts, one model at a time."""

    def __init__(self, artifacts: Artifacts, setting: Params) -> None:
        self.artifacts = artifacts
        self.tower = architecture(setting.model)
        self.pretrained = checkpoints.load(artifacts.pretrained(), "checkpoint").tensors
        self.vectors = {
            task: TaskVector(checkpoints.load(artifacts.vector(task, SEED), "vector").tensors, "")
            for task in TASKS
        }

    def set(self, subset: str, coefficient: float) -> None:
        total = sum(self.vectors[task] for task in subset.split("+"))
        self.tower.load((coefficient * total).apply(self.pretrained))  # type: ignore[union-attr]

    def correct(self, subset: str, coefficient: float, task: str, split: str) -> int:
        self.set(subset, coefficient)
        pictures = Pictures(self.tower, *read_images(self.artifacts, task, split))
        return count_correct(self.tower, read_head(self.artifacts, task), pictures)

    def logits(self, task: str, split: str) -> Tensor:
        images, _ = read_images(self.artifacts, task, split)
        with torch.inference_mode():
            return self.tower.features(images).cpu() @ read_head(self.artifacts, task).T


def test_a_row_says_what_the_edited_model_reaches_on_validation_data(
    setting: Params, swept: Artifacts
) -> None:
    plain = Plain(swept, setting)
    for name in ("own", "all"):
        found = table(swept, name)
        values = setting.sweeps[name].coefficient.values()
        labels = list(map("+".join, subsets(TASKS, setting.sweeps[name].sizes)))
        assert [(r["subset"], r["coefficient"]) for r in found.to_dict("records")] == [
            (label, value) for label in labels for value in values
        ]
        assert not found["screen"].any()
        for row in found.to_dict("records"):
            tasks = row["subset"].split("+") if name == "own" else TASKS
            assert row["items"] == SIZES["validation"] * len(tasks)
            shared = []
            for task in TASKS:
                accuracy = row[f"accuracy.{task}"]
                if task not in tasks:
                    assert math.isnan(accuracy)
                    continue
                right = plain.correct(row["subset"], row["coefficient"], task, "validation")
                assert accuracy == right / SIZES["validation"]
                shared.append(accuracy / finetuned(swept, task, "validation"))
            assert row["objective"] == pytest.approx(np.mean(shared), rel=1e-12)


def test_the_best_coefficient_of_each_subset_is_chosen_and_tested(
    setting: Params, swept: Artifacts
) -> None:
    plain = Plain(swept, setting)
    for name in ("own", "all"):
        tops = {}
        for subset, rows in table(swept, name).groupby("subset"):
            scores = dict(zip(rows["coefficient"], rows["objective"], strict=True))
            (taken,) = rows[rows["chosen"]]["coefficient"]
            assert taken == best(scores)
            tops[subset] = taken
        found = chosen(swept, name)
        merged = found[found["kind"] == "merged"]
        assert set(merged["subset"]) == set(tops)
        for row in merged.to_dict("records"):
            assert row["coefficient"] == tops[row["subset"]]
            right = plain.correct(row["subset"], row["coefficient"], row["task"], row["split"])
            items = SIZES[row["split"]]
            assert (row["correct"], row["items"], row["accuracy"]) == (right, items, right / items)
            assert (row["low"], row["high"]) == wilson_interval(right, items)
            own = finetuned(swept, row["task"], row["split"])
            assert row["normalized"] == pytest.approx(row["accuracy"] / own, rel=1e-12)


def test_ensembles_answer_with_the_mean_logits_of_single_models(
    setting: Params, swept: Artifacts
) -> None:
    plain = Plain(swept, setting)
    found = chosen(swept, "own")
    counted = found.groupby("kind").size()
    assert counted["ensemble"] == counted["ensemble_finetuned"] == counted["merged"] == 24
    for row in found[found["kind"] != "merged"].to_dict("records"):
        logits = []
        for member in row["subset"].split("+"):
            plain.set(member, row["coefficient"])
            logits.append(plain.logits(row["task"], row["split"]))
        _, labels = read_images(swept, row["task"], row["split"])
        predicted = torch.stack(logits).mean(0).argmax(1)
        assert row["correct"] == int((predicted == labels).sum())
        if row["kind"] == "ensemble_finetuned":
            assert row["coefficient"] == 1
    assert set(chosen(swept, "all")["kind"]) == {"merged"}


def test_a_single_finetuned_model_is_its_own_ensemble(swept: Artifacts) -> None:
    found = chosen(swept, "own")
    single = found[(found["size"] == 1) & (found["kind"] == "ensemble_finetuned")]
    assert len(single) == 6
    assert (single["normalized"] == 1).all()


def test_screening_looks_at_the_first_images_and_the_best_go_on(
    setting: Params, swept: Artifacts
) -> None:
    found = table(swept, "screened")
    plan = setting.sweeps["screened"]
    values = plan.coefficient.values()
    screened = found[found["screen"]]
    assert (screened["items"] == 3 * 150).all()
    assert set(screened["subset"]) == set(map("+".join, subsets(TASKS, plan.sizes)))
    tops = {}
    for subset, rows in screened.groupby("subset"):
        tried = dict(zip(rows["coefficient"], rows["objective"], strict=True))
        assert set(coarse(values)) <= tried.keys()
        assert len(tried) < len(values)
        assert refined(values, tried) == []
        tops[tuple(str(subset).split("+"))] = (tried[best(tried)], best(tried))
    whole = found[~found["screen"]]
    assert (whole["items"] == 3 * SIZES["validation"]).all()
    kept = going_on({subset: top for subset, (top, _) in tops.items()}, plan.keep)
    assert list(dict.fromkeys(whole["subset"])) == ["+".join(subset) for subset in kept]
    assert "one+three+two" in set(whole["subset"])
    for subset, rows in whole.groupby("subset"):
        tried = dict(zip(rows["coefficient"], rows["objective"], strict=True))
        assert tops[tuple(str(subset).split("+"))][1] in tried
        assert refined(values, tried) == []
        assert rows[rows["chosen"]]["coefficient"].tolist() == [best(tried)]
    assert set(chosen(swept, "screened")["subset"]) == set(whole["subset"])


def test_a_screened_row_holds_the_accuracy_on_the_first_images(
    setting: Params, swept: Artifacts
) -> None:
    plain, found = Plain(swept, setting), table(swept, "screened")
    for row in found[found["screen"]].to_dict("records")[::7]:
        plain.set(row["subset"], row["coefficient"])
        for task in TASKS:
            _, labels = read_images(swept, task, "validation")
            right = plain.logits(task, "validation").argmax(1) == labels
            assert row[f"accuracy.{task}"] == int(right[:150].sum()) / 150


def test_a_screen_of_all_images_is_no_other_figure(setting: Params, fresh: Artifacts) -> None:
    run(fresh, setting, "screened", screen=10_000, sizes=[2], keep=1)
    found = table(fresh, "screened")
    assert (found["items"] == 3 * SIZES["validation"]).all()
    by = found.groupby(["subset", "coefficient"])["objective"]
    assert (by.nunique() == 1).all()
    assert by.size().max() == 2


def test_test_data_decides_nothing(setting: Params, swept: Artifacts, fresh: Artifacts) -> None:
    for task in TASKS:
        path = fresh.images(task, "test")
        stored = checkpoints.load(path, "images")
        wrong = {**stored.tensors, "labels": (stored.tensors["labels"] + 1) % 3}
        checkpoints.save(path, wrong, kind="images", task=task, split="test")
    run(fresh, setting, "own")
    assert written(fresh, "own")[0] == written(swept, "own")[0]
    before, after = chosen(swept, "own"), chosen(fresh, "own")
    assert before["coefficient"].tolist() == after["coefficient"].tolist()
    assert before["correct"].tolist() != after["correct"].tolist()


# --------------------------------------------------------------------------------------------
# Nothing twice


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list to which the number of items of every real validation pass is added."""
    passes: list[int] = []
    answer = answers.answer

    def counted(*arguments: Any) -> Any:
        found = answer(*arguments)
        passes.append(len(found))
        return found

    monkeypatch.setattr(answers, "answer", counted)
    return passes


def remembered(artifacts: Artifacts) -> int:
    """Return how many chunks the memory knows; it may be in use."""
    with sqlite3.connect(f"file:{artifacts.memo()}?mode=ro", uri=True) as connection:
        (number,) = connection.execute("SELECT count(*) FROM answers").fetchone()
    connection.close()
    return int(number)


def test_a_second_sweep_asks_nothing_and_a_wider_one_only_what_is_new(
    setting: Params, swept: Artifacts, fresh: Artifacts, asked: list[int]
) -> None:
    run(fresh, setting, "own")
    # 3 tasks alone, 3 pairs on 2 tasks each and all on 3, at c of 0.5 and 1; c = 0 once a task.
    assert sum(asked) == SIZES["validation"] * (2 * (3 + 6 + 3) + 3)
    assert written(fresh, "own") == written(swept, "own")
    del asked[:]
    run(fresh, setting, "own")
    assert asked == []
    assert written(fresh, "own") == written(swept, "own")
    run(fresh, setting, "own", evaluate="all")
    assert sum(asked) == SIZES["validation"] * 2 * (6 + 3)


def test_screening_asks_whole_chunks_and_the_rest_later(
    setting: Params, fresh: Artifacts, asked: list[int]
) -> None:
    run(fresh, setting, "screened", sizes=[3])
    found = table(fresh, "screened")
    moved = found[found["coefficient"] != 0]
    screened, whole = (set(moved[moved["screen"] == flag]["coefficient"]) for flag in (True, False))
    chunks = {0: 100, 1: 100, 2: 30}
    expected = 3 * (200 * len(screened | whole | {0}) + 30 * len(whole))
    assert sum(asked) == expected + 3 * 30 * (0 in set(found[~found["screen"]]["coefficient"]))
    assert set(asked) == set(chunks.values())


def test_the_memory_changes_no_byte(setting: Params, swept: Artifacts, fresh: Artifacts) -> None:
    for name in ("screened", "all"):
        shutil.rmtree(fresh.memo().parent, ignore_errors=True)
        run(fresh, setting, name)
        assert written(fresh, name) == written(swept, name)


CHILD = """
import json, os, signal, sys
from pathlib import Path
from tasks.artifacts import Artifacts
from tasks.sweep import sweep
from taskvec.numeric import make_deterministic
from taskvec.params import Sweep
from taskvec.sections import Model
from tests.test_models import register_tiny_models

make_deterministic()
given = json.loads(sys.argv[1])
register_tiny_models(Path(given["models"]))

def emit(progress):
    if progress["step"] == given["killed"]:
        os.kill(os.getpid(), signal.SIGKILL)

sweep(
    Artifacts(Path(given["root"])), name="own", seed=given["seed"], emit=emit,
    model=Model.model_validate(given["model"]), sweep=Sweep.model_validate(given["sweep"]),
)
"""


def test_after_a_kill_nothing_is_evaluated_twice(
    setting: Params, swept: Artifacts, fresh: Artifacts, asked: list[int], tmp_path: Path
) -> None:
    given = {
        "models": str(tmp_path),
        "root": str(fresh.root),
        "seed": SEED,
        "model": setting.model.model_dump(),
        "sweep": setting.sweeps["own"].model_dump(),
        "killed": 14,  # in the middle of the second pair
    }
    others = remembered(fresh)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(given)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False,
    )  # fmt: skip
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert not fresh.sweep_table("own", SEED).exists()
    before = remembered(fresh) - others
    # in chunks: 3 alone at 3 coefficients, one pair at 2 on 2 tasks, the next at 1
    assert before == 3 * (3 * 3 + 2 * 2 + 2)
    run(fresh, setting, "own")
    assert len(asked) == remembered(fresh) - others - before == 3 * (9 + 3 * 4 + 2 * 3) - before
    assert written(fresh, "own") == written(swept, "own")


# --------------------------------------------------------------------------------------------
# Borders


def test_progress_rises_to_its_end(setting: Params, fresh: Artifacts) -> None:
    for name in setting.sweeps:
        seen: list[stages.Progress] = []
        run(fresh, setting, name, seen.append)
        steps = [entry["step"] for entry in seen]
        assert steps == sorted(steps)
        assert {entry["steps"] for entry in seen} == {steps[-1]}
        assert len(seen) > len(TASKS)


def test_the_order_in_which_vectors_and_sizes_are_named_changes_no_byte(
    setting: Params, swept: Artifacts, fresh: Artifacts
) -> None:
    run(fresh, setting, "own", vectors=TASKS[::-1], sizes=[3, 1, 2])
    assert written(fresh, "own") == written(swept, "own")


def test_equal_vectors_add_up(setting: Params, fresh: Artifacts) -> None:
    shutil.copy(fresh.vector("one", SEED), fresh.vector("two", SEED))
    run(fresh, setting, "all", sizes=[1, 2])
    found = table(fresh, "all").set_index(["subset", "coefficient"])
    assert found.loc[("one+two", 0.5), "objective"] == found.loc[("one", 1.0), "objective"]
    assert found.loc[("two", 0.5), "objective"] == found.loc[("one", 0.5), "objective"]


def test_vectors_of_another_origin_are_refused(setting: Params, fresh: Artifacts) -> None:
    path = fresh.vector("two", SEED)
    stored = checkpoints.load(path, "vector")
    checkpoints.save(path, stored.tensors, kind="vector", origin="0" * 64)
    with pytest.raises(IncompatibleWeights, match="the vector of two starts from"):
        run(fresh, setting, "own")
    assert not fresh.sweep_table("own", SEED).exists()


def test_the_intervals_of_a_table_must_fit_its_counts(swept: Artifacts) -> None:
    found = chosen(swept, "own")
    for column, wrong in (("accuracy", 0.123), ("low", 1.0), ("coefficient", 0.7)):
        with pytest.raises(InvalidData, match="SweepChosen"):
            tables.check(found.assign(**{column: wrong}), SweepChosen, "x")
    with pytest.raises(InvalidData, match="stand twice"):
        tables.check(pd.concat([found, found.head(1)]), SweepChosen, "x")


def test_a_sweep_s_table_must_have_one_choice_for_every_subset(swept: Artifacts) -> None:
    found = table(swept, "screened")
    for wrong in (
        found.assign(chosen=False),
        found.assign(chosen=~found["screen"]),
        found.assign(chosen=found["screen"]),
        found.assign(size=1),
        pd.concat([found, found.head(1)]),
    ):
        with pytest.raises(InvalidData, match="SweepTable"):
            tables.check(wrong, SweepTable, "x")


def test_shares_are_those_of_the_counts() -> None:
    assert shares(3, 4) == {
        "items": 4,
        "correct": 3,
        "accuracy": 0.75,
        "low": wilson_interval(3, 4)[0],
        "high": wilson_interval(3, 4)[1],
    }
