"""Any labelled pictures in one .npz file whose splits are given.

The arrays are ``x_train``, ``y_train`` and likewise for ``val`` and ``test``: pictures (N, H, W) or
(N, H, W, 3) of one size, uint8, and labels (N,), integers dense from 0.
"""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from taskvec.datasets.items import Items, one_file
from taskvec.errors import InvalidData

NAMES = {"train": "train", "validation": "val", "test": "test"}


def load(files: Mapping[str, Path]) -> Items:
    """Return the items of all three splits; each is a group of its own.

    Args:
        files: one ``.npz``; pickled objects in it are refused.

    Raises:
        InvalidData: an array is missing, or has another type or shape.
    """
    path = one_file(files)
    images, labels, groups, splits = [], [], [], []
    for split, short in NAMES.items():
        x, y = _read(path, f"x_{short}"), _read(path, f"y_{short}")
        _check(path, short, x, y)
        images.append(x)
        labels.append(y.astype(np.int64))
        groups += [f"{split}-row{row:06d}" for row in range(len(y))]
        splits += [split] * len(y)
    if len({x.shape[1:] for x in images}) != 1:
        shapes = ", ".join(str(x.shape) for x in images)
        raise InvalidData(f"{path.name}: the splits have pictures of several sizes: {shapes}")
    return Items(np.concatenate(images), np.concatenate(labels), groups, splits)


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
