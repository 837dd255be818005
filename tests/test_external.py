"""External sets: where they lie, that their bytes are those meant, and how each format is read."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from tasks.artifacts import Artifacts
from tasks.prepare import prepare
from taskvec import checkpoints, tables
from taskvec.datasets import (
    categories,
    decoding,
    external,
    huggingface,
    image_folder,
    manifest,
    npz,
    sources,
    torchvision_set,
)
from taskvec.datasets.items import Items
from taskvec.datasets.splitting import assign, stratify
from taskvec.errors import InvalidData, MissingArtifact
from taskvec.sections import Data, Source, Task
from tests import tiny_sets
from tests.tiny_sets import Pictures

SHARED = Path(__file__).parents[2] / "shared" / "data"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def declared(root: Path, *names: str) -> Source:
    """Return a source with the digests that the files have."""
    return Source(external="some_set", files={name: sha256(root / name) for name in names})


def below(root: Path, directory: str) -> dict[str, Path]:
    """Return the verified files of a directory of the data root, by way of a manifest."""
    manifest.write(root / directory)
    return external.locate(declared(root, f"{directory}/{manifest.NAME}"), root)


def shared_source(*names: str) -> Source:
    if not SHARED.is_dir():
        pytest.skip(f"the shared sets are not at {SHARED}")
    return declared(SHARED, *names)


def task(source: Source, **data: Any) -> Task:
    values = {"dataset": "npz", "train": 4, "validation": 2, "test": 2, **data, "source": source}
    head = {"kind": "text", "classes": ["a", "b"], "templates": ["{}"]}
    return Task.model_validate({"data": values, "head": head, "fine_tune": {}})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a data root with one small file."""
    (tmp_path / "root" / "set").mkdir(parents=True)
    (tmp_path / "root" / "set" / "a.bin").write_bytes(b"contents")
    return tmp_path / "root"


# Where files lie


