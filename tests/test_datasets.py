"""The data of the default experiment: adapters, package data, splits, and the stage prepare."""

import gzip
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks.artifacts import Artifacts
from tasks.prepare import prepare
from taskvec import checkpoints, params, plugins, tables
from taskvec.datasets import digits, faces, letters, mnist, npz, package_data, textures
from taskvec.datasets.items import SPLITS, Items
from taskvec.datasets.splitting import assign, digests, near_duplicates, order, resize
from taskvec.errors import InvalidData, MissingDependency
from taskvec.sections import Data, Source, Task

DEFAULT = Path(__file__).parent.parent / "params.yaml"
PAIRS = {"mnist_inverted": "mnist", "digits_inverted": "digits"}
SMALL = ["digits", "faces"]


def default_tasks() -> dict[str, Task]:
    if not DEFAULT.is_file():
        return {}
    tasks = params.plain(params.read(DEFAULT))["tasks"]
    return {name: Task.model_validate(task) for name, task in tasks.items()}


TASKS = default_tasks()


def task_or_skip(name: str) -> Task:
    task = TASKS[name]
    try:
        distribution(task.data.source.package)
    except PackageNotFoundError:
        pytest.skip(f"{task.data.source.package} is not installed")
    return task


@pytest.fixture(scope="module")
def loaded() -> dict[str, Items]:
    return {}


def load(name: str, cache: dict[str, Items]) -> Items:
    """Return a default task's items, resized; each task is read once in this file."""
    data = task_or_skip(name).data
    if name not in cache:
        items = plugins.load("datasets", data.dataset).load(
            package_data.locate(data.source), **data.options
        )
        cache[name] = Items(resize(items.images, 48), items.labels, items.groups, items.splits)
    return cache[name]


def sizes_of(data: Data) -> dict[str, int]:
    return {"train": data.train, "validation": data.validation, "test": data.test}


def run(artifacts: Artifacts, name: str, image_size: int, shots: int) -> None:
    """Run the stage prepare on a default task."""
    task = task_or_skip(name)
    prepare(
        artifacts, task=name, data=task.data, classes=task.head.classes,
        templates=task.head.templates, emit=lambda *_, **__: None,
        image_size=image_size, shots=shots,
    )  # fmt: skip


def members(values: list[Any], splits: list[str | None]) -> dict[str, set[Any]]:
    found: dict[str, set[Any]] = {split: set() for split in SPLITS}
    for value, split in zip(values, splits, strict=True):
        if split:
            found[split].add(value)
    return found


def disjoint(sets: Mapping[str, set[Any]]) -> bool:
    return sum(map(len, sets.values())) == len(set().union(*sets.values()))


def make_items(labels: list[int], groups: list[str], splits: list[str] | None = None) -> Items:
    """Return different 4 x 4 pictures with these labels and groups."""
    count = np.arange(len(labels), dtype=np.uint32)
    images = np.zeros((len(labels), 4, 4), dtype=np.uint8)
    images[:, 0, :] = count.view(np.uint8).reshape(-1, 4)
    return Items(images, np.array(labels, dtype=np.int64), groups, splits)


@pytest.mark.parametrize("name", TASKS)
def test_default_task_splits_into_the_declared_sizes(name: str, loaded: dict[str, Items]) -> None:
    items, task = load(name, loaded), TASKS[name]
    assert items.images.dtype == np.uint8 and items.images.shape[1:] == (3, 48, 48)
    assert sorted(set(items.labels.tolist())) == list(range(len(task.head.classes)))
    splits = assign(items, sizes_of(task.data), task.data.seed)
    assert Counter(split for split in splits if split) == sizes_of(task.data)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", TASKS)
def test_default_splits_share_no_item_no_group_and_have_all_classes(
    name: str, seed: int, loaded: dict[str, Items]
) -> None:
    items = load(name, loaded)
    splits = assign(items, sizes_of(TASKS[name].data), seed)
    assert disjoint(members(digests(items.images), splits))
    assert disjoint(members(items.groups, splits))
    classes = members(items.labels.tolist(), splits)
    assert all(found == set(items.labels.tolist()) for found in classes.values())


