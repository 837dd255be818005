"""Small data sets in the very formats in which the published ones lie on a disk."""

import csv
import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from pyarrow import ipc, parquet

SPLITS = ("train", "test")


class Pictures:
    """Different noise in different sizes, the same in every run."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def array(self, *shape: int) -> NDArray[np.uint8]:
        """Return noise of a shape."""
        return self._random.integers(0, 256, shape, dtype=np.uint8)

    def write(self, path: Path) -> None:
        """Write a picture of a random size in the format of the suffix."""
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = self._random.integers(20, 41, 2)
        Image.fromarray(self.array(int(height), int(width), 3)).save(path)

    def encoded(self) -> bytes:
        """Return the bytes of a JPEG."""
        stream = BytesIO()
        Image.fromarray(self.array(24, 30, 3)).save(stream, "JPEG")
        return stream.getvalue()


def mnist(root: Path, pictures: Pictures, classes: int, each: int) -> None:
    """Write the four idx files below MNIST/raw."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for short in ("train", "t10k"):
        labels = np.tile(np.arange(classes, dtype=np.uint8), each)
        images = pictures.array(len(labels), 28, 28)
        header = struct.pack(">IIII", 0x803, *images.shape)
        (raw / f"{short}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">II", 0x801, len(labels))
        (raw / f"{short}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


def svhn(root: Path, pictures: Pictures, classes: int, each: int) -> None:
    """Write the two files of MATLAB; the label 10 means the digit 0."""
    from scipy.io import savemat  # type: ignore[import-untyped]

    for split in SPLITS:
        labels = np.tile(np.arange(classes), each)
        images = pictures.array(32, 32, 3, len(labels))
        labels = np.where(labels == 0, 10, labels).astype(np.uint8)
        savemat(root / f"{split}_32x32.mat", {"X": images, "y": labels[:, None]})


def gtsrb(root: Path, pictures: Pictures, classes: int, each: int) -> None:
    """Write tracks of two frames for training, and test pictures with their table."""
    base = root / "gtsrb"
    rows = []
    for label in range(classes):
        for frame in range(each):
            name = f"{frame // 2:05d}_{frame % 2:05d}.ppm"
            pictures.write(base / "GTSRB" / "Training" / f"{label:05d}" / name)
            test = f"{label * each + frame:05d}.ppm"
            pictures.write(base / "GTSRB" / "Final_Test" / "Images" / test)
            rows.append([test, 30, 30, 5, 5, 25, 25, label])
    with (base / "GT-final_test.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        corners = ["Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2"]
        writer.writerow(["Filename", "Width", "Height", *corners, "ClassId"])
        writer.writerows(rows)


def dtd(root: Path, pictures: Pictures, classes: int, each: int) -> None:
    """Write the pictures and the lists of partition 1; train and val have half each."""
    base = root / "dtd" / "dtd"
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for label in ("banded", "blotchy", "braided")[:classes]:
        for number in range(2 * each):
            name = f"{label}/{label}_{number:04d}.jpg"
            pictures.write(base / "images" / name)
            part = "test" if number >= each else ("train", "val")[number % 2]
            lists[part].append(name)
    (base / "labels").mkdir()
    for part, names in lists.items():
        (base / "labels" / f"{part}1.txt").write_text("".join(f"{name}\n" for name in names))


def stanford_cars(root: Path, pictures: Pictures, classes: int, each: int) -> None:
    """Write the pictures and the tables of MATLAB, whose labels start from 1."""
    from scipy.io import savemat

    base = root / "stanford_cars"
    tables = {
        "train": base / "devkit" / "cars_train_annos.mat",
        "test": base / "cars_test_annos_withlabels.mat",
    }
    (base / "devkit").mkdir(parents=True)
    for split, path in tables.items():
        kinds: Any = [("bbox_x1", "i4"), ("class", "u1"), ("fname", "O")]
        records = np.zeros(classes * each, dtype=kinds)
        for row in range(len(records)):
            records[row] = (1, row % classes + 1, f"{row + 1:05d}.jpg")
            pictures.write(base / f"cars_{split}" / f"{row + 1:05d}.jpg")
        savemat(path, {"annotations": records})
    names = np.array([f"Car {label}" for label in range(classes)], dtype=object)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": names})


def sun397(
    root: Path, pictures: Pictures, classes: int, each: int, *, partition: bool = True
) -> None:
    """Write the folders, ClassName.txt and perhaps the first partition, which uses half of all."""
    base = root / "SUN397"
    names = ("/a/abbey", "/a/apse/indoor", "/b/badlands")[:classes]
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for name in names:
        for number in range(4 * each):
            picture = f"{name}/sun_{number:04d}.jpg"
            pictures.write(base / picture[1:])
            if number < 2 * each:
                lists[SPLITS[number % 2]].append(picture)
    (base / "ClassName.txt").write_text("".join(f"{name}\n" for name in names))
    if partition:
        (base / "Training_01.txt").write_text("\n".join(lists["train"]) + "\n")
        (base / "Testing_01.txt").write_text("\n".join(lists["test"]) + "\n")


def eurosat(root: Path, pictures: Pictures, classes: int, each: int) -> None:
    """Write the folders of the classes, without splits."""
    for label in ("AnnualCrop", "Forest", "River")[:classes]:
        for number in range(2 * each):
            path = root / "eurosat" / "2750" / label / f"{label}_{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pictures.array(64, 64, 3)).save(path)


def image_folder(
    root: Path, pictures: Pictures, classes: int, each: int, *, folders: tuple[str, ...] = SPLITS
) -> None:
    """Write FOLDER/CLASS/*.JPEG."""
    for folder in folders:
        for label in ("n01440764", "n01443537", "n01484850")[:classes]:
            for number in range(each):
                pictures.write(root / folder / label / f"{label}_{number}.JPEG")


def parquet_files(root: Path, pictures: Pictures, classes: int, each: int) -> None:
    """Write data/train-*.parquet and data/test-*.parquet, as the hub has them."""
    (root / "data").mkdir(parents=True)
    for split in SPLITS:
        path = root / "data" / f"{split}-00000-of-00001.parquet"
        parquet.write_table(hub_table(pictures, classes, each), path)


def hub_table(pictures: Pictures, classes: int, each: int) -> pa.Table:
    """Return a table with the columns image (bytes, path) and label."""
    labels = [label for label in range(classes) for _ in range(each)]
    cells = [{"bytes": pictures.encoded(), "path": f"{row}.jpg"} for row in range(len(labels))]
    return pa.table({"image": cells, "label": pa.array(labels, pa.int64())})


def write_arrow(path: Path, table: pa.Table, *, stream: bool) -> None:
    """Write an arrow file, as a stream (as the `datasets` package does) or as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = ipc.new_stream if stream else ipc.new_file
    with path.open("wb") as file, opened(file, table.schema) as writer:
        writer.write_table(table)