def test_a_file_is_found_below_the_data_root_that_the_environment_names(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = declared(root, "set/a.bin")
    monkeypatch.setenv("TASKVEC_DATA", str(root))
    assert sources.locate(source)["set/a.bin"].read_bytes() == b"contents"
    assert external.missing({"a": task(source)}) == []


def test_without_a_data_root_nothing_is_found_and_the_message_says_what_to_set(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = declared(root, "set/a.bin")
    monkeypatch.delenv("TASKVEC_DATA", raising=False)
    with pytest.raises(
        MissingArtifact, match="some_set: set TASKVEC_DATA or --data-root"
    ) as caught:
        external.locate(source)
    assert caught.value.exit_code == 5
    (line,) = external.missing({"first": task(source)})
    assert line.startswith("first: set/a.bin: set TASKVEC_DATA or --data-root")


def test_a_missing_file_and_another_digest_are_refused(root: Path) -> None:
    source = declared(root, "set/a.bin")
    (root / "set" / "a.bin").write_bytes(b"others")
    with pytest.raises(InvalidData, match="set/a.bin has the wrong digest: found .*, expected"):
        external.locate(source, root)
    (root / "set" / "a.bin").unlink()
    with pytest.raises(MissingArtifact, match=f"set/a.bin is missing below {root}"):
        external.locate(source, root)
    (line,) = external.missing({"first": task(source)}, root)
    assert line.startswith(f"first: set/a.bin is missing below {root}; put it there")


def test_links_and_names_that_leave_the_data_root_are_refused(root: Path) -> None:
    outside = root.parent / "outside.bin"
    outside.write_bytes(b"contents")
    (root / "set" / "link.bin").symlink_to(outside)
    (root / "set" / "inner.bin").symlink_to(root / "set" / "a.bin")
    source = declared(root, "set/link.bin")
    with pytest.raises(InvalidData, match="set/link.bin leads out of the data root"):
        external.locate(source, root)
    (line,) = external.missing({"first": task(source)}, root)
    assert "leads out of the data root" in line
    assert external.locate(declared(root, "set/inner.bin"), root)
    for name in ("../outside.bin", "set/../../outside.bin", str(outside)):
        escaping = Source.model_construct(external="x", files={name: sha256(outside)})
        with pytest.raises(InvalidData, match="leads out of the data root"):
            external.locate(escaping, root)


def test_a_digest_of_zeros_asks_for_the_digest(root: Path) -> None:
    unknown = {"set/a.bin": external.UNKNOWN, f"set/{manifest.NAME}": external.UNKNOWN}
    source = Source(external="some_set", files=unknown)
    whole, plain = external.missing({"first": task(source)}, root)
    assert f"run `sha256sum {root}/set/a.bin`" in plain
    assert f"run `python -m taskvec.datasets.manifest {root}/set`" in whole
    with pytest.raises(MissingArtifact, match="the digest of set/MANIFEST.sha256 is not known"):
        external.locate(source, root)


def test_tasks_whose_data_a_package_ships_miss_nothing() -> None:
    source = Source(package="numpy", version="0", files={"x": "0" * 64})
    assert external.missing({"a": task(source)}, Path("/nowhere")) == []


def test_what_is_recorded_of_a_source_is_its_name_and_a_digest(root: Path) -> None:
    one = declared(root, "set/a.bin")
    recorded = {"source": "some_set", "source_sha256": sha256(root / "set" / "a.bin")}
    assert sources.recorded(one) == recorded
    (root / "set" / "b.bin").write_bytes(b"more")
    both = sources.recorded(declared(root, "set/a.bin", "set/b.bin"))
    manifest.write(root)
    assert both["source_sha256"] == sha256(root / manifest.NAME)
    package = Source(package="numpy", version="2.0", files=one.files)
    assert sources.recorded(package)["source"] == "numpy 2.0"


# Manifests


def test_a_manifest_stands_for_all_files_of_its_directory(root: Path) -> None:
    (root / "set" / "deep folder").mkdir()
    (root / "set" / "deep folder" / "b c.bin").write_bytes(b"more")
    (root / "set" / ".hidden").write_bytes(b"")
    files = below(root, "set")
    assert set(files) == {"set/a.bin", "set/deep folder/b c.bin"}
    source = declared(root, f"set/{manifest.NAME}")
    assert external.missing({"first": task(source)}, root) == []
    (root / "set" / "deep folder" / "b c.bin").write_bytes(b"other")
    with pytest.raises(InvalidData, match="set/deep folder/b c.bin has the wrong digest"):
        external.locate(source, root)
    (root / "set" / "deep folder" / "b c.bin").unlink()
    (line,) = external.missing({"first": task(source)}, root)
    assert line.startswith("first: 1 files that set/MANIFEST.sha256 lists are missing")
    manifest.write(root / "set")
    (line,) = external.missing({"first": task(source)}, root)
    assert "set/MANIFEST.sha256 has the wrong digest" in line


def test_the_command_writes_what_sha256sum_checks_and_prints_its_digest(root: Path) -> None:
    command = [sys.executable, "-m", "taskvec.datasets.manifest", str(root / "set")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    path = root / "set" / manifest.NAME
    assert done.stdout == f"{sha256(path)}  {path}\n"
    check = ["sha256sum", "-c", "--strict", manifest.NAME]
    assert subprocess.run(check, cwd=root / "set", capture_output=True).returncode == 0


def test_a_sample_of_a_folder_does_not_depend_on_the_other_files(root: Path) -> None:
    for folder in ("x", "y"):
        (root / folder).mkdir()
        for number in range(9):
            (root / folder / f"{number}.bin").write_bytes(bytes([number]))
    manifest.write(root, most=4)
    sample = set(manifest.read(root / manifest.NAME))
    assert Counter(name.partition("/")[0] for name in sample) == {"x": 4, "y": 4, "set": 1}
    (root / "x" / "further.bin").write_bytes(b"")
    manifest.write(root, most=4)
    again = set(manifest.read(root / manifest.NAME))
    assert len(sample - again) <= 1 and again - sample <= {"x/further.bin"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no file"),
        ("nonsense\n", ":1: expected a SHA-256"),
        (f"{'0' * 64} a.bin\n", ":1: expected a SHA-256"),
        (f"{'0' * 64}  a.bin\n{'0' * 64}  ../b.bin\n", ":2: expected a SHA-256"),
        (f"{'0' * 64}  /etc/hostname\n", ":1: expected a SHA-256"),
        (f"{'0' * 64}  a.bin\n{'1' * 64}  a.bin\n", ":2: a.bin stands twice"),
    ],
)
def test_a_manifest_that_is_none_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / manifest.NAME).write_text(text)
    with pytest.raises(InvalidData, match=message):
        manifest.read(tmp_path / manifest.NAME)


def test_a_directory_without_files_has_no_manifest(tmp_path: Path) -> None:
    assert manifest.main([str(tmp_path)]) == 3
    assert manifest.main([str(tmp_path / "absent")]) == 5


# Pictures


@given(width=st.integers(1, 60), height=st.integers(1, 60), side=st.integers(1, 32))
def test_pictures_are_cut_as_clip_cuts_them(width: int, height: int, side: int) -> None:
    import taskvec.torchvision_import  # noqa: F401  before torchvision

    from torchvision.transforms import CenterCrop, InterpolationMode, Resize  # isort: skip

    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    expected = CenterCrop(side)(Resize(side, InterpolationMode.BICUBIC)(picture))
    assert (np.asarray(decoding.square(picture, side)) == np.asarray(expected)).all()


def test_a_broken_picture_is_named(root: Path) -> None:
    (root / "set" / "train" / "a").mkdir(parents=True)
    (root / "set" / "train" / "a" / "x.png").write_bytes(b"no picture")
    pictures = Pictures()
    pictures.write(root / "set" / "test" / "a" / "y.png")
    with pytest.raises(InvalidData, match=r"set/train/a/x.png is no picture"):
        image_folder.load(below(root, "set"), side=8)


# Folders of pictures


def test_folders_give_splits_and_classes(root: Path) -> None:
    tiny_sets.image_folder(root / "set", Pictures(), 3, 4, folders=("train", "val", "test"))
    (root / "set" / "test" / "labels.txt").write_text("ignored")
    items = image_folder.load(below(root, "set"), side=16)
    assert items.images.shape == (36, 16, 16, 3)
    assert items.splits is not None
    counts = Counter(zip(items.splits, items.labels.tolist(), strict=True))
    splits = ("train", "validation", "test")
    assert counts == {(split, label): 4 for split in splits for label in range(3)}
    first = Image.open(root / items.groups[0]).convert("RGB")
    assert (np.asarray(decoding.square(first, 16)) == items.images[0]).all()


def test_the_order_of_the_classes_can_be_given(root: Path) -> None:
    tiny_sets.image_folder(root / "set", Pictures(), 2, 2)
    files = below(root, "set")
    swapped = image_folder.load(files, side=8, classes=["n01443537", "n01440764"])
    assert (swapped.labels == 1 - image_folder.load(files, side=8).labels).all()
    with pytest.raises(InvalidData, match="unknown class 'n01443537'"):
        image_folder.load(files, side=8, classes=["n01440764"])


def test_a_split_may_have_another_folder_and_validation_none(root: Path) -> None:
    tiny_sets.image_folder(root / "set", Pictures(), 2, 3, folders=("train", "val"))
    files = below(root, "set")
    items = image_folder.load(files, side=8, test="val", validation="")
    assert Counter(items.splits) == {"train": 6, "test": 6}
    with pytest.raises(InvalidData, match="no picture test/CLASS/FILE; folders: train, val"):
        image_folder.load(files, side=8)


# Tables of the Hugging Face hub


def test_parquet_files_are_read(root: Path) -> None:
    tiny_sets.parquet_files(root / "hub", Pictures(), 3, 4)
    items = huggingface.load(below(root, "hub"), side=16)
    assert items.images.shape == (24, 16, 16, 3)
    assert Counter(items.splits) == {"train": 12, "test": 12}
    assert items.labels.tolist() == 2 * [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert len(set(items.groups)) == 24


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_files_and_several_shards_are_read(root: Path, stream: bool) -> None:
    pictures = Pictures()
    table = tiny_sets.hub_table(pictures, 2, 2)
    for split, shards in (("train", 2), ("validation", 1), ("test", 1)):
        for shard in range(shards):
            path = root / "hub" / split / f"data-{shard:05d}-of-{shards:05d}.arrow"
            tiny_sets.write_arrow(path, table, stream=stream)
    files = below(root, "hub")
    items = huggingface.load(files, side=8)
    assert Counter(items.splits) == {"train": 8, "validation": 4, "test": 4}
    assert len(set(items.groups)) == 16
    assert "validation" not in (huggingface.load(files, side=8, validation="").splits or ())


def test_a_picture_may_be_bytes_or_a_path_beside_the_table(root: Path) -> None:
    pictures = Pictures()
    pictures.write(root / "hub" / "pictures" / "a.png")
    labels = pa.array([0, 1], pa.int32())
    plain = pa.table({"img": [pictures.encoded(), pictures.encoded()], "fine_label": labels})
    cells = [{"bytes": None, "path": "pictures/a.png"}, {"bytes": pictures.encoded(), "path": None}]
    parquet.write_table(plain, root / "hub" / "train.parquet")
    parquet.write_table(
        pa.table({"img": cells, "fine_label": labels}), root / "hub" / "test.parquet"
    )
    files = below(root, "hub")
    items = huggingface.load(files, side=8, image="img", label="fine_label")
    direct = decoding.square(decoding.read(root / "hub" / "pictures" / "a.png", "a"), 8)
    place = (items.splits or []).index("test")
    assert (items.images[place] == np.asarray(direct)).all()
    with pytest.raises(InvalidData, match="no column 'image'; its columns: img, fine_label"):
        huggingface.load(files)
    del files["hub/pictures/a.png"]
    with pytest.raises(InvalidData, match="a path beside the table that source.files lists"):
        huggingface.load(files, side=8, image="img", label="fine_label")


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, -1], "a label is -1"), (["a", "b"], "labels are"), ([0, None], "labels are int64")],
)
def test_labels_that_are_none_are_refused(labels: list[Any], message: str, root: Path) -> None:
    table = pa.table({"image": [b"", b""], "label": labels})
    for split in ("train", "test"):
        parquet.write_table(table, root / "set" / f"{split}.parquet")
    with pytest.raises(InvalidData, match=message):
        huggingface.load(below(root, "set"))