@pytest.mark.parametrize("name", TASKS)
def test_default_splits_keep_the_proportions_of_the_classes(
    name: str, loaded: dict[str, Items]
) -> None:
    items, sizes = load(name, loaded), sizes_of(TASKS[name].data)
    splits = np.array(assign(items, sizes, 0))
    share = np.bincount(items.labels) / len(items.labels)
    for split in SPLITS:
        counts = np.bincount(items.labels[splits == split], minlength=len(share))
        assert np.abs(counts - share * sizes[split]).max() <= 1.5


@pytest.mark.parametrize("inverted", [name for name in PAIRS if name in TASKS])
@pytest.mark.parametrize("seed", [0, 1])
def test_inverted_task_has_the_splits_of_its_original(
    inverted: str, seed: int, loaded: dict[str, Items]
) -> None:
    a, b = load(PAIRS[inverted], loaded), load(inverted, loaded)
    sizes = sizes_of(TASKS[inverted].data)
    assert assign(a, sizes, seed) == assign(b, sizes, seed)
    assert order(a, seed) == order(b, seed)
    # PIL rounds twice, to whole grey levels, and not symmetrically
    difference = int(np.abs(255 - a.images.astype(int) - b.images).max())
    assert difference <= 2


@pytest.mark.parametrize("name", [name for name in SMALL if name in TASKS])
def test_prepare_writes_what_the_table_says(name: str, tmp_path: Path) -> None:
    task, artifacts = task_or_skip(name), Artifacts(tmp_path)
    run(artifacts, name, image_size=48, shots=3)
    summary = json.loads(artifacts.summary(name).read_text())
    table = tables.read(artifacts.items(name), tables.Items)
    classes = len(task.head.classes)
    for split, size in sizes_of(task.data).items():
        weights = checkpoints.load(artifacts.images(name, split), "images")
        images, labels = weights.tensors["images"].numpy(), weights.tensors["labels"].numpy()
        rows = table[table["split"] == split]
        assert images.shape == (size, 3, 48, 48) and summary[split] == size
        assert labels.tolist() == rows["label"].tolist()
        assert digests(images) == rows["digest"].tolist()
        assert rows["item"].tolist() == list(range(size))
    aligned = checkpoints.load(artifacts.images(name, "alignment"), "images").tensors
    assert digests(aligned["images"].numpy()) == table["digest"][table["alignment"]].tolist()
    assert Counter(aligned["labels"].tolist()) == dict.fromkeys(range(classes), 3)
    assert summary["duplicates_removed"] == 0


def test_prepare_is_byte_identical_under_another_hash_seed_and_locale(tmp_path: Path) -> None:
    task_or_skip("faces") if TASKS else pytest.skip("there is no params.yaml")
    code = (
        "import sys; from pathlib import Path; from test_datasets import Artifacts, run\n"
        "run(Artifacts(Path(sys.argv[1])), 'faces', image_size=32, shots=0)\n"
    )
    paths = os.pathsep.join([str(DEFAULT.parent), str(Path(__file__).parent)])
    written = []
    for seed, locale in [("1", "C"), ("2", "C.UTF-8")]:
        root = tmp_path / seed
        command = [sys.executable, "-c", code, str(root)]
        environment = {"PYTHONPATH": paths, "PYTHONHASHSEED": seed, "LC_ALL": locale}
        subprocess.run(command, env={**os.environ, **environment}, check=True)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        written.append({str(path.relative_to(root)): path.read_bytes() for path in files})
    assert written[0] == written[1] and len(written[0]) == 6


def test_prepare_without_shots_marks_no_alignment_picture(tmp_path: Path) -> None:
    if not TASKS:
        pytest.skip("there is no params.yaml")
    artifacts = Artifacts(tmp_path)
    run(artifacts, "faces", image_size=32, shots=0)
    assert not tables.read(artifacts.items("faces"), tables.Items)["alignment"].any()
    aligned = checkpoints.load(artifacts.images("faces", "alignment"), "images").tensors
    assert sorted(aligned["labels"].tolist()) == [0, 1]


def test_prepare_refuses_more_shots_than_training_items(tmp_path: Path) -> None:
    if not TASKS:
        pytest.skip("there is no params.yaml")
    with pytest.raises(InvalidData, match=r"faces has 50 training items of class 0, but 51"):
        run(Artifacts(tmp_path), "faces", image_size=32, shots=51)
    assert not (tmp_path / "data").exists()


