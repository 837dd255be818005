"""The paper's own experiment: complete but for the data, and ready for it."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.artifacts import Artifacts
from tasks.prepare import prepare
from taskvec import params
from taskvec.datasets import external, manifest
from taskvec.params import Params
from taskvec.sections import Data, Task
from tests import tiny_sets
from tests.tiny_sets import Pictures

DIRECTORY = Path(__file__).parents[1] / "experiments" / "clip8"
EIGHT = ["cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "sun397", "svhn"]
CLASSES = [196, 47, 10, 43, 10, 45, 397, 10]


@pytest.fixture(scope="module")
def experiment() -> Params:
    return params.load(DIRECTORY / "params.yaml")


def imagenet(root: Path, pictures: Pictures, classes: int, each: int) -> None:
    tiny_sets.image_folder(root, pictures, classes, each, folders=("train", "val"))


# where the writer writes below the data root, and how many classes it can write
WRITERS: dict[str, tuple[Callable[[Path, Pictures, int, int], None], str, int]] = {
    "cars": (tiny_sets.stanford_cars, "torchvision", 3),
    "dtd": (tiny_sets.dtd, "torchvision", 3),
    "eurosat": (tiny_sets.eurosat, "torchvision", 3),
    "gtsrb": (tiny_sets.gtsrb, "torchvision", 3),
    "mnist": (tiny_sets.mnist, "torchvision", 3),
    "resisc45": (tiny_sets.parquet_files, "resisc45", 3),
    "sun397": (tiny_sets.sun397, "torchvision", 3),
    "svhn": (tiny_sets.svhn, "torchvision", 3),
    "imagenet": (imagenet, "imagenet", 3),
}


def test_the_experiment_has_the_tasks_heads_and_recipe_of_the_paper(experiment: Params) -> None:
    assert list(experiment.tasks) == [*EIGHT, "imagenet"]
    heads = [experiment.tasks[name].head for name in EIGHT]
    assert [len(head.classes) for head in heads] == CLASSES
    control = experiment.tasks["imagenet"].head
    assert (len(control.classes), len(control.templates)) == (1000, 80)
    recipe = experiment.fine_tune
    assert (recipe.steps, recipe.batch_size, recipe.learning_rate) == (2000, 128, 1e-5)
    assert (recipe.weight_decay, recipe.clip_norm) == (0.1, 1.0)
    assert recipe.warmup * recipe.steps == 200


def test_the_sizes_are_those_of_the_paper(experiment: Params) -> None:
    data = [experiment.tasks[name].data for name in EIGHT]
    assert sum(item.test for item in data) == 87_433
    # 20,429 in the paper; whole traffic signs make 24 fewer
    assert sum(item.validation for item in data) == 20_429 - 24
    for item in data:
        assert item.validation <= 5000
        share = item.validation / (item.train + item.validation)
        assert share == pytest.approx(0.1, abs=0.012) or item.validation == 5000


def test_every_task_is_forgotten_by_both_rules_and_keeps_imagenet(experiment: Params) -> None:
    for name in EIGHT:
        for rule in ("largest", "best"):
            edit = experiment.edits[f"forget_{name}_{rule}"]
            assert edit.select == rule and edit.constraint is not None
            assert edit.constraint.rule == ("min_ratio", 0.95)
            assert edit.constraint.tasks == ["imagenet"]
            (grid,) = edit.coefficients.values()
            assert grid.values() == [round(0.05 * k, 12) for k in range(21)]
    assert experiment.parse("addition").vectors == tuple(EIGHT)
    assert experiment.sweeps["pairs"].sizes == [2]
    assert experiment.sweeps["subsets"].sizes == list(range(1, 9))


def test_the_names_of_the_classes_are_those_of_open_clip(experiment: Params) -> None:
    from taskvec.models import open_clip  # noqa: F401  makes torchvision importable

    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES  # isort: skip

    head = experiment.tasks["imagenet"].head
    pairs = zip(head.classes, IMAGENET_CLASSNAMES, strict=True)
    changed = [(ours, theirs) for ours, theirs in pairs if ours != theirs]
    assert changed == [("projectile", "missile"), ("sunglass", "sunglasses")]
    assert head.templates == [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]


def test_without_data_every_file_is_named(experiment: Params, tmp_path: Path) -> None:
    lines = external.missing(experiment.tasks, tmp_path)
    wanted = sum(len(task.data.source.files) for task in experiment.tasks.values())
    assert len(lines) == wanted
    for name in experiment.tasks:
        assert any(line.startswith(f"{name}: ") for line in lines)
    assert any("python -m taskvec.datasets.manifest" in line for line in lines)


@pytest.mark.parametrize("name", WRITERS)
def test_each_task_is_prepared_from_files_of_its_format(
    name: str, experiment: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, folder, classes = WRITERS[name]
    root = tmp_path / "root"
    (root / folder).mkdir(parents=True)
    write(root / folder, Pictures(), classes, 8)
    data = with_digests(experiment.tasks[name], root)
    monkeypatch.setenv("TASKVEC_DATA", str(root))
    artifacts = Artifacts(tmp_path)
    prepare(
        artifacts, task=name, data=data, classes=experiment.tasks[name].head.classes[:classes],
        templates=["{}"], image_size=16, shots=1, emit=lambda *_, **__: None,
    )  # fmt: skip
    summary = json.loads(artifacts.summary(name).read_text())
    assert (summary["train"], summary["validation"], summary["test"]) == (12, 6, 12)
    assert summary["source"] == data.source.external


def with_digests(task: Task, root: Path) -> Data:
    """Return a task's data with small sizes and the digests of the files that lie there."""
    files = {}
    for name in task.data.source.files:
        if name.endswith(manifest.NAME):
            manifest.write((root / name).parent)
        files[name] = manifest.digest(root / name)
    source = task.data.source.model_dump(exclude_none=True) | {"files": files}
    options = task.data.options | ({"side": 16} if "side" in task.data.options else {})
    changes = {"options": options, "source": source, "train": 12, "validation": 6, "test": 12}
    return Data.model_validate({**task.data.model_dump(), **changes})


def test_the_published_figures_are_a_table_of_percentages() -> None:
    with (DIRECTORY / "published.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["table", "model", "task", "what", "value", "source"]
    assert all(0 < float(row["value"]) <= 100 and row["source"] for row in rows)
    keys = [(row["table"], row["model"], row["task"], row["what"]) for row in rows]
    assert len(keys) == len(set(keys))
    found = dict(zip(keys, (float(row["value"]) for row in rows), strict=True))
    assert found["forgetting", "ViT-B-32", "mean", "negative_vector.target_accuracy"] == 24.0
    per_task = [
        found["forgetting_per_task", "ViT-B-32", name, "negative_vector.target_accuracy"]
        for name in EIGHT
    ]
    assert sum(per_task) / 8 == pytest.approx(24.0, abs=0.05)