def test_a_table_that_is_none_and_a_missing_split_are_refused(root: Path) -> None:
    (root / "set" / "train.parquet").write_bytes(b"no table")
    with pytest.raises(InvalidData, match="set/train.parquet is no parquet file"):
        huggingface.load(below(root, "set"))
    (root / "set" / "train.parquet").unlink()
    (root / "set" / "train.arrow").write_bytes(b"no table")
    with pytest.raises(InvalidData, match="set/train.arrow is no arrow file"):
        huggingface.load(below(root, "set"))
    tiny_sets.parquet_files(root / "hub", Pictures(), 2, 2)
    files = below(root, "hub")
    with pytest.raises(InvalidData, match="of the split 'eval'"):
        huggingface.load(files, side=8, test="eval")


# torchvision's own readers


@pytest.mark.parametrize(
    ("write", "name", "counts"),
    [
        (tiny_sets.mnist, "mnist", {"train": 12, "test": 12}),
        (tiny_sets.svhn, "svhn", {"train": 12, "test": 12}),
        (tiny_sets.gtsrb, "gtsrb", {"train": 12, "test": 12}),
        (tiny_sets.dtd, "dtd", {"train": 12, "test": 12}),
        (tiny_sets.stanford_cars, "stanford_cars", {"train": 12, "test": 12}),
        (tiny_sets.sun397, "sun397", {"train": 12, "test": 12}),
        (tiny_sets.eurosat, "eurosat", {None: 24}),
    ],
)
def test_torchvision_reads_its_sets(
    write: Callable[..., None], name: Any, counts: dict[str | None, int], root: Path
) -> None:
    (root / "torchvision").mkdir()
    write(root / "torchvision", Pictures(), 3, 4)
    items = torchvision_set.load(below(root, "torchvision"), name=name, side=16)
    assert items.images.shape == (24, 16, 16, 3) and items.images.dtype == np.uint8
    assert Counter(items.splits or [None] * 24) == counts
    assert Counter(items.labels.tolist()) == {0: 8, 1: 8, 2: 8}
    assert not any(str(root) in group or "/tmp" in group for group in items.groups)
    sizes = {"train": 6, "validation": 3, "test": 6}
    assert Counter(split for split in assign(items, sizes, 0) if split) == sizes