def numpy_source(**changes: Any) -> Source:
    """Return a source that is there wherever the tests run, with changes."""
    package = distribution("numpy")
    path = Path(str(package.locate_file("numpy/__init__.py")))
    mark = digests(np.frombuffer(path.read_bytes(), dtype=np.uint8)[None])[0]
    values = {"package": "numpy", "version": package.version, "files": {"numpy/__init__.py": mark}}
    return Source.model_validate({**values, **changes})


def test_locate_returns_the_verified_paths() -> None:
    assert package_data.locate(numpy_source())["numpy/__init__.py"].is_file()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"files": {"numpy/__init__.py": "0" * 64}}, InvalidData, "wrong digest: found"),
        ({"files": {"numpy/absent.csv": "0" * 64}}, InvalidData, "has no file numpy/absent.csv"),
        ({"files": {"pytest/__init__.py": "0" * 64}}, InvalidData, "has no file pytest/"),
        ({"version": "0.0.1"}, InvalidData, r"expected 0\.0\.1.*pip install 'numpy==0\.0\.1'"),
        ({"package": "no-such"}, MissingDependency, "no-such.*pip install 'no-such=="),
    ],
)
def test_locate_refuses_what_is_not_declared(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        package_data.locate(numpy_source(**changes))
    assert getattr(caught.value, "exit_code", None) == 3


def test_locate_refuses_a_path_out_of_the_package() -> None:
    escaping = Source.model_construct(
        package="numpy",
        version=distribution("numpy").version,
        files={"numpy/../pytest/__init__.py": "0" * 64, "/etc/hostname": "0" * 64},
    )
    with pytest.raises(InvalidData, match="has no file"):
        package_data.locate(escaping)


@settings(max_examples=60, deadline=None)
@given(
    entries=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), min_size=20, max_size=80),
    seed=st.integers(0, 9),
)
def test_drawn_splits_have_their_sizes_or_are_refused(
    entries: list[tuple[int, int]], seed: int
) -> None:
    rank = {label: i for i, label in enumerate(sorted({label for label, _ in entries}))}
    groups = [f"g{group}" for _, group in entries]
    items = make_items([rank[label] for label, _ in entries], groups)
    sizes = {"train": len(entries) // 3, "validation": 3, "test": 4}
    try:
        splits = assign(items, sizes, seed)
    except InvalidData:
        # only large groups can make it impossible
        assert max(Counter(groups).values()) > 1
        return
    assert Counter(split for split in splits if split) == sizes
    assert disjoint(members(groups, splits))
    assert assign(items, sizes, seed) == splits


@given(
    labels=st.lists(st.integers(0, 2), min_size=12, max_size=60),
    seed=st.integers(0, 9),
)
def test_items_without_groups_can_be_used_up_to_the_last(labels: list[int], seed: int) -> None:
    items = make_items([*labels, 0, 1, 2], [f"i{i}" for i in range(len(labels) + 3)])
    sizes = {"train": len(labels) - 2, "validation": 2, "test": 3}
    splits = assign(items, sizes, seed)
    assert None not in splits and Counter(splits) == sizes


def test_groups_of_all_classes_are_shared_out_whole() -> None:
    groups = [f"font{font}" for font in range(18) for _ in range(20)]
    items = make_items([i % 10 for i in range(360)], groups)
    splits = assign(items, {"train": 180, "validation": 40, "test": 80}, 0)
    homes = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        homes[group].add(split)
    assert all(len(found - {None}) <= 1 for found in homes.values())


def test_only_the_first_of_equal_pictures_is_used() -> None:
    items = make_items([0, 1] * 10, [f"i{i}" for i in range(20)])
    items.images[7] = items.images[3]
    splits = assign(items, {"train": 11, "validation": 4, "test": 4}, 0)
    assert splits[7] is None and splits[3] is not None
    with pytest.raises(InvalidData, match="19 items are left after 1 duplicates.*expected 20"):
        assign(items, {"train": 12, "validation": 4, "test": 4}, 0)


def test_given_splits_are_kept_and_thinned_by_class() -> None:
    given_splits = ["train"] * 12 + ["validation"] * 4 + ["test"] * 4
    items = make_items([0, 1] * 10, [f"i{i}" for i in range(20)], given_splits)
    splits = assign(items, {"train": 6, "validation": 4, "test": 2}, 0)
    pairs = zip(splits, given_splits, strict=True)
    assert all(split in (None, declared) for split, declared in pairs)
    counts = Counter(zip(splits, items.labels.tolist(), strict=True))
    assert counts["train", 0] == counts["train", 1] == 3
    with pytest.raises(InvalidData, match="4 items are left for validation.*expected 5"):
        assign(items, {"train": 6, "validation": 5, "test": 2}, 0)


@pytest.mark.parametrize(
    ("labels", "groups", "splits", "message"),
    [
        ([0, 2], ["a", "b"], None, r"labels are \[0, 2\]"),
        ([0, 1], ["a"], None, "same number"),
        ([0, 1], ["a", "a"], ["train", "test"], "'a' is in train and in test"),
        ([0, 1], ["a", "b"], ["train", "dev"], "'dev'"),
    ],
)
def test_items_that_contradict_each_other_are_refused(
    labels: list[int], groups: list[str], splits: list[str] | None, message: str
) -> None:
    with pytest.raises(InvalidData, match=message):
        assign(make_items(labels, groups, splits), dict.fromkeys(SPLITS, 0), 0)


def test_the_schema_refuses_an_item_in_two_splits() -> None:
    table = pd.DataFrame(
        {
            "item": [0, 1, 0], "split": ["train", "train", "test"], "group": ["a", "b", "c"],
            "label": [0, 1, 0], "digest": ["a" * 64, "b" * 64, "c" * 64], "alignment": [False] * 3,
        }
    )  # fmt: skip
    tables.check(table, tables.Items, "items.csv")
    with pytest.raises(InvalidData, match="an item is in two splits"):
        tables.check(table.assign(digest=["a" * 64, "b" * 64, "a" * 64]), tables.Items, "items.csv")


def test_resize_repeats_grey_and_keeps_colour_apart() -> None:
    random = np.random.default_rng(0)
    grey = random.integers(0, 256, (3, 9, 7), dtype=np.uint8)
    resized = resize(grey, 16)
    assert resized.shape == (3, 3, 16, 16) and resized.dtype == np.uint8
    assert (resized == resized[:, :1]).all()
    assert (resized == resize(grey.copy(), 16)).all()
    colour = np.stack([grey, grey[::-1], 255 - grey], axis=-1)
    assert (resize(colour, 16)[:, 0] == resized[:, 0]).all()
    assert (resize(colour, 16)[:, 1] == resized[::-1, 0]).all()


def test_resize_to_the_same_size_changes_nothing() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (2, 12, 12), dtype=np.uint8)
    assert (resize(grey, 12)[:, 0] == grey).all()


