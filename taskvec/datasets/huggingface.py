"""Data sets in the formats of the Hugging Face hub: parquet or arrow files of pictures and labels.

The split is said by the name of a file or of a folder, as in ``data/train-00000-of-00002.parquet``
and ``train/data-00000-of-00001.arrow``.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import ipc, parquet

from taskvec.datasets import decoding
from taskvec.datasets.items import Items, roles
from taskvec.errors import InvalidData
from taskvec.options import Count

FILE_FORMAT = b"ARROW1"  # the first bytes of an arrow file that is no stream


def load(
    files: Mapping[str, Path],
    *,
    side: Count = 224,
    image: str = "image",
    label: str = "label",
    train: str = "train",
    validation: str = "validation",
    test: str = "test",
) -> Items:
    """Return the pictures of all splits; each is a group of its own, named after split and row.

    Args:
        files: ``.parquet`` and ``.arrow`` files, and pictures that they name by a path; others are
            passed over.
        side: pixels along an edge; the middle of each picture, see `decoding.square`.
        image: the column of pictures: bytes, or a struct of bytes and path,
        label: the column of labels, integers, and
        train: the name of the split of the training pictures,
        validation: that of the validation pictures; if there is none, they are drawn from train,
        test: that of the test pictures.

    Raises:
        InvalidData: a split or a column is missing, or a picture cannot be read.
    """
    named = roles(train, validation, test)
    pictures: list[tuple[str, Any]] = []
    labels: list[int] = []
    groups: list[str] = []
    splits: list[str] = []
    for name, split in _tables(files, named):
        table = _read(files[name], name, [image, label])
        own = _labels(table[label], name)
        start = splits.count(split)
        pictures += [(name, cell) for cell in table[image].to_pylist()]
        labels += own
        groups += [f"{split}-row{start + row:06d}" for row in range(len(own))]
        splits += [split] * len(own)
    for wanted in (train, test):
        if named.get(wanted) not in splits:
            raise InvalidData(
                f"no .parquet or .arrow file is of the split {wanted!r}, among "
                f"{', '.join(sorted(files)[:20])}; set the options train, validation and test"
            )

    def picture(place: int) -> Image.Image:
        return _picture(*pictures[place], files)

    stacked = decoding.stack(len(pictures), picture, side)
    return Items(stacked, np.array(labels, dtype=np.int64), groups, splits)


def _tables(files: Mapping[str, Path], named: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the files of tables and their splits, in the order of their names."""
    for name in sorted(files):
        if PurePosixPath(name).suffix in (".parquet", ".arrow"):
            for words in reversed(PurePosixPath(name).with_suffix("").parts):
                found = [word for word in re.split(r"[-.]", words) if word in named]
                if found:
                    yield name, named[found[0]]
                    break


def _read(path: Path, name: str, columns: list[str]) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            table = parquet.ParquetFile(path).read()
        else:
            with path.open("rb") as file:
                is_file = file.read(len(FILE_FORMAT)) == FILE_FORMAT
                file.seek(0)
                table = (ipc.open_file if is_file else ipc.open_stream)(file).read_all()
    except (pa.ArrowException, OSError) as error:
        raise InvalidData(f"{name} is no {path.suffix[1:]} file: {error}") from None
    for column in columns:
        if column not in table.column_names:
            raise InvalidData(
                f"{name} has no column {column!r}; its columns: {', '.join(table.column_names)}; "
                "set the options image and label"
            )
    return table.select(columns)


def _labels(column: pa.ChunkedArray, name: str) -> list[int]:
    if not pa.types.is_integer(column.type) or column.null_count:
        raise InvalidData(f"{name}: the labels are {column.type}; expected integers, none empty")
    labels = [int(value) for value in column.to_pylist()]
    if labels and min(labels) < 0:
        raise InvalidData(
            f"{name}: a label is {min(labels)}, which marks items without one; choose another "
            "split for the option test"
        )
    return labels


def _picture(table: str, cell: Any, files: Mapping[str, Path]) -> Image.Image:
    """Return the picture of one cell of the column of pictures."""
    data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if isinstance(data, bytes):
        return decoding.read(data, f"{table}: {path or 'a picture'}")
    beside = str(PurePosixPath(table).parent / str(path))
    if not path or beside not in files:
        raise InvalidData(
            f"{table} holds {type(cell).__name__} {str(cell)[:80]!r} as a picture; expected bytes, "
            "or a path beside the table that source.files lists"
        )
    return decoding.read(files[beside], beside)