def test_torchvision_gives_the_pictures_and_labels_of_the_files(root: Path) -> None:
    (root / "torchvision").mkdir()
    tiny_sets.svhn(root / "torchvision", Pictures(), 3, 2)
    items = torchvision_set.load(below(root, "torchvision"), name="svhn", side=32)
    from scipy.io import loadmat

    raw = loadmat(root / "torchvision" / "train_32x32.mat")
    assert (items.images[:6] == raw["X"].transpose(3, 0, 1, 2)).all()
    assert items.labels[:6].tolist() == [0, 1, 2, 0, 1, 2] and raw["y"][0, 0] == 10


def test_frames_of_one_traffic_sign_stay_together(root: Path) -> None:
    (root / "torchvision").mkdir()
    tiny_sets.gtsrb(root / "torchvision", Pictures(), 3, 8)
    items = torchvision_set.load(below(root, "torchvision"), name="gtsrb", side=8)
    splits = assign(items, {"train": 16, "validation": 6, "test": 24}, 0)
    homes: dict[str, set[str | None]] = {}
    for group, split in zip(items.groups, splits, strict=True):
        homes.setdefault(group, set()).add(split)
    assert all(len(found - {None}) <= 1 for found in homes.values())
    assert len(homes) == 12 + 24


def test_sun397_without_its_partition_is_drawn(root: Path) -> None:
    (root / "torchvision").mkdir()
    tiny_sets.sun397(root / "torchvision", Pictures(), 2, 2, partition=False)
    items = torchvision_set.load(below(root, "torchvision"), name="sun397", side=8)
    assert items.splits is None and len(items.labels) == 16
    assert items.groups[0] == "/a/abbey/sun_0000.jpg"


