"""The pages of studies: figures by another computation, verdicts, pictures, the same bytes."""

import importlib
import json
import math
import re
from collections.abc import Callable
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tasks.artifacts import Artifacts
from tasks.studies.analogy import worth
from tasks.studies.collect import collect
from tasks.studies.study import Study, write
from tasks.studies.words import judge
from taskvec import params, spread, study_pictures
from taskvec.conflict import norms, sign_conflicts
from taskvec.errors import InvalidData, InvalidParams, MissingArtifact
from taskvec.lazy import Held
from taskvec.params import Params
from taskvec.study_pictures import Axis, Cloud, Line
from taskvec.summaries import Estimate
from tests import made_studies as made
from tests.made_studies import Truth, edit, study_params

ROOT = Path(__file__).parents[1]
THREE = ["red", "green", "blue"]
SHOWN = ("The paper's phenomenon shows here", "An advantage over task arithmetic shows here",
         "Agreement with the paper")  # fmt: skip
RANGE = {"low": 0.0, "high": 1.0, "points": 3}
finite = st.floats(-100, 100, width=32, allow_subnormal=False)


# Figures over units.


@given(st.lists(finite, min_size=2, max_size=12))
def test_a_mean_has_the_t_interval_of_scipy(values: list[float]) -> None:
    found = spread.mean_of(values)
    error = scipy.stats.sem(values)
    half = error * scipy.stats.t.ppf(0.975, len(values) - 1)
    assert found.value == pytest.approx(np.mean(values), abs=1e-9)
    assert found.high - found.value == pytest.approx(half, abs=1e-9)
    assert found.value - found.low == pytest.approx(half, abs=1e-9)


def test_one_figure_says_nothing_of_its_spread() -> None:
    assert spread.mean_of([0.3]) == Estimate(0.3, -math.inf, math.inf)


def test_seeds_on_the_same_items_do_not_narrow_an_interval() -> None:
    once = Estimate(0.5, 0.4, 0.7)
    assert spread.averaged([once] * 3) == Estimate(*map(pytest.approx, (0.5, 0.4, 0.7)))
    assert spread.over_range([0.1, 0.4, 0.1]) == Estimate(pytest.approx(0.2), 0.1, 0.4)


@given(hnp.arrays(float, (2, 6), elements=st.integers(0, 4)))
def test_rank_correlation_is_that_of_scipy(values: np.ndarray[Any, Any]) -> None:
    left, right = values
    found = spread.spearman(left, right)
    if np.ptp(left) and np.ptp(right):
        assert found == pytest.approx(scipy.stats.spearmanr(left, right).statistic)
    else:
        assert math.isnan(found)


def test_the_bootstrap_of_a_mean_is_about_its_normal_interval() -> None:
    values = np.random.default_rng(5).standard_normal(200)
    found = spread.resampled(lambda places: float(values[places].mean()), 200)
    half = 1.96 * values.std() / math.sqrt(200)
    assert found.value == values.mean()
    assert found.high - found.value == pytest.approx(half, rel=0.12)
    assert found == spread.resampled(lambda places: float(values[places].mean()), 200)


def test_the_bootstrap_leaves_out_where_the_figure_is_undefined() -> None:
    found = spread.resampled(lambda p: math.nan if len(set(p)) == 1 else 2.0, 3)
    assert found == Estimate(2.0, 2.0, 2.0)
    assert math.isnan(spread.resampled(lambda places: math.nan, 3).low)


def test_permuted_names_tell_a_common_structure_from_chance() -> None:
    draw = np.random.default_rng(1)
    left, right = (part + part.T for part in draw.standard_normal((2, 8, 8)))
    assert 0 < spread.mantel(left, np.exp(left)) < 0.002
    assert spread.mantel(left, -left) < 0.002
    assert spread.mantel(left, right) > 0.05
    assert math.isnan(spread.mantel(left, np.ones((8, 8))))


def test_three_names_have_six_orders() -> None:
    matrix = np.array([[0.0, 1, 2], [1, 0, 3], [2, 3, 0]])
    assert spread.mantel(matrix, matrix) == pytest.approx(2 / 6, abs=0.04)  # all reversed too


# Sign conflicts.

vectors_of_two = hnp.arrays(np.float32, (2, 12), elements=st.integers(-3, 3))


@given(vectors_of_two)
@settings(max_examples=50)
def test_sign_conflict_is_the_share_of_opposite_signs(values: np.ndarray[Any, Any]) -> None:
    held = {
        name: Held({"a": row[:5], "b": row[5:]}) for name, row in zip("xy", values, strict=True)
    }
    left, right = values
    both = (left != 0) & (right != 0)
    expected = float((left * right < 0)[both].mean()) if both.any() else 0.0
    found = sign_conflicts(held, largest=1.0)
    assert found.loc["x", "y"] == found.loc["y", "x"] == pytest.approx(expected)
    assert found.loc["x", "x"] == 0


def test_only_elements_that_are_large_in_both_conflict() -> None:
    left = np.array([9, -8, 1, 1, 1, 1, 1, 1, 1, 1], np.float32)
    right = np.array([9, 8, -1, -1, -1, -1, -1, -1, -1, -1], np.float32)
    held = {"x": Held({"a": left}), "y": Held({"a": right})}
    assert sign_conflicts(held).loc["x", "y"] == 0.5
    assert norms(held)["x"] == pytest.approx(float(np.linalg.norm(left)))


