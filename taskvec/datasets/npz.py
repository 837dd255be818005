"""Labelled pictures in .npz files whose splits are given.

The arrays are ``x_train``, ``y_train`` and likewise for ``val`` and ``test``: pictures (N, H, W) or
(N, H, W, 3) of one size, uint8, and labels (N,), integers.
"""

import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from taskvec.datasets.items import Items
from taskvec.errors import InvalidData

NAMES = {"train": "train", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Piece:
    """Some items of one split of one file.

    Attributes:
        images: (n, H, W) or (n, H, W, 3) uint8.
        labels: (n,) int64.
        groups: (n,) names, equal for no two items.
        split: train, validation or test.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    groups: NDArray[np.str_]
    split: str

    def labelled(self, chosen: Sequence[int], names: Sequence[int]) -> "Piece":
        """Return the items with the chosen labels, each label under its new name."""
        renamed = np.full(len(self.labels), -1, dtype=np.int64)
        for label, name in zip(chosen, names, strict=True):
            renamed[self.labels == label] = name
        kept = renamed >= 0
        return Piece(self.images[kept], renamed[kept], self.groups[kept], self.split)


def load(files: Mapping[str, Path], *, classes: list[int] | None = None) -> Items:
    """Return the items of all three splits; each is a group of its own.

    Several files are pooled: labels mean the same in all of them, and grey is repeated in three
    channels where others have colour.

    Args:
        files: one or several ``.npz``; pickled objects in them are refused.
        classes: the labels that are kept, numbered from 0 in this order; default: all.

    Raises:
        InvalidData: an array is missing, or has another type or shape; a class does not occur.
    """
    if not files:
        raise InvalidData("source.files names no file; this adapter reads at least one .npz")
    found = [
        piece
        for name in sorted(files)
        for piece in pieces(files[name], f"{PurePosixPath(name).stem}-" if len(files) > 1 else "")
    ]
    if classes is None:
        return pooled(found)
    known = {int(label) for piece in found for label in np.unique(piece.labels)}
    if not classes or len(set(classes)) != len(classes) or not known.issuperset(classes):
        raise InvalidData(
            f"classes are {classes}; expected some of {sorted(known)}, each once; "
            "correct data.options"
        )
    return pooled([piece.labelled(classes, range(len(classes))) for piece in found])


def pieces(path: Path, prefix: str = "") -> Iterator[Piece]:
    """Yield the three splits of a file.

    Args:
        path: the ``.npz``.
        prefix: of the names of its items.

    Raises:
        InvalidData: an array is missing, or has another type or shape.
    """
    for split, short in NAMES.items():
        x, y = _read(path, f"x_{short}"), _read(path, f"y_{short}")
        _check(path, short, x, y)
        groups = np.array([f"{prefix}{split}-row{row:06d}" for row in range(len(y))], dtype=str)
        yield Piece(x.astype(np.uint8, copy=False), y.astype(np.int64), groups, split)


def pooled(pieces: Sequence[Piece], classes: int | None = None) -> Items:
    """Return several pieces as items of one task.

    Args:
        pieces: at least one.
        classes: see `Items`.

    Raises:
        InvalidData: they have pictures of several sizes.
    """
    images = [piece.images for piece in pieces]
    sizes = sorted({image.shape[1:3] for image in images})
    if len(sizes) != 1:
        found = ", ".join(f"{height} x {width}" for height, width in sizes)
        raise InvalidData(f"the files or splits have pictures of several sizes: {found}")
    if any(image.ndim == 4 for image in images):
        images = [np.repeat(x[..., None], 3, axis=3) if x.ndim == 3 else x for x in images]
    return Items(
        np.concatenate(images),
        np.concatenate([piece.labels for piece in pieces]),
        [str(group) for piece in pieces for group in piece.groups],
        [piece.split for piece in pieces for _ in piece.groups],
        classes,
    )


def _read(path: Path, name: str) -> NDArray[np.generic]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return np.asarray(arrays[name])
    except KeyError:
        raise InvalidData(f"{path.name} has no array {name!r}") from None
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise InvalidData(f"{path.name}: the array {name!r} cannot be read: {error}") from None


def _check(path: Path, short: str, x: NDArray[np.generic], y: NDArray[np.generic]) -> None:
    grey_or_colour = x.ndim == 3 or (x.ndim == 4 and x.shape[3] == 3)
    if x.dtype != np.uint8 or not grey_or_colour:
        raise InvalidData(
            f"{path.name}: x_{short} is {x.dtype} {x.shape}; "
            "expected uint8 (N, H, W) or (N, H, W, 3)"
        )
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise InvalidData(
            f"{path.name}: y_{short} is {y.dtype} {y.shape}; expected integers {x.shape[:1]}"
        )