def test_torchvision_sees_only_what_is_declared(root: Path) -> None:
    (root / "torchvision").mkdir()
    tiny_sets.eurosat(root / "torchvision", Pictures(), 2, 2)
    files = below(root, "torchvision")
    dropped = "torchvision/eurosat/2750/Forest/Forest_1.jpg"
    del files[dropped]
    assert len(torchvision_set.load(files, name="eurosat", side=8).labels) == 7


def test_a_set_that_is_not_there_is_refused_with_its_layout(root: Path) -> None:
    tiny_sets.mnist(root / "torchvision", Pictures(), 2, 2)
    files = below(root, "torchvision")
    with pytest.raises(
        InvalidData, match=r"cannot read svhn: .*list ROOT/\{train,test\}_32x32.mat"
    ):
        torchvision_set.load(files, name="svhn")
    with pytest.raises(InvalidData, match="expected one folder"):
        torchvision_set.load({**files, "other/x": root / "set" / "a.bin"}, name="mnist")


def test_a_listed_picture_that_is_not_there_is_refused(root: Path) -> None:
    (root / "torchvision").mkdir()
    tiny_sets.gtsrb(root / "torchvision", Pictures(), 2, 2)
    files = below(root, "torchvision")
    del files["torchvision/gtsrb/GTSRB/Final_Test/Images/00003.ppm"]
    with pytest.raises(InvalidData, match="cannot read item 3 of gtsrb: .*00003.ppm"):
        torchvision_set.load(files, name="gtsrb", side=8)
    tiny_sets.stanford_cars(root / "torchvision", Pictures(), 2, 2)
    files = below(root, "torchvision")
    del files["torchvision/stanford_cars/cars_test/00002.jpg"]
    with pytest.raises(InvalidData, match="stanford_cars/cars_test/00002.jpg is no picture"):
        torchvision_set.load(files, name="stanford_cars", side=8)