def test_near_duplicates_counts_pairs_across_splits_only() -> None:
    levels = np.arange(0, 240, 8, dtype=np.uint8)
    images = np.repeat(levels, 3 * 48 * 48).reshape(30, 3, 48, 48)
    splits = ["train"] * 10 + ["validation"] * 10 + ["test"] * 10
    assert near_duplicates(images, splits) == 0  # neighbours are 8 levels apart
    images[25] = images[2] + 3
    assert near_duplicates(images, splits) == 1
    images[15] = images[2]
    assert near_duplicates(images, splits) == 3
    images[3] = images[2]  # of the same split as 2: counts with 15 and 25, not with 2
    assert near_duplicates(images, splits) == 5
    images[25, :, ::2], images[25, :, 1::2] = 0, 38  # the same mean, so the same thumbnail
    assert near_duplicates(images, splits) == 5


def write_csv(path: Path, rows: str) -> dict[str, Path]:
    path.write_bytes(gzip.compress(rows.encode()))
    return {path.name: path}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1,2,3\n", "has 3 columns; expected 784"),
        ("a,b\n", "no gzipped CSV of integers"),
        (",".join(["256"] * 784) + ",0\n", "pixels from 256 to 256; expected 0 to 255"),
    ],
)
def test_mnist_refuses_another_file(rows: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=message):
        mnist.load(write_csv(tmp_path / "x.csv.gz", rows))


def test_mnist_inverts_pixels(tmp_path: Path) -> None:
    files = write_csv(tmp_path / "x.csv.gz", ",".join(["255"] + ["0"] * 783) + ",0\n")
    assert mnist.load(files).images[0, 0, :2].tolist() == [255, 0]
    assert mnist.load(files, invert=True).images[0, 0, :2].tolist() == [0, 255]


