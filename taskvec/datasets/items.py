"""What a data adapter returns, and the interface of adapters.

An adapter is a module of this package with one function

    def load(files: Mapping[str, Path], *, OPTION: TYPE = DEFAULT, ...) -> Items

``files`` maps the relative names of ``source.files`` in params.yaml to verified paths. The keyword
arguments are the adapter's options, set in params.yaml under ``data.options``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from taskvec.errors import InvalidData

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Items:
    """Labelled pictures as the source has them, before resizing.

    Attributes:
        images: (N, H, W) grey or (N, H, W, 3) colour, uint8.
        labels: (N,) int64, dense from 0.
        groups: (N,) what must stay together: a font, a region, a person; an item's own name
            where the source names no group.
        splits: (N,) of train, validation, test where the source or its geometry decides (regions
            of one picture), else None and groups are drawn. Without any validation item a part of
            train becomes validation.
        classes: of the head, where not all of them occur in the data; else None.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    groups: list[str]
    splits: list[str] | None = None
    classes: int | None = None


def one_file(files: Mapping[str, Path]) -> Path:
    """Return the path of the only file.

    Raises:
        InvalidData: there are none or several.
    """
    if len(files) != 1:
        raise InvalidData(
            f"source.files names {len(files)} files ({', '.join(sorted(files)) or 'none'}); "
            "this adapter reads exactly one"
        )
    return next(iter(files.values()))


def roles(train: str, validation: str, test: str) -> dict[str, str]:
    """Return what a source calls its splits -> what they are called here; "" is none."""
    named = {train: "train", validation: "validation", test: "test"}
    return {name: split for name, split in named.items() if name}
