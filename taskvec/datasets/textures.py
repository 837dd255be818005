"""Crops of large pictures, one class a picture; each split has its own region of every picture.

The left 55 % of the width is for training, the next 15 % for validation, the right 30 % for the
test: no pixel is in two splits. Crops of one region overlap, so that the items of a split are not
independent: intervals that count items are too narrow for this data.
"""

from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from taskvec.datasets import decoding
from taskvec.datasets.items import Items
from taskvec.errors import InvalidData

# ends of the regions, in percent of the width
REGIONS = {"train": (0, 55), "validation": (55, 70), "test": (70, 100)}
STRIDE = 2  # pixels between possible corners of crops
MEAN = 128  # of a crop after contrast normalisation, grey levels
DEVIATION = 48  # likewise, unless the crop is nearly flat
LEAST_DEVIATION = 4  # of a crop before it: flatter ones would become noise


def load(files: Mapping[str, Path], *, crop: int = 48, crops: int = 200, seed: int = 0) -> Items:
    """Return grey, contrast-normalised crops; the label is the picture's place in the sorted names.

    Args:
        files: pictures that PIL reads, the class is the file.
        crop: pixels along the edge of a crop.
        crops: crops of each region of each picture, or as many as fit.
        seed: which of the possible corners are taken.

    Raises:
        InvalidData: a file is no picture, or a region is smaller than a crop.
    """
    images, labels, groups, splits = [], [], [], []
    for label, name in enumerate(sorted(files)):
        picture = np.asarray(decoding.read(files[name], files[name].name, mode="L"))  # (H, W)
        stem = files[name].stem
        for split, (start, end) in REGIONS.items():
            width = picture.shape[1]
            region = picture[:, width * start // 100 : width * end // 100]
            for piece in _crops(region, crop, crops, f"{seed}:{stem}:{split}"):
                images.append(_normalise(piece))
                labels.append(label)
                groups.append(f"{stem}-{split}")
                splits.append(split)
    return Items(np.stack(images), np.array(labels, dtype=np.int64), groups, splits)


def _crops(
    region: NDArray[np.uint8], crop: int, count: int, name: str
) -> Iterator[NDArray[np.uint8]]:
    height, width = region.shape
    if crop < 1 or min(height, width) < crop:
        raise InvalidData(
            f"crop is {crop}, but the region {name.split(':', 1)[1]} has {width} x {height} "
            "pixels; choose a crop between 1 and the smaller of the two"
        )
    corners = [
        (y, x)
        for y in range(0, height - crop + 1, STRIDE)
        for x in range(0, width - crop + 1, STRIDE)
    ]
    corners.sort(key=lambda corner: sha256(f"{name}:{corner[0]},{corner[1]}".encode()).digest())
    for y, x in corners[:count]:
        yield region[y : y + crop, x : x + crop]


def _normalise(piece: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a crop with a fixed mean and standard deviation, clipped to 0..255."""
    # sums of integers are exact, so that the result does not depend on the order of summation
    values = piece.astype(np.int64)
    total = int(values.sum())
    variance = (values.size * int((values**2).sum()) - total**2) / values.size**2
    gain = DEVIATION / max(variance**0.5, LEAST_DEVIATION)
    scaled = (values - total / values.size) * gain + MEAN
    return np.rint(scaled).clip(0, 255).astype(np.uint8)