def test_adapters_of_one_file_refuse_several(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="names 2 files"):
        faces.load({"a": tmp_path / "a", "b": tmp_path / "b"})


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 25, 25)), "holds .3, 25, 25.; expected"),
        (np.full((200, 25, 25), np.nan), "outside"),
        (np.array([{}], dtype=object), "no numeric .npy file"),
    ],
)
def test_faces_refuses_another_file(array: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(InvalidData, match=message):
        faces.load({"x.npy": path})


def test_texture_crops_of_different_splits_share_no_pixel(tmp_path: Path) -> None:
    columns = np.arange(200, dtype=np.uint8)  # the grey level is the column
    for name in ("a.png", "b.png"):
        Image.fromarray(np.tile(columns, (40, 1))).save(tmp_path / name)
    files = {name: tmp_path / name for name in ("b.png", "a.png")}
    found: dict[str, set[int]] = defaultdict(set)
    original = textures._normalise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textures, "_normalise", lambda piece: piece)
        items = textures.load(files, crop=24, crops=50)
    for image, split in zip(items.images, items.splits or [], strict=True):
        found[split] |= set(image.ravel().tolist())
    assert disjoint(found) and set(found) == set(SPLITS)
    normalised = original(items.images[0]).astype(float)
    assert abs(normalised.mean() - 128) < 1 and abs(normalised.std() - 48) < 1
    with pytest.raises(InvalidData, match="validation has 30 x 40"):
        textures.load(files, crop=31)


def test_letters_refuses_unknown_fonts(tmp_path: Path) -> None:
    path = tmp_path / "Other.ttf"
    path.write_bytes(b"no font")
    with pytest.raises(InvalidData, match="is no font"):
        letters.load({"Other.ttf": path})
    with pytest.raises(InvalidData, match="Other has no split"):
        letters._split("Other")


def test_letters_of_one_font_differ_and_do_not_touch_the_edge() -> None:
    if not TASKS:
        pytest.skip("there is no params.yaml")
    data = task_or_skip("letters").data
    items = letters.load(package_data.locate(data.source), variants=3)
    assert len(set(digests(items.images))) == len(items.labels)
    ink = (items.images < 128).sum(axis=(1, 2))
    assert ink.min() > 40
    edges = np.concatenate([items.images[:, [0, -1]].ravel(), items.images[:, :, [0, -1]].ravel()])
    assert (edges == 255).mean() > 0.999


def write_npz(path: Path, **changes: Any) -> dict[str, Path]:
    arrays: dict[str, Any] = {}
    for k, short in enumerate(["train", "val", "test"]):
        arrays[f"x_{short}"] = np.full((4, 5, 5), k, dtype=np.uint8)
        arrays[f"y_{short}"] = np.array([0, 1, 0, 1])
    arrays.update(changes)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return {path.name: path}


def test_npz_keeps_the_splits_of_the_file(tmp_path: Path) -> None:
    items = npz.load(write_npz(tmp_path / "x.npz"))
    assert items.splits == ["train"] * 4 + ["validation"] * 4 + ["test"] * 4
    assert items.images[:, 0, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(set(items.groups)) == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_val": None}, "no array 'y_val'"),
        ({"x_test": np.zeros((4, 6, 6), dtype=np.uint8)}, "several sizes"),
        ({"x_test": np.zeros((4, 5, 5))}, "x_test is float64"),
        ({"y_test": np.zeros(4)}, "y_test is float64"),
        ({"y_test": np.array([None] * 4)}, "cannot be read: Object arrays"),
    ],
)
def test_npz_refuses_malformed_arrays(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidData, match=message):
        npz.load(write_npz(tmp_path / "x.npz", **changes))


def test_training_on_fewer_items_moves_no_validation_and_no_test_item() -> None:
    data = task_or_skip("digits").data
    items = digits.load(package_data.locate(data.source))
    many = assign(items, {"train": 900, "validation": 300, "test": 597}, seed=0)
    few = assign(items, {"train": 500, "validation": 300, "test": 597}, seed=0)
    for split in ("validation", "test"):
        assert [i for i, s in enumerate(many) if s == split] == [
            i for i, s in enumerate(few) if s == split
        ]
