"""Few labelled images: which they are, and what a start reaches with them."""

import hashlib
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import stages
from tasks.artifacts import Artifacts
from tasks.few_shot import drawn
from tasks.inputs import architecture
from tasks.inputs import head as read_head
from tasks.inputs import images as read_images
from taskvec import checkpoints, tables
from taskvec.errors import IncompatibleWeights, InvalidData
from taskvec.metrics import Pictures, count_correct, wilson_interval
from taskvec.params import Params
from taskvec.study_tables import FewShotTable
from taskvec.training import Lesson, fine_tune
from tests.test_sweeps import SEED, SIZES, one_thread, quiet, setting, trained

__all__ = ["one_thread", "setting", "trained"]  # fixtures

law = settings(deadline=None, max_examples=100)


@law
@given(st.data(), st.integers(1, 6), st.integers(0, 5), st.integers(0, 99))
def test_so_many_images_of_every_class_are_drawn_and_more_hold_the_fewer(
    data: st.DataObject, number: int, shots: int, seed: int
) -> None:
    classes = data.draw(st.permutations(range(9)))[:number]
    extra = data.draw(st.lists(st.sampled_from(classes), max_size=20))
    labels = torch.tensor(data.draw(st.permutations(classes * (shots + 1) + extra)))
    found = drawn(labels, shots, seed, "a")
    counts = torch.bincount(labels[found], minlength=9)
    assert counts.tolist() == [shots * (label in classes) for label in range(9)]
    assert len(found.unique()) == len(found)
    more = drawn(labels, shots + 1, seed, "a")
    assert [i for i in more.tolist() if i in set(found.tolist())] == found.tolist()


def test_seed_and_task_decide_the_images_and_no_generator_does() -> None:
    labels = torch.arange(300) % 3
    first = drawn(labels, 4, 0, "a").tolist()
    torch.manual_seed(1)
    assert drawn(labels, 4, 0, "a").tolist() == first
    assert drawn(labels, 4, 1, "a").tolist() != first
    assert drawn(labels, 4, 0, "b").tolist() != first
    assert drawn(labels, 1, 0, "mnist").tolist() == [240, 182, 235]


def test_a_class_with_too_few_images_is_named() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    message = "a has 2 training images of class 2, but few_shots asks for 3"
    with pytest.raises(InvalidData, match=message):
        drawn(labels, 3, 0, "a")


def run(artifacts: Artifacts, setting: Params, emit: stages.Emit = quiet) -> pd.DataFrame:
    stages.run("few_shot", f"few-{SEED}", setting, artifacts, emit)
    return tables.read(artifacts.few_shot("few", SEED), FewShotTable)


@pytest.fixture(scope="module")
def done(
    setting: Params, trained: Artifacts, tmp_path_factory: pytest.TempPathFactory
) -> Artifacts:
    """Return the artifacts with the study; do not change them."""
    artifacts = Artifacts(tmp_path_factory.mktemp("done") / "copy")
    shutil.copytree(trained.root, artifacts.root)
    run(artifacts, setting)
    return artifacts


@pytest.fixture
def fresh(trained: Artifacts, tmp_path: Path) -> Artifacts:
    """Return a copy of the experiment, to change at will."""
    shutil.copytree(trained.root, tmp_path / "copy")
    return Artifacts(tmp_path / "copy")


def digest(artifacts: Artifacts) -> str:
    return hashlib.sha256(artifacts.few_shot("few", SEED).read_bytes()).hexdigest()


@pytest.mark.parametrize("start", ["pretrained", "both"])
def test_a_row_is_what_the_start_reaches_after_training_on_the_images(
    setting: Params, done: Artifacts, start: str
) -> None:
    found = tables.read(done.few_shot("few", SEED), FewShotTable)
    found = found[found["start"] == start].set_index(["shots", "split"])
    assert list(found.index) == [(n, split) for n in (0, 1, 4) for split in ("validation", "test")]
    path = done.pretrained() if start == "pretrained" else done.edited("both", SEED)
    state = checkpoints.load(path, "checkpoint").tensors
    weights = read_head(done, "two")
    images, labels = read_images(done, "two", "train")
    reached = []
    for shots in (0, 1, 4):
        tower = architecture(setting.model)
        tower.load(state)
        if shots:
            rows = drawn(labels, shots, SEED, "two")
            batch = min(setting.fine_tune.batch_size, 3 * shots)
            recipe = setting.fine_tune.model_copy(update={"batch_size": batch})
            fine_tune(tower, [Lesson(weights, images[rows], labels[rows])], recipe, SEED)
        for split in ("validation", "test"):
            pictures = Pictures(tower, *read_images(done, "two", split))
            right = count_correct(tower, weights, pictures)
            row = found.loc[shots, split]
            assert (row["correct"], row["items"]) == (right, SIZES[split])
            assert row["accuracy"] == right / SIZES[split]
            assert (row["low"], row["high"]) == wilson_interval(right, SIZES[split])
        reached.append(right)
    assert len(set(reached)) > 1


def test_labels_help_the_pretrained_model(done: Artifacts) -> None:
    found = tables.read(done.few_shot("few", SEED), FewShotTable)
    found = found[(found["start"] == "pretrained") & (found["split"] == "test")]
    reached = dict(zip(found["shots"], found["accuracy"], strict=True))
    assert reached[4] > reached[0]


def test_a_second_run_writes_the_same_bytes_whatever_was_drawn_before(
    setting: Params, done: Artifacts, fresh: Artifacts
) -> None:
    torch.manual_seed(99)
    run(fresh, setting)
    assert digest(fresh) == digest(done)


def test_progress_counts_the_models(setting: Params, fresh: Artifacts) -> None:
    seen: list[stages.Progress] = []
    run(fresh, setting, seen.append)
    assert seen == [{"step": number, "steps": 6} for number in range(1, 7)]


def test_only_drawn_training_images_matter(
    setting: Params, done: Artifacts, fresh: Artifacts
) -> None:
    path = fresh.images("two", "train")
    stored = checkpoints.load(path, "images")
    labels = stored.tensors["labels"]
    kept = drawn(labels, 4, SEED, "two")
    images = torch.zeros_like(stored.tensors["images"])
    images[kept] = stored.tensors["images"][kept]
    tensors = {"images": images, "labels": labels}
    checkpoints.save(path, tensors, kind="images", task="two", split="train")
    run(fresh, setting)
    assert digest(fresh) == digest(done)


def test_an_edit_of_another_origin_is_refused(setting: Params, fresh: Artifacts) -> None:
    path = fresh.edited("both", SEED)
    stored = checkpoints.load(path, "checkpoint")
    checkpoints.save(
        path, stored.tensors, kind="checkpoint", origin="0" * 64,
        identity=stored.metadata["identity"],
    )  # fmt: skip
    with pytest.raises(IncompatibleWeights, match="starts from the pre-trained weights 000000"):
        run(fresh, setting)
    assert not fresh.few_shot("few", SEED).exists()


def test_a_start_stands_once_for_every_number_and_split(done: Artifacts) -> None:
    found = tables.read(done.few_shot("few", SEED), FewShotTable)
    with pytest.raises(InvalidData, match="stand twice"):
        tables.check(pd.concat([found, found.tail(1)]), FewShotTable, "x")