# Several .npz files


def write_npz(path: Path, images: np.ndarray[Any, Any], labels: list[int]) -> None:
    arrays = {f"x_{split}": images + k for k, split in enumerate(("train", "val", "test"))}
    arrays |= {f"y_{split}": np.array(labels) for split in ("train", "val", "test")}
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **arrays)  # type: ignore[arg-type]


@pytest.fixture
def styles(root: Path) -> dict[str, Path]:
    """Return a grey and a coloured file of three classes, with the names of the classes."""
    pictures = Pictures()
    write_npz(root / "set" / "grey.npz", pictures.array(6, 5, 5) // 2, [0, 1, 2, 0, 1, 2])
    write_npz(root / "set" / "colour.npz", pictures.array(6, 5, 5, 3) // 2, [2, 1, 0, 2, 1, 0])
    names = ["set/grey.npz", "set/colour.npz"]
    for style in ("grey", "colour"):
        classes = json.dumps({"classes": ["dog", "horse", "house"]})
        (root / "set" / f"{style}.json").write_text(classes)
        names.append(f"set/{style}.json")
    return external.locate(declared(root, *names), root)


def only(files: dict[str, Path], suffix: str) -> dict[str, Path]:
    return {name: path for name, path in files.items() if name.endswith(suffix)}


def test_grey_and_coloured_files_are_pooled(styles: dict[str, Path]) -> None:
    items = npz.load(only(styles, ".npz"))
    assert items.images.shape == (36, 5, 5, 3)
    assert Counter(items.splits) == {"train": 12, "validation": 12, "test": 12}
    assert len(set(items.groups)) == 36
    grey = np.array(["grey" in group for group in items.groups])
    assert (items.images[grey] == items.images[grey][..., :1]).all()
    assert not (items.images[~grey] == items.images[~grey][..., :1]).all()
    assert Counter(items.labels.tolist()) == {0: 12, 1: 12, 2: 12}


@given(classes=st.permutations([0, 1, 2]), count=st.integers(1, 3))
def test_chosen_classes_are_numbered_in_the_order_given(classes: list[int], count: int) -> None:
    labels = np.array([0, 1, 2, 0, 1, 2])
    groups = np.array([f"g{i}" for i in range(6)])
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1)
    chosen = classes[:count]
    kept = npz.Piece(images, labels, groups, "train").labelled(chosen, range(count))
    assert [chosen[label] for label in kept.labels] == labels[kept.images.ravel()].tolist()
    assert sorted(kept.images.ravel()) == [i for i in range(6) if labels[i] in chosen]
    assert kept.groups.tolist() == [f"g{i}" for i in kept.images.ravel()]


@pytest.mark.parametrize("classes", [[], [0, 0], [0, 7]])
def test_classes_that_do_not_occur_are_refused(classes: list[int], styles: dict[str, Path]) -> None:
    with pytest.raises(InvalidData, match=r"expected some of \[0, 1, 2\]"):
        npz.load(only(styles, ".npz"), classes=classes)


def test_no_file_and_files_of_several_sizes_are_refused(
    styles: dict[str, Path], root: Path
) -> None:
    with pytest.raises(InvalidData, match="names no file"):
        npz.load({})
    write_npz(root / "set" / "large.npz", Pictures().array(6, 6, 6), [0, 1, 2, 0, 1, 2])
    with pytest.raises(InvalidData, match="several sizes: 5 x 5, 6 x 6"):
        npz.load({**only(styles, ".npz"), "large.npz": root / "set" / "large.npz"})


# One category among several

DECLARED = ["grey/dog", "grey/horse", "colour/dog", "colour/horse"]


def test_a_category_is_numbered_among_all_that_are_declared(styles: dict[str, Path]) -> None:
    items = categories.load(styles, category="colour/horse", categories=DECLARED)
    assert items.classes == 4 and set(items.labels.tolist()) == {3}
    assert items.images.shape == (6, 5, 5, 3)
    by_number = categories.load(styles, category="colour/1", categories=[*DECLARED[:3], "colour/1"])
    assert (by_number.images == items.images).all()


def test_several_categories_make_a_control(styles: dict[str, Path]) -> None:
    items = categories.load(styles, category=DECLARED[:3], categories=DECLARED)
    assert Counter(items.labels.tolist()) == {0: 6, 1: 6, 2: 6}
    assert len(set(items.groups)) == 18 and items.images.ndim == 4


@pytest.mark.parametrize(
    ("category", "declared", "message"),
    [
        ("grey/cat", DECLARED, "unknown category 'grey/cat'; did you mean"),
        ("grey/cat", ["grey/cat"], "grey has no class 'cat'"),
        ("gray/dog", ["gray/dog"], "of no file; did you mean 'grey'"),
        ("grey/7", ["grey/7"], "grey/7 has no item"),
        ([], DECLARED, "category is"),
        (["grey/dog", "grey/dog"], DECLARED, "several different ones"),
        (7, DECLARED, "category is 7"),
        ("grey/dog", [*DECLARED, "grey/dog"], "each must stand once"),
    ],
)
def test_a_category_that_is_none_is_refused(
    category: Any, declared: list[str], message: str, styles: dict[str, Path]
) -> None:
    with pytest.raises(InvalidData, match=message):
        categories.load(styles, category=category, categories=declared)


def test_a_named_class_needs_the_names(styles: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="add grey.json to source.files, or write the label"):
        categories.load(only(styles, ".npz"), category="grey/dog", categories=DECLARED)
    (tmp_path / "grey.json").write_text("[]")
    damaged = {**styles, "set/grey.json": tmp_path / "grey.json"}
    with pytest.raises(InvalidData, match='no JSON with "classes"'):
        categories.load(damaged, category="grey/dog", categories=DECLARED)


# Splits


def make_items(labels: list[int], splits: list[str], groups: list[str] | None = None) -> Items:
    images = np.arange(16 * len(labels), dtype=np.uint32).view(np.uint8).reshape(-1, 8, 8)
    names = groups or [f"i{i}" for i in range(len(labels))]
    return Items(images, np.array(labels, dtype=np.int64), names, splits)


@given(
    train=st.lists(st.integers(0, 2), min_size=12, max_size=40),
    test=st.lists(st.integers(0, 2), min_size=3, max_size=12),
    seed=st.integers(0, 9),
)
def test_validation_is_drawn_from_train_where_there_is_none(
    train: list[int], test: list[int], seed: int
) -> None:
    labels = [0, 1, 2, *train, *test]
    given_splits = ["train"] * (3 + len(train)) + ["test"] * len(test)
    items = make_items(labels, given_splits)
    sizes = {"train": len(train) - 1, "validation": 4, "test": len(test)}
    found = assign(items, sizes, seed)
    assert Counter(found) == sizes
    homes = zip(found, given_splits, strict=True)
    assert all((a == "test") == (b == "test") for a, b in homes)
    few = assign(items, {**sizes, "train": 3}, seed)
    drawn = [i for i, split in enumerate(found) if split == "validation"]
    assert [i for i, split in enumerate(few) if split == "validation"] == drawn


def test_too_few_items_for_train_and_validation_are_refused() -> None:
    items = make_items([0, 1] * 5, ["train"] * 8 + ["test"] * 2)
    with pytest.raises(InvalidData, match="8 items are left .* expected 9"):
        assign(items, {"train": 6, "validation": 3, "test": 2}, 0)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.integers(1, 80))