# Verdicts.


@pytest.mark.parametrize(
    ("low", "high", "start"),
    [(0.01, 0.2, "The paper's phenomenon shows here: x."),
     (-0.2, -0.01, "The opposite of the paper's phenomenon shows here: x."),
     (-0.1, 0.1, "Nothing is shown here"), (0.0, 0.1, "Nothing is shown here"),
     (math.nan, math.nan, "Nothing is shown here"), (-math.inf, math.inf, "Nothing is shown here")],
)  # fmt: skip
def test_a_verdict_needs_the_whole_interval(low: float, high: float, start: str) -> None:
    assert judge("x", Estimate((low + high) / 2, low, high)).startswith(start)


# The studies. A truth is built from a strength: positive where the phenomenon shows, negative for
# its opposite; spread between edits and seeds comes from `jitter`.


def jitter(*parts: object) -> float:
    """Return something in [-0.01, 0.01] that follows from the parts."""
    text = "/".join(map(str, parts))
    return (sum(ord(letter) * (i + 7) for i, letter in enumerate(text)) % 201 - 100) / 10_000


def addition_params() -> Params:
    sweep = {"vectors": THREE, "coefficient": RANGE}
    return study_params(
        THREE, [3, 5],
        variants={"joint": {"of": THREE, "fine_tune": {}}},
        edits={"all_tasks": edit("c * (red + green + blue)", THREE)},
        sweeps={
            "pairs": {**sweep, "sizes": [2], "evaluate": "all"},
            "subsets": {**sweep, "sizes": [1, 2, 3], "evaluate": "all", "screen": 100, "keep": 2,
                        "seeds": [3]},
        },
    )  # fmt: skip


def addition_truth(strength: float) -> Truth:
    def truth(model: str, task: str, seed: int) -> float:
        if model in ("pretrained", "finetuned"):
            return {"pretrained": 0.5, "finetuned": 0.9}[model]
        return 0.5 + strength + jitter(model, task, seed)

    return truth


def forgetting_params() -> Params:
    edits, variants = {}, {}
    for task in THREE:
        others = [name for name in THREE if name != task]
        rule = {
            "objective": {"minimize": "accuracy", "tasks": [task]},
            "constraint": {"tasks": others, "min_ratio": 0.95},
        }
        for name, expression in (
            (f"forget_{task}_best", f"-c * {task}"),
            (f"forget_{task}_largest", f"-c * {task}"),
            (f"random_{task}", f"-c * random_like({task}, seed=0)"),
        ):
            edits[name] = edit(expression, [task, *others], **rule)  # fmt: skip
        edits[f"tuned_{task}"] = edit(f"c * {task}", [task, *others])
        variants[f"{task}_ascent"] = {
            "of": [task], "fine_tune": {"direction": "ascend"}, "evaluate": [task, *others]
        }  # fmt: skip
    return study_params(THREE, [0], variants=variants, edits=edits)


def forgetting_truth(strength: float) -> Truth:
    def truth(model: str, task: str, seed: int) -> float:
        own = task in model
        if model.startswith("forget") and own:
            return 0.6 - strength + jitter(model, task)
        ends = {"finetuned": 0.9, f"tuned_{task}": 0.9, f"{task}_ascent": 0.02}
        return ends.get(model, 0.6 + jitter(model, task, seed) / 2)

    return truth


def analogy_params() -> Params:
    aims = ["red", "green", "blue"]
    edits: dict[str, Any] = {}
    for i, aim in enumerate(aims):
        one, two = (aims[(i + k) % 3] for k in (1, 2))
        for name, expression in (
            ("analogy", f"c * ({one} + (two - {two}))"),
            ("free", f"x * {one} + y * two - z * {two}"),
            ("sum", f"c * ({one} + two)"),
            ("same_style", f"c * {one}"),
            ("same_classes", "c * two"),
        ):
            edits[f"{aim}_{name}"] = edit(expression, [aim], group=aim)
    shots = {
        f"{aim}_few": {"task": aim, "edits": [f"{aim}_analogy"], "shots": [0, 1, 2, 4]}
        for aim in aims
    }
    return study_params([*aims, "two"], [0, 1], edits=edits, few_shots=shots)


def analogy_truth(strength: float) -> Truth:
    def truth(model: str, task: str, seed: int) -> float:
        if model in ("pretrained", "finetuned"):
            return {"pretrained": 0.5, "finetuned": 0.9}[model]
        if " " in model:
            start, shots = model.split()
            return 0.4 + 0.05 * int(shots) + (0.15 if start != "pretrained" else 0.0)
        return 0.5 + strength + jitter(model, task, seed)

    return truth


def similarity_params() -> Params:
    names = [f"t{i}" for i in range(6)]
    sweep = {"vectors": names, "sizes": [1], "coefficient": {"low": 1.0, "high": 1.0, "points": 1},
             "evaluate": "all"}  # fmt: skip
    return study_params(names, [0, 1], sweeps={"transfer": sweep})


def similarity_truth(strength: float) -> Truth:
    """Transfer falls with the distance of two tasks on a line; cosines do so too."""

    def truth(model: str, task: str, seed: int) -> float:
        if model == "pretrained":
            return 0.5
        if model == "finetuned" or model == task:
            return 0.9
        near = 1 / (1 + abs(int(model[1:]) - int(task[1:])))
        near += 0.1 * (int(task[1:]) % 3)  # one way is not the other way
        return 0.5 + strength * near + (5 if abs(strength) < 0.01 else 0.1) * jitter(model + task)

    return truth


