"""Pictures in folders: ROOT/train/CLASS/*.jpg, ROOT/test/CLASS/*.jpg, and perhaps ROOT/val.

ROOT is the deepest folder that holds all files. Only files that source.files or its manifest lists
are read; a folder of a class may have folders.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from taskvec.datasets import decoding
from taskvec.datasets.items import Items, roles
from taskvec.errors import InvalidData, nearest
from taskvec.options import Count

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def load(
    files: Mapping[str, Path],
    *,
    side: Count = 224,
    classes: list[str] | None = None,
    train: str = "train",
    validation: str = "val",
    test: str = "test",
) -> Items:
    """Return the pictures of all splits; each is a group of its own, named after its file.

    Args:
        files: of a manifest, or one by one; what is no picture by its suffix is passed over.
        side: pixels along an edge; the middle of each picture, see `decoding.square`.
        classes: names of the folders in label order; default: all, sorted.
        train: the folder of the training pictures,
        validation: that of the validation pictures; if it does not exist, they are drawn from
            train, and
        test: that of the test pictures.

    Raises:
        InvalidData: a split is missing, a class is unknown, or a file is no picture.
    """
    named = roles(train, validation, test)
    found = [(name, *_place(parts, named)) for name, parts in _relative(files).items()]
    chosen = [(name, split, label) for name, split, label in found if split]
    known = classes or sorted({label for _, _, label in chosen})
    for split in (train, test):
        if not any(role == named.get(split) for _, role, _ in chosen):
            folders = {parts[0] for parts in _relative(files).values()}
            raise InvalidData(
                f"there is no picture {split}/CLASS/FILE; folders: {', '.join(sorted(folders))}; "
                "set the options train, validation and test"
            )
    for name, _, label in chosen:
        if label not in known:
            raise InvalidData(f"{name}: unknown class {label!r}; {nearest(label, known)}")
    numbers = {label: number for number, label in enumerate(known)}

    def picture(place: int) -> Image.Image:
        name = chosen[place][0]
        return decoding.read(files[name], name)

    return Items(
        decoding.stack(len(chosen), picture, side),
        np.array([numbers[label] for _, _, label in chosen], dtype=np.int64),
        [name for name, _, _ in chosen],
        [split for _, split, _ in chosen],
    )


def _relative(files: Mapping[str, Path]) -> dict[str, tuple[str, ...]]:
    """Return the pictures by name, sorted, with their folders below ROOT."""
    pictures = sorted(name for name in files if PurePosixPath(name).suffix.lower() in SUFFIXES)
    parts = {name: PurePosixPath(name).parts for name in pictures}
    depth = 0
    while len({tuple(found[: depth + 1]) for found in parts.values()}) == 1 and all(
        len(found) > depth + 1 for found in parts.values()
    ):
        depth += 1
    return {name: found[depth:] for name, found in parts.items()}


def _place(parts: tuple[str, ...], named: Mapping[str, str]) -> tuple[str, str]:
    """Return the split and the class of a picture; the split is empty if it is of none."""
    if len(parts) < 3 or parts[0] not in named:
        return "", ""
    return named[parts[0]], parts[1]
