"""Handwritten digits, 8 x 8, white on black: the 1,797 that scikit-learn ships.

Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits" (UCI, 1998), its test part;
``sklearn.datasets.load_digits``. A pixel counts the dark ones, 0 to 16, of a 4 x 4 block of a scan.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from taskvec.datasets import pixel_csv
from taskvec.datasets.items import Items, one_file

DARKEST = 16


def load(files: Mapping[str, Path], *, invert: bool = False) -> Items:
    """Return the digits 0 to 9; an item's group is its row, so that `invert` changes no split.

    The source does not say who wrote which digit: writers may cross splits.

    Args:
        files: one ``digits.csv.gz``.
        invert: black on white instead: 255 - pixel.

    Raises:
        InvalidData: the file is not what it must be.
    """
    pixels, labels = pixel_csv.read(one_file(files), side=8, white=DARKEST)
    # integers only: the same bytes on every platform
    images = ((pixels * 255 + DARKEST // 2) // DARKEST).astype(np.uint8)
    groups = [f"row{row:05d}" for row in range(len(labels))]
    return Items(255 - images if invert else images, labels, groups)