def rates_params() -> Params:
    variants, edits = {}, {}
    for i, rate in enumerate([5e-5, 2e-4, 4e-4]):
        for task in THREE[:2]:
            variants[f"{task}_lr{i}"] = {"of": [task], "fine_tune": {"learning_rate": rate}}
        edits[f"sum_lr{i}"] = edit(f"c * (red_lr{i} + green_lr{i})", THREE[:2], group="rates")
    edits["sum_base"] = edit("c * (red + green)", THREE[:2], group="rates")
    return study_params(THREE[:2], [0, 1, 2], variants=variants, edits=edits)


def rates_truth(strength: float) -> Truth:
    place = {"sum_lr0": -1, "sum_base": 0, "sum_lr1": 1, "sum_lr2": 2}

    def truth(model: str, task: str, seed: int) -> float:
        if model == "pretrained":
            return 0.4
        if model in place:
            return 0.8 - strength * place[model] / 4 + jitter(model, seed, task)
        return 0.9

    return truth


def steps_params() -> Params:
    variants, edits = {}, {}
    for stop in (10, 40):
        for task in THREE[:2]:
            variants[f"{task}_at{stop}"] = {"of": [task], "fine_tune": {"stop_after": stop}}
        edits[f"sum_at{stop}"] = edit(f"c * (red_at{stop} + green_at{stop})", THREE[:2],
                                      group="steps")  # fmt: skip
    edits["sum_end"] = edit("c * (red + green)", THREE[:2], group="steps")
    return study_params(THREE[:2], [0, 1, 2], variants=variants, edits=edits)


def steps_truth(strength: float) -> Truth:
    def truth(model: str, task: str, seed: int) -> float:
        if model == "pretrained":
            return 0.4
        if model == "finetuned" or "_at" in model and not model.startswith("sum"):
            return 0.9
        wide = 5 if abs(strength) < 0.01 else 0.1
        early = model != "sum_end"
        return 0.8 + early * (strength + wide * jitter(model, task, seed, "x"))

    return truth


def ensembles_params() -> Params:
    names = [*THREE, "grey"]
    sweep = {"vectors": names, "sizes": [2], "coefficient": RANGE, "ensembles": True,
             "evaluate": "all"}  # fmt: skip
    return study_params(names, [0, 1], sweeps={"pairs": sweep})


def ensembles_truth(strength: float) -> Truth:
    def truth(model: str, task: str, seed: int) -> float:
        if model in ("pretrained", "finetuned"):
            return {"pretrained": 0.4, "finetuned": 0.95}[model]
        pair = model.split()[-1]
        level = (sum(map(ord, pair)) % 13) / 13
        if " " not in model:
            return 0.6 + 0.2 * level
        wide = 15 if abs(strength) < 0.01 else 0.5
        turned = -strength if model.startswith("ensemble ") else strength
        return 0.7 + turned * (level - 0.5) + wide * jitter(pair, seed)

    return truth


def methods_params() -> Params:
    names = ["by_task_arithmetic", "by_magmax", "by_ties_mean"]
    total = "red, green, blue"
    edits = {
        "by_task_arithmetic": edit("c * (red + green + blue)", THREE, group="methods"),
        "by_magmax": edit(f"c * magmax({total})", THREE, group="methods"),
        "by_ties_mean": edit(
            f'c * ties({total}, density=0.2, variant="mean")', THREE, group="methods"
        ),
    }
    assert list(edits) == names
    return study_params(THREE, [0], edits=edits)


def methods_truth(strength: float) -> Truth:
    def truth(model: str, task: str, seed: int) -> float:
        levels = {"pretrained": 0.4, "finetuned": 0.9, "by_task_arithmetic": 0.7,
                  "by_magmax": 0.7 + strength, "by_ties_mean": 0.7 + strength - 0.02}  # fmt: skip
        return levels[model]

    return truth


def category_params() -> Params:
    tasks = ["king", "queen", "man", "woman", "control"]
    edits = {
        f"to_{aim}": edit(f"c * ({one} + ({plus} - {minus}))", [aim, "control"],
                          group="new_category")
        for aim, one, plus, minus in (("king", "queen", "man", "woman"),
                                      ("queen", "king", "woman", "man"),
                                      ("man", "woman", "king", "queen"))
    }  # fmt: skip
    return study_params(tasks, [0], edits=edits)


def category_truth(strength: float) -> Truth:
    def truth(model: str, task: str, seed: int) -> float:
        if model in ("pretrained", "finetuned"):
            return {"pretrained": 0.4, "finetuned": 0.9}[model]
        return (0.39 if task == "control" else 0.4 + strength) + jitter(model, task, seed) / 2

    return truth


Case = tuple[Callable[[], Params], Callable[[float], Truth], float]
CASES: dict[str, Case] = {
    "addition": (addition_params, addition_truth, 0.3),
    "forgetting": (forgetting_params, forgetting_truth, 0.3),
    "analogy": (analogy_params, analogy_truth, 0.1),
    "similarity": (similarity_params, similarity_truth, 0.3),
    "learning_rate": (rates_params, rates_truth, 0.3),
    "intermediate": (steps_params, steps_truth, 0.02),
    "ensembles": (ensembles_params, ensembles_truth, 0.2),
    "methods": (methods_params, methods_truth, 0.1),
    "new_category": (category_params, category_truth, 0.2),
}