def test_every_beginning_has_the_classes_in_nearly_equal_proportions(
    labels: list[int], length: int
) -> None:
    items = make_items(labels, ["train"] * len(labels))
    order = stratify(items, range(len(labels)))
    assert sorted(order) == list(range(len(labels)))
    start = Counter(labels[i] for i in order[:length])
    taken = min(length, len(labels))
    for label, total in Counter(labels).items():
        assert abs(start[label] - taken * total / len(labels)) < len(set(labels)) / 2 + 1


def test_labels_beyond_the_declared_classes_are_refused() -> None:
    items = make_items([3, 3, 3], ["train", "validation", "test"])
    one = dict.fromkeys(("train", "validation", "test"), 1)
    with pytest.raises(InvalidData, match=r"labels are \[3\]"):
        assign(items, one, 0)
    assert assign(Items(**{**vars(items), "classes": 4}), one, 0) == items.splits
    with pytest.raises(InvalidData, match="declares 3 classes"):
        assign(Items(**{**vars(items), "classes": 3}), one, 0)


# The stage


def run(artifacts: Artifacts, name: str, data: Data, classes: list[str]) -> dict[str, Any]:
    prepare(
        artifacts, task=name, data=data, classes=classes, templates=["{}"], image_size=16, shots=0,
        emit=lambda *_, **__: None,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(artifacts.summary(name).read_text())
    return found


def test_prepare_writes_a_category_and_where_it_comes_from_but_no_path(
    root: Path, styles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASKVEC_DATA", str(root))
    source = declared(root, *styles)
    options = {"category": "colour/horse", "categories": DECLARED}
    values = {"dataset": "categories", "options": options, "train": 2, "validation": 2, "test": 2}
    data = Data.model_validate({**values, "source": source})
    artifacts = Artifacts(tmp_path)
    summary = run(artifacts, "horse", data, DECLARED)
    assert summary["source"] == "some_set" and len(summary["source_sha256"]) == 64
    table = tables.read(artifacts.items("horse"), tables.Items)
    assert set(table["label"]) == {3} and set(table["classes"]) == {4}
    with pytest.raises(InvalidData, match="breaks the schema Items"):
        tables.check(table.assign(classes=3), tables.Items, "items.csv")
    with pytest.raises(InvalidData, match="horse has 4 classes"):
        run(artifacts, "horse", data, DECLARED[:3])
    for path in tmp_path.rglob("*"):
        if path.is_file() and root not in path.parents:
            assert str(root).encode() not in path.read_bytes()


def test_the_first_validation_items_are_stratified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["mnist/mnist.npz"]
    source = shared_source(*names)
    monkeypatch.setenv("TASKVEC_DATA", str(SHARED))
    values = {"dataset": "npz", "train": 100, "validation": 300, "test": 100}
    data = Data.model_validate({**values, "source": source})
    artifacts = Artifacts(tmp_path)
    run(artifacts, "mnist", data, list("0123456789"))
    weights = checkpoints.load(artifacts.images("mnist", "validation"), "images")
    labels = weights.tensors["labels"].tolist()
    for length in (10, 50, 100):
        counts = Counter(labels[:length])
        assert max(counts.values()) - min(counts[label] for label in range(10)) <= 1
    table = tables.read(artifacts.items("mnist"), tables.Items)
    assert table["label"][table["split"] == "validation"].tolist() == labels


def test_half_of_the_classes_of_three_pooled_domains() -> None:
    names = [f"pacs/pacs_{style}.npz" for style in ("photo", "cartoon", "sketch")]
    items = npz.load(external.locate(shared_source(*names), SHARED), classes=[4, 5, 6])
    assert items.images.shape[1:] == (64, 64, 3) and set(items.labels.tolist()) == {0, 1, 2}
    assert {group.partition("-")[0] for group in items.groups} == {
        "pacs_photo", "pacs_cartoon", "pacs_sketch",
    }  # fmt: skip
    sizes = {"train": 600, "validation": 60, "test": 120}
    assert Counter(s for s in assign(items, sizes, 0) if s) == sizes
