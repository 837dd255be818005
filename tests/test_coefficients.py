"""The page on one coefficient against many: verdicts, figures by another computation, pictures."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from tasks.artifacts import Artifacts
from tasks.studies.coefficients import coefficients
from tasks.studies.study import Study
from taskvec import study_pictures
from taskvec.errors import InvalidParams, MissingArtifact
from taskvec.params import Params
from tests import made_studies as made
from tests.made_studies import Truth, edit, study_params
from tests.test_studies import first_figure, jitter

THREE = ["red", "green", "blue"]
SEEDS = [0, 1, 2]
LAYERS = ["0", "1", "2", "10", "rest"]
NAMES = ["c", "x", "y"]
SPLIT = "c * red + x * green + y * blue"
TOTAL = "c * (red + green + blue)"
COLUMNS = ["number", "validation", "test", "gap", "test against single", "image evaluations"]


def checked(**more: Any) -> Params:
    layerwise = {"strategy": "gradient", "options": {"layerwise": True}}
    edits = {
        "single": edit(TOTAL, THREE),
        "per_task": edit(SPLIT, THREE, search={"strategy": "gradient"}),
        "per_layer": edit(TOTAL, THREE, search=layerwise),
        "per_task_layer": edit(SPLIT, THREE, search=layerwise),
        "adamerging": edit(SPLIT, THREE, search={"strategy": "adamerging"}),
        **more,
    }
    return study_params(
        THREE,
        SEEDS,
        edits={name: {**item, "group": "coefficients"} for name, item in edits.items()},
    )


def truth(strength: float, wide: float = 1.0) -> Truth:
    def found(model: str, task: str, seed: int) -> float:
        if model in ("pretrained", "finetuned"):
            return {"pretrained": 0.4, "finetuned": 0.9}[model]
        if model == "single":
            return 0.7 + wide * jitter(task, seed)
        return 0.7 + strength + wide * jitter(model, task, seed)

    return found


def value(name: str, layer: str, seed: int) -> float:
    return round(0.3 + jitter(name, layer, seed, "c") * 10, 3)


def made_study(root: Path, share: Truth, setting: Params | None = None) -> tuple[Artifacts, Params]:
    """Write the artifacts of the study; a search by layers has chosen a value for each layer."""
    artifacts, setting = Artifacts(root), setting or checked()
    made.experiment(artifacts, setting, share)
    for name, item in setting.edits.items():
        for seed in SEEDS:
            layers = LAYERS if "layer" in name or name == "adamerging" else [""]
            chosen = {
                f"coefficient.{own}" + f"@{layer}" * bool(layer): value(own, layer, seed)
                for own in item.coefficients
                for layer in layers
            }
            price = 300 * (1 + list(setting.edits).index(name)) + seed
            summary = {**chosen, "image_evaluations": price, "interval.c.low": 0.0}
            made.text(artifacts.coefficients(name, seed), json.dumps(summary))
    return artifacts, setting


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifacts, Params, Study]:
    """Return a study in which many coefficients are better, with its page."""
    artifacts, setting = made_study(tmp_path_factory.mktemp("shown"), truth(0.1))
    return artifacts, setting, coefficients(artifacts, setting)


def normalized(artifacts: Artifacts, edit_: str, split: str) -> list[float]:
    """Return the mean over tasks of accuracy / fine-tuned accuracy, one a seed."""
    found = []
    for seed in SEEDS:
        tables = [pd.read_csv(artifacts.evaluation(name, seed)) for name in [*THREE, edit_]]
        table = pd.concat(tables).query("split == @split").set_index(["model", "task"])["accuracy"]
        found.append(float(np.mean([table[edit_, t] / table["finetuned", t] for t in THREE])))
    return found


def rows(body: str) -> dict[str, dict[str, str]]:
    """Return the table by its first column."""
    lines = [line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("|")]
    return {name: dict(zip(COLUMNS, cells, strict=True)) for name, *cells in lines[2:]}


# Verdicts.


def test_an_advantage_on_both_splits_is_shown(
    shown: tuple[Artifacts, Params, Study],
) -> None:
    verdict = shown[2].verdict
    start = "An advantage of per-task coefficients over a single one shows here"
    assert verdict.startswith(start), verdict
    assert verdict.count("95 % interval") == 2


def test_the_opposite_is_called_the_opposite(tmp_path: Path) -> None:
    found = coefficients(*made_study(tmp_path, truth(-0.1)))
    assert found.verdict.startswith("The opposite of an advantage of per-task"), found.verdict


@pytest.mark.parametrize(("strength", "wide"), [(0.0, 0.2), (0.01, 8.0)])
def test_what_the_interval_does_not_settle_is_not_claimed(
    strength: float, wide: float, tmp_path: Path
) -> None:
    found = coefficients(*made_study(tmp_path, truth(strength, wide)))
    assert found.verdict.startswith("Nothing is shown here"), found.verdict


@pytest.mark.parametrize(
    ("shows", "fails"), [("validation", "test"), ("test", "validation")]
)  # fmt: skip
def test_an_advantage_on_one_split_alone_is_half_of_it(
    shows: str, fails: str, tmp_path: Path
) -> None:
    artifacts, setting = made_study(tmp_path, truth(0.1))
    for seed in SEEDS:
        as_good_as_single(artifacts, seed, fails)
    found = coefficients(artifacts, setting)
    assert found.verdict.startswith("Only half of an advantage of per-task"), found.verdict
    assert f"on {shows} but not on {fails} data" in found.verdict


def as_good_as_single(artifacts: Artifacts, seed: int, split: str) -> None:
    path = artifacts.evaluation("per_task", seed)
    table, single = pd.read_csv(path), pd.read_csv(artifacts.evaluation("single", seed))
    own = table["split"] == split
    figures = [name for name in table if name not in ("model", "task", "split", "seed")]
    table.loc[own, figures] = single.loc[own, figures]
    table.to_csv(path, index=False)


def test_one_seed_settles_nothing(tmp_path: Path) -> None:
    artifacts, setting = made_study(tmp_path, truth(0.1))
    found = coefficients(artifacts, setting.model_copy(update={"seeds": [0]}))
    assert found.verdict.startswith("Nothing is shown here"), found.verdict
    assert "nan" not in found.text()


# Figures by another computation.


def test_the_differences_are_paired_by_seed_and_have_the_t_interval_of_scipy(
    shown: tuple[Artifacts, Params, Study],
) -> None:
    artifacts, _, found = shown
    texts = re.findall(r"by (\S+ points \(95 % interval [^)]*\)) on", found.verdict)
    for split, text in zip(("validation", "test"), texts, strict=True):
        gains = np.subtract(*(normalized(artifacts, n, split) for n in ("per_task", "single")))
        low, high = scipy.stats.t.interval(0.95, 2, gains.mean(), scipy.stats.sem(gains))
        assert first_figure(text) == pytest.approx(100 * gains.mean(), abs=0.051)
        bounds = [float(x) for x in re.findall(r"([\d.]+) to ([\d.]+)\)", text)[0]]
        assert bounds == pytest.approx([100 * low, 100 * high], abs=0.051)


def test_the_table_has_means_gaps_and_prices(shown: tuple[Artifacts, Params, Study]) -> None:
    artifacts, setting, found = shown
    table = rows(found.body)
    assert list(table) == [name.replace("_", " ") for name in setting.edits]
    for place, name in enumerate(setting.edits):
        cells = table[name.replace("_", " ")]
        means = {split: normalized(artifacts, name, split) for split in ("validation", "test")}
        for split, values in means.items():
            assert float(cells[split].split()[0]) == pytest.approx(100 * np.mean(values), abs=0.051)
        gap = 100 * np.mean(np.subtract(means["validation"], means["test"]))
        assert gap < -0.1  # what was made is harder on validation data
        shown_gap = cells["gap"].split()[0].replace("\u2212", "-")
        assert float(shown_gap) == pytest.approx(gap, abs=0.051)
        assert cells["image evaluations"] == f"{300 * (place + 1) + 1:,}"
    numbers = {name: cells["number"] for name, cells in table.items()}
    assert numbers == {"single": "1", "per task": "3", "per layer": "5", "per task layer": "15",
                       "adamerging": "15"}  # fmt: skip
    assert [cells["test against single"] == "" for cells in table.values()] == [True, *4 * [False]]


def test_pictures_show_the_choice_of_every_seed(shown: tuple[Artifacts, Params, Study]) -> None:
    found = shown[2]
    assert re.findall(r"\(figures/(\w+)\.svg\)", found.body) == list(found.figures)
    texts = {name: labels(svg) for name, svg in found.figures.items()}
    for name in ("tasks", "layers"):
        assert {"seed 0", "seed 1", "seed 2", "single"} <= set(texts[name])
        assert "nan" not in found.figures[name] and "inf" not in found.figures[name]
    assert set(THREE) <= set(texts["tasks"])
    ticks = [text for text in texts["layers"] if text in LAYERS]
    assert ticks[:4] == ["0", "1", "2", "10"]  # by depth
    first, second, third = (f"{value('c', 'rest', seed):.2f}" for seed in SEEDS)
    assert f"What is in no block has {first}, {second} and {third}." in found.body


def labels(svg: str) -> list[str]:
    root = ElementTree.fromstring(study_pictures.standalone(svg))
    return ["".join(part.itertext()) for part in root.iter() if part.tag.endswith("text")]


def test_the_same_artifacts_give_the_same_bytes(shown: tuple[Artifacts, Params, Study]) -> None:
    artifacts, setting, first = shown
    assert coefficients(artifacts, setting) == first
    assert str(artifacts.root) not in first.text()


# What is missing or of another kind.


def test_a_missing_evaluation_or_search_is_named(tmp_path: Path) -> None:
    artifacts, setting = made_study(tmp_path, truth(0.1))
    for path in (artifacts.evaluation("per_task", 1), artifacts.coefficients("adamerging", 2)):
        whole = path.read_text()
        path.unlink()
        with pytest.raises(MissingArtifact, match="taskvec run"):
            coefficients(artifacts, setting)
        path.write_text(whole)


@pytest.mark.parametrize("missing", ["single", "per_task", "per_layer"])
def test_an_edit_that_the_page_needs_is_named(missing: str, tmp_path: Path) -> None:
    artifacts, setting = made_study(tmp_path, truth(0.1))
    edits = {name: item for name, item in setting.edits.items() if name != missing}
    with pytest.raises(InvalidParams, match=f"this study needs edits.{missing}"):
        coefficients(artifacts, setting.model_copy(update={"edits": edits}))


def test_parameters_of_another_study_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidParams, match="this study needs edits of group 'coefficients'"):
        coefficients(Artifacts(tmp_path), study_params(THREE, [0]))


@pytest.mark.parametrize("values", [{"c": 0.3}, {"c@0": 0.1, "x@0": 0.2}])
def test_layers_without_values_of_their_own_are_refused(
    values: dict[str, float], tmp_path: Path
) -> None:
    artifacts, setting = made_study(tmp_path, truth(0.1))
    summary = {f"coefficient.{key}": item for key, item in values.items()}
    text = json.dumps({**summary, "image_evaluations": 1})
    made.text(artifacts.coefficients("per_layer", 0), text)
    with pytest.raises(InvalidParams, match="layerwise: true"):
        coefficients(artifacts, setting)