def page(study: str, artifacts: Artifacts, checked: Params) -> Study:
    """Return the page of a study."""
    module = importlib.import_module(f"tasks.studies.{study}")
    found = getattr(module, study)(artifacts, checked)
    assert isinstance(found, Study)
    return found


def make(study: str, root: Path, strength: float) -> tuple[Artifacts, Params]:
    """Write the artifacts of a study."""
    params_of, truth_of, _ = CASES[study]
    artifacts, checked = Artifacts(root), params_of()
    made.experiment(artifacts, checked, truth_of(strength))
    if study == "similarity":
        line_vectors(artifacts, checked)
    return artifacts, checked


def line_vectors(artifacts: Artifacts, checked: Params) -> None:
    """Write vectors whose cosines fall with the distance of two tasks on a line."""
    places = np.arange(60)
    for seed in checked.seeds:
        tensors = {
            name: {"w": np.exp(-((places - 8 * i - seed) ** 2) / 100)}
            for i, name in enumerate(checked.tasks)
        }
        made.vectors(artifacts, tensors, seed)


Made = tuple[str, Artifacts, Params, Study]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Return a study where the phenomenon shows, with its page; made once."""

    @cache
    def found(study: str) -> Made:
        artifacts, checked = make(study, tmp_path_factory.mktemp(study), CASES[study][2])
        return study, artifacts, checked, page(study, artifacts, checked)

    return found


@pytest.fixture(params=CASES)
def supported(request: pytest.FixtureRequest, shown: Callable[[str], Made]) -> Made:
    """Return each study where the phenomenon shows."""
    return shown(request.param)


def test_a_phenomenon_that_is_there_is_shown(
    supported: Made,
) -> None:
    assert supported[3].verdict.startswith(SHOWN), supported[3].verdict
    assert "95 % interval" in supported[3].verdict


@pytest.mark.parametrize("study", CASES)
def test_the_opposite_is_called_the_opposite(study: str, tmp_path: Path) -> None:
    found = page(study, *make(study, tmp_path, -CASES[study][2]))
    assert found.verdict.startswith("The opposite of "), found.verdict


@pytest.mark.parametrize("study", CASES)
def test_what_the_interval_does_not_settle_is_not_claimed(study: str, tmp_path: Path) -> None:
    nothing = {"intermediate": -0.005, "addition": 0.004}.get(study, 0.0)
    found = page(study, *make(study, tmp_path, nothing))
    assert found.verdict.startswith("Nothing is shown here"), found.verdict


def test_the_same_artifacts_give_the_same_bytes(
    supported: Made,
) -> None:
    study, artifacts, checked, first = supported
    assert page(study, artifacts, checked) == first
    assert str(artifacts.root) not in first.text()


def test_every_picture_is_shown_and_is_valid(
    supported: Made,
) -> None:
    shown = re.findall(r"!\[[^\]]+\]\(figures/(\w+)\.svg\)", supported[3].body)
    assert sorted(shown) == sorted(supported[3].figures)
    for svg in supported[3].figures.values():
        root = ElementTree.fromstring(study_pictures.standalone(svg))
        title = root.find("{http://www.w3.org/2000/svg}title")
        assert title is not None
        assert title.text
        assert int(root.attrib["width"]) > 200
        assert "nan" not in svg


def test_tables_are_complete(supported: Made) -> None:
    widths = [
        {line.count("|") for line in block.splitlines()}
        for block in supported[3].body.split("\n\n")
        if block.startswith("|")
    ]
    assert widths
    assert all(len(found) == 1 for found in widths)
    assert "nan" not in supported[3].text()


def test_a_missing_row_is_named(supported: Made, tmp_path: Path) -> None:
    study, artifacts, checked, _ = supported
    seed = checked.seeds[0]
    path = artifacts.evaluation(next(iter(checked.tasks)), seed)
    if checked.sweeps:
        path = artifacts.sweep_chosen(next(iter(checked.sweeps)), seed)
    whole = path.read_text()
    try:
        path.write_text("\n".join(whole.splitlines()[:2]) + "\n")
        with pytest.raises(MissingArtifact, match="run"):
            page(study, artifacts, checked)
        path.unlink()
        with pytest.raises(MissingArtifact, match="taskvec run"):
            page(study, artifacts, checked)
    finally:
        path.write_text(whole)


@pytest.mark.parametrize(
    "study",
    sorted(path.parent.name for path in (ROOT / "experiments").glob("*/params.yaml")),
)
def test_every_study_of_the_repository_has_a_page_for_its_parameters(
    study: str, tmp_path: Path
) -> None:
    checked = params.load(ROOT / "experiments" / study / "params.yaml")
    assert checked.study == study
    with pytest.raises(MissingArtifact):  # the names are there, the artifacts are not
        page(study, Artifacts(tmp_path), checked)


@pytest.mark.parametrize("study", CASES)
def test_parameters_of_another_study_are_refused(study: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidParams, match="this study needs"):
        page(study, Artifacts(tmp_path), study_params(THREE, [0]))


# Figures by another computation.


def shares(artifacts: Artifacts, names: list[str], seed: int) -> dict[tuple[str, str], float]:
    """Return (model, task) -> test accuracy."""
    table = pd.concat([pd.read_csv(artifacts.evaluation(name, seed)) for name in names])
    test = table[table["split"] == "test"]
    return {(row.model, row.task): row.correct / row.items for row in test.itertuples()}  # type: ignore[operator]


def first_figure(text: str) -> float:
    """Return the first figure with an interval, in its unit."""
    found = re.search(r"([+\u2212]?[\d.]+)(?: points| %)? \(95 % interval", text)
    assert found, text
    return float(found[1].replace("\u2212", "-"))


def test_addition_gains_are_means_over_pairs_and_seeds(shown: Callable[[str], Made]) -> None:
    _, artifacts, checked, found = shown("addition")
    gains = []
    for pair in combinations(sorted(THREE), 2):
        for seed in checked.seeds:
            table = pd.read_csv(artifacts.sweep_chosen("pairs", seed))
            rows = table[(table["subset"] == "+".join(pair)) & (table["split"] == "test")]
            own = rows[rows["task"].isin(pair)].set_index("task")["accuracy"]
            known = shares(artifacts, list(pair), seed)
            gains.append(
                np.mean([(own[t] - known["pretrained", t]) / known["finetuned", t] for t in pair])
            )
    assert first_figure(found.verdict) == pytest.approx(100 * np.mean(gains), abs=0.051)
    assert "over 3 pairs" in found.verdict


def test_the_best_subset_is_chosen_on_validation_data(tmp_path: Path) -> None:
    def truth(model: str, task: str, seed: int) -> float:
        return 0.85 if model == "blue" else addition_truth(0.2)(model, task, seed)

    artifacts, checked = Artifacts(tmp_path), addition_params()
    made.experiment(artifacts, checked, truth)
    all_right_on_test(artifacts.sweep_chosen("subsets", 3), "subset", "blue+green+red")
    found = page("addition", artifacts, checked)
    assert "The best subset on validation data, blue, is not the sum of all" in found.body
    assert "Seed 3. The curve is validation data (100 validation images" in found.body
    assert "the sum of all 3 has 111.1 %" in found.body


def all_right_on_test(path: Path, column: str, name: str) -> None:
    """Change a table so that something is always right on test data."""
    table = pd.read_csv(path)
    rows = (table["split"] == "test") & (table[column] == name)
    assert rows.any()
    table.loc[rows, "correct"] = table["items"]
    table.loc[rows, ["accuracy", "high"]] = 1.0
    table.to_csv(path, index=False)


def test_forgetting_averages_are_those_of_the_tables(shown: Callable[[str], Made]) -> None:
    _, artifacts, _, found = shown("forgetting")
    drops, kept = [], []
    for task in THREE:
        name = f"forget_{task}_largest"
        known = shares(artifacts, [*THREE, name], 0)
        drops.append(known[name, task] - known["pretrained", task])
        kept += [known[name, t] / known["pretrained", t] for t in THREE if t != task]
    assert first_figure(found.verdict) == pytest.approx(100 * np.mean(drops), abs=0.051)
    assert f"the controls keep {100 * np.mean(kept):.1f} %" in found.verdict
    assert "None is infeasible on test data." in found.body


def test_forgetting_that_costs_the_controls_is_only_half_of_it(tmp_path: Path) -> None:
    def truth(model: str, task: str, seed: int) -> float:
        value = forgetting_truth(0.3)(model, task, seed)
        return value - 0.2 if model.startswith("forget") and task not in model else value

    artifacts, checked = Artifacts(tmp_path), forgetting_params()
    made.experiment(artifacts, checked, truth)
    bad = artifacts.metrics("forget_red_best", 0)
    bad.write_text(json.dumps({"feasible.test": "infeasible"}))
    found = page("forgetting", artifacts, checked)
    assert found.verdict.startswith("Only half of the paper's phenomenon shows here")
    assert "Infeasible on test data: forget_red_best (seed 0)." in found.body


def test_controls_that_may_keep_enough_are_not_called_broken(tmp_path: Path) -> None:
    def truth(model: str, task: str, seed: int) -> float:
        value = forgetting_truth(0.3)(model, task, seed)
        kept = model.startswith("forget") and task not in model
        return 0.55 + 5 * jitter(model, "x") if kept else value

    artifacts, checked = Artifacts(tmp_path), forgetting_params()
    made.experiment(artifacts, checked, truth)
    verdict = page("forgetting", artifacts, checked).verdict
    assert verdict.startswith("The paper's phenomenon shows here"), verdict
    low, high = map(float, re.findall(r"interval ([\d.]+) to ([\d.]+)", verdict)[-1])
    assert low < 95 < high


def test_forgetting_no_more_than_a_random_vector_shows_nothing(tmp_path: Path) -> None:
    def truth(model: str, task: str, seed: int) -> float:
        if model == f"random_{task}":
            return 0.3 + 4 * jitter(task)
        return forgetting_truth(0.3)(model, task, seed)

    artifacts, checked = Artifacts(tmp_path), forgetting_params()
    made.experiment(artifacts, checked, truth)
    verdict = page("forgetting", artifacts, checked).verdict
    assert verdict.startswith("Nothing is shown here"), verdict


@pytest.mark.parametrize(
    ("accuracy", "wanted", "labels"),
    [([0.4, 0.5, 0.6], 0.55, 1.5), ([0.4, 0.5, 0.6], 0.3, 0.0), ([0.4, 0.5, 0.6], 0.7, math.inf),
     ([0.4, 0.3, 0.6], 0.6, 2.0), ([0.4, 0.4, 0.4], 0.4, 0.0)],
)  # fmt: skip
def test_worth_is_where_the_curve_first_reaches_it(
    accuracy: list[float], wanted: float, labels: float
) -> None:
    assert worth([0, 1, 2], accuracy, wanted) == pytest.approx(labels)


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.floats(0, 1))
def test_at_its_worth_the_curve_has_the_accuracy(accuracy: list[float], wanted: float) -> None:
    shots = [0, 1, 2, 4]
    found = worth(shots, accuracy, wanted)
    if math.isinf(found):
        assert max(accuracy) < wanted
    else:
        assert np.interp(found, shots, accuracy) >= wanted - 1e-9


def test_an_analogy_is_worth_three_labels(shown: Callable[[str], Made]) -> None:
    body = shown("analogy")[3].body
    # 0.4 + 0.05 n from the pre-trained start; the analogy has 0.55 without labels.
    assert "| red | 40.0 | 55.0 | 3 | 3, 3 | +15.0 |" in body
    # a grid of 3 and one of 27 points on 200 images would cost this, which is 300 here
    assert "| analogy | 1 | 900 |" in body
    assert "| free | 3 | 8,100 |" in body


def test_similarity_correlates_cosine_with_transfer(shown: Callable[[str], Made]) -> None:
    _, artifacts, checked, found = shown("similarity")
    names = list(checked.tasks)
    gains = np.zeros((6, 6))
    cosines = np.zeros((6, 6))
    for seed in checked.seeds:
        table = pd.read_csv(artifacts.sweep_chosen("transfer", seed))
        test = table[table["split"] == "test"].set_index(["subset", "task"])["accuracy"]
        places = np.arange(60)
        vectors = [np.exp(-((places - 8 * i - seed) ** 2) / 100) for i in range(6)]
        for i, j in np.ndindex(6, 6):
            gains[i, j] += float(test[names[i], names[j]])
            norm = np.linalg.norm(vectors[i]) * np.linalg.norm(vectors[j])
            cosines[i, j] += vectors[i] @ vectors[j] / norm
    rows, columns = np.triu_indices(6, 1)
    both = (gains + gains.T)[rows, columns].round(9)
    expected = scipy.stats.spearmanr(cosines[rows, columns].round(9), both).statistic
    assert first_figure(found.verdict) == pytest.approx(expected, abs=0.0051)
    assert "over 15 pairs" in found.verdict


def test_a_rate_study_fits_a_line_over_doublings(shown: Callable[[str], Made]) -> None:
    _, artifacts, checked, found = shown("learning_rate")
    slopes = []
    for seed in checked.seeds:
        known = shares(artifacts, ["red", "green", *checked.variants, *checked.edits], seed)
        values = [
            np.mean([known[name, "red"], known[name, "green"]]) / 0.9
            for name in ("sum_lr0", "sum_base", "sum_lr1", "sum_lr2")
        ]
        slopes.append(scipy.stats.linregress([-1, 0, 1, 2], values).slope)
    assert first_figure(found.verdict) == pytest.approx(100 * np.mean(slopes), abs=0.051)
    assert "| 5e-05 | 90.0 |" in found.body


def test_rates_that_differ_within_a_sum_are_refused(tmp_path: Path) -> None:
    variants = {"red_fast": {"of": ["red"], "fine_tune": {"learning_rate": 1e-3}}}
    edits = {"sum": edit("c * (red_fast + green)", ["red", "green"], group="rates")}
    checked = study_params(THREE, [0], variants=variants, edits=edits)
    made.experiment(Artifacts(tmp_path), checked, rates_truth(0.1))
    with pytest.raises(InvalidParams, match="expected one rate"):
        page("learning_rate", Artifacts(tmp_path), checked)


def test_intermediate_saturates_where_all_later_sums_stay(tmp_path: Path) -> None:
    def truth(model: str, task: str, seed: int) -> float:
        value = steps_truth(0.02)(model, task, seed)
        return value - 0.2 if model == "sum_at10" else value

    artifacts, checked = Artifacts(tmp_path), steps_params()
    made.experiment(artifacts, checked, truth)
    found = page("intermediate", artifacts, checked)
    assert "From 40.0 % of the steps on" in found.body
    assert re.search(r"\| 100\.0 \| 1\.00 \|", found.body)
    assert found.verdict.partition("after ")[2].startswith("40.0 % of the steps")


def test_a_late_fall_keeps_intermediate_sums_from_being_settled(tmp_path: Path) -> None:
    def truth(model: str, task: str, seed: int) -> float:
        value = steps_truth(0.02)(model, task, seed)
        return value - 0.2 if model == "sum_at40" else value

    artifacts, checked = Artifacts(tmp_path), steps_params()
    made.experiment(artifacts, checked, truth)
    assert "From 100.0 % of the steps on" in page("intermediate", artifacts, checked).body


def test_ensembles_correlate_points_of_all_seeds(shown: Callable[[str], Made]) -> None:
    _, artifacts, checked, text = shown("ensembles")
    merged, ensembled = [], []
    for seed in checked.seeds:
        table = pd.read_csv(artifacts.sweep_chosen("pairs", seed))
        table = table[table["split"] == "test"]
        for kind, found in (("merged", merged), ("ensemble_finetuned", ensembled)):
            for subset, rows in table[table["kind"] == kind].groupby("subset"):
                own = rows[rows["task"].isin(str(subset).split("+"))]
                found.append(float(own["normalized"].mean()))
    expected = np.corrcoef(merged, ensembled)[0, 1]
    assert first_figure(text.verdict) == pytest.approx(expected, abs=0.0051)
    assert "bootstrap over 6 pairs, each with its 2 seeds" in text.verdict


def test_methods_compare_the_best_on_validation_with_plain_sums(
    shown: Callable[[str], Made],
) -> None:
    found = shown("methods")[3]
    assert "of magmax, the best of 2 other methods on validation data" in found.verdict
    assert first_figure(found.verdict) == pytest.approx(100 * 0.1 / 0.9, abs=0.051)
    assert "Significantly better than task arithmetic: magmax and ties mean." in found.body
    assert "Significantly worse than task arithmetic: none." in found.body
    assert "the same figures" not in found.body


def test_methods_that_give_the_same_model_are_named(tmp_path: Path) -> None:
    found = page("methods", *make("methods", tmp_path, 0.02))
    assert "task arithmetic and ties mean gave the same figures on every task" in found.body
    assert "magmax" not in found.body.rpartition("gave the same")[0].rpartition("\n")[2]


def test_the_best_method_is_chosen_on_validation_data(tmp_path: Path) -> None:
    artifacts, checked = make("methods", tmp_path, 0.1)
    all_right_on_test(artifacts.evaluation("by_ties_mean", 0), "model", "by_ties_mean")
    found = page("methods", artifacts, checked)
    assert "of magmax, the best of 2 other methods on validation data" in found.verdict
    assert found.body.index("| ties mean |") < found.body.index("| magmax |")


def test_a_new_category_names_what_the_control_keeps(shown: Callable[[str], Made]) -> None:
    found = shown("new_category")[3]
    assert "mean over 3 categories, while the controls keep 9" in found.verdict
    assert "| to_king | king | 0.5 | 40.0" in found.body


# Published figures.

HEAD = "table,model,task,what,value,source\n"
PUBLISHED = """t1,bundled,red,pretrained.target_accuracy,60.0,s
t1,bundled,red,negative_vector.target_accuracy,30.5,s
t1,bundled,mean,finetuned.target_accuracy,88.0,s
t1,bundled,blue,negative_vector.control_accuracy,50.0,s
t1,ViT-L-14,red,pretrained.target_accuracy,60.0,s
t2,not stated,mean,multi_task.normalized_accuracy,99.4,s
t2,bundled,mean,multi_task_100_steps.accuracy,86.4,s
t2,bundled,mean,multi_task_8000_steps.accuracy,88.93,s
t2,not stated,best subset,merged.normalized_accuracy,91.2,s
t2,bundled,unknown,negative_vector.target_accuracy,5,s
"""


def clip8_study(root: Path, published: str) -> Study:
    """Return the page on published figures beside those of the study of forgetting."""
    base = forgetting_params()
    joint = {"joint": {"of": THREE, "fine_tune": {}}}
    raw = base.model_dump(exclude_unset=True)
    checked = params.validate({**raw, "variants": {**raw["variants"], **joint}})

    def truth(model: str, task: str, seed: int) -> float:
        return 0.855 if model == "joint" else forgetting_truth(0.3)(model, task, seed)

    artifacts = Artifacts(root)
    made.experiment(artifacts, checked, truth)
    (root / "published.csv").write_text(HEAD + published)
    return page("clip8", artifacts, checked)


def test_published_figures_stand_beside_ours(tmp_path: Path) -> None:
    found = clip8_study(tmp_path, PUBLISHED)
    rows = {tuple(cells[2:4]): cells[4:6] for line in found.body.splitlines()
            if len(cells := [cell.strip() for cell in line.split("|")]) == 8
            and cells[1] != "ViT-L-14"}  # fmt: skip
    known = shares(Artifacts(tmp_path), [*THREE, "joint", "forget_red_largest",
                                         "forget_blue_largest"], 0)  # fmt: skip
    for key, share in {
        ("red", "pretrained.target_accuracy"): known["pretrained", "red"],
        ("red", "negative_vector.target_accuracy"): known["forget_red_largest", "red"],
        ("mean", "finetuned.target_accuracy"): 0.9,
        ("blue", "negative_vector.control_accuracy"):
            (known["forget_blue_largest", "red"] + known["forget_blue_largest", "green"]) / 2,
        ("mean", "multi_task.normalized_accuracy"): 0.855 / 0.9,
        ("mean", "multi_task_100_steps.accuracy"): 0.855,
    }.items():  # fmt: skip
        assert float(rows[key][1].split()[0]) == pytest.approx(100 * share, abs=0.051), key
    for key in (("mean", "multi_task_8000_steps.accuracy"),
                ("best subset", "merged.normalized_accuracy"),
                ("unknown", "negative_vector.target_accuracy")):  # fmt: skip
        assert rows[key][1] == "", key
    assert "6 of 10 published figures have one of ours beside them" in found.body
    assert "| ViT-L-14 | red | pretrained.target_accuracy | 60.0 |  |" in found.body
    assert list(found.figures) == ["published"]


@pytest.mark.parametrize(
    ("off", "start"),
    [(0.0, "Agreement with the paper"), (0.3, "The opposite of agreement with the paper")],
)
def test_agreement_needs_a_small_difference(tmp_path: Path, off: float, start: str) -> None:
    values = {"red": 0.9, "green": 0.901, "blue": 0.899}
    rows = [f"t,bundled,{task},finetuned.target_accuracy,{100 * (value - off)},s\n"
            for task, value in values.items()]  # fmt: skip
    assert clip8_study(tmp_path, "".join(rows)).verdict.startswith(start)


def test_without_data_the_published_figures_stand_alone(tmp_path: Path) -> None:
    experiment = ROOT / "experiments" / "clip8"
    published = (experiment / "published.csv").read_text()
    (tmp_path / "published.csv").write_text(published)
    found = page("clip8", Artifacts(tmp_path), params.load(experiment / "params.yaml"))
    number = len(published.splitlines()) - 1
    assert found.verdict.startswith(f"Nothing is shown here: none of the {number} published")
    assert found.body.count("\n| ViT-") + found.body.count("\n| not stated") == number
    assert not found.figures


@pytest.mark.parametrize(
    ("text", "match"),
    [("a,b\n1,2\n", "expected rows with the columns table"),
     (HEAD + PUBLISHED.replace("88.0", "188"), "4: the value '188' is no percentage"),
     (HEAD + PUBLISHED.replace("88.0", "many"), "4: the value 'many' is no percentage")],
)  # fmt: skip
def test_published_figures_must_be_percentages(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "published.csv").write_text(text)
    with pytest.raises(InvalidData, match=match):
        page("clip8", Artifacts(tmp_path), addition_params())


# Files.


def tiny(name: str, title: str = "A study") -> Study:
    svg = study_pictures.dots(["a"], {"s": [Estimate(0.5, 0.4, 0.6)]}, Axis("x"), name, 'a "b" & c')
    return Study(title, "Nothing is shown here: x.", f"text\n\n![caption](figures/{name}.svg)",
                 {name: svg})  # fmt: skip


def test_a_page_is_written_with_its_pictures_and_old_ones_go(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path)
    write(artifacts, tiny("one"))
    first = artifacts.study_text().read_bytes()
    write(artifacts, tiny("two"))
    assert [path.name for path in artifacts.study_figures().iterdir()] == ["two.svg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "results.md"]
    write(artifacts, tiny("one"))
    assert artifacts.study_text().read_bytes() == first
    assert first.decode().splitlines()[2] == "## A study"
    root = ElementTree.fromstring((artifacts.study_figures() / "one.svg").read_text())
    assert root[0].text == 'a "b" & c'


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path)
    write(artifacts, tiny("one"))
    with pytest.raises(AssertionError):
        write(artifacts, Study("t", "v", "b", {"bad": "<p/>"}))
    assert [path.name for path in artifacts.study_figures().iterdir()] == ["one.svg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "results.md"]


def test_pages_are_collected_with_links_that_lead_to_their_pictures() -> None:
    texts = {name: tiny(name, f"Study: {name}, first").text() for name in ("one", "two")}
    found = collect(texts, ["one seed instead of three"])
    assert "](../experiments/one/figures/one.svg)" in found
    assert "](figures/" not in found
    assert "- [Study: two, first](#study-two-first): Nothing is shown here: x." in found
    assert "- one seed instead of three" in found
    assert found.count("written by the report stage") == 1
    assert found.index("## Study: one") < found.index("## Study: two")
    assert "Nothing." in collect(texts, [])


# Pictures.


def test_series_over_several_panels_share_axes_and_legend() -> None:
    line = Line([0, 1, 4], [Estimate(v, v - 0.1, v + 0.1) for v in (0.4, 0.5, 0.8)])
    panels = {name: {"first": line, "second": line} for name in ("left", "right")}
    across, up = Axis("labels", 1, "even"), Axis("accuracy, %", 100)
    svg = study_pictures.lines(panels, across, up, "id", "label", marks={"floor": 0.3})
    texts = ["".join(found.itertext()) for found in ElementTree.fromstring(svg).iter()
             if found.tag.endswith("text")]  # fmt: skip
    assert texts.count("first") == texts.count("second") == 1
    assert {"left", "right", "labels", "accuracy, %", "4", "floor"} <= set(texts)
    assert svg == study_pictures.lines(panels, across, up, "id", "label", marks={"floor": 0.3})


def test_unbounded_intervals_are_not_drawn() -> None:
    wide = Estimate(0.5, -math.inf, math.inf)
    svg = study_pictures.dots(["a"], {"s": [wide], "t": [None]}, Axis("x"), "id", "label")
    panel = {"s": Line([1.0, 2.0], [wide, wide])}
    log = study_pictures.lines({"": panel}, Axis("x", scale="log"), Axis("y"), "id", "label")
    assert "inf" not in svg + log
    assert "nan" not in svg + log


def test_a_matrix_shows_its_numbers_and_leaves_gaps_empty() -> None:
    table = pd.DataFrame([[math.nan, 0.25], [-0.5, math.nan]], index=["a", "b"], columns=["a", "b"])
    svg = study_pictures.matrix(table, "row", Axis("column", 100), "id", "label", middle=0.5)
    assert ">25.0<" in svg
    assert ">\u221250.0<" in svg
    assert "nan" not in svg


def test_points_carry_their_names() -> None:
    cloud = {"s": Cloud([0.1, 0.2], [0.3, 0.4], ["first"]), "t": Cloud([0.2], [0.2])}
    svg = study_pictures.scatter(cloud, Axis("x"), Axis("y"), "id", "label", guide="diagonal")
    assert ">first<" in svg
    ElementTree.fromstring(study_pictures.standalone(svg))
