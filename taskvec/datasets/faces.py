"""Faces against background, 25 x 25 grey: the 200 pictures of LFW that scikit-image ships.

Source: Huang et al., Labeled Faces in the Wild; ``skimage.data.lfw_subset``.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from taskvec.datasets.items import Items, one_file
from taskvec.errors import InvalidData

FACES = 100


def load(files: Mapping[str, Path]) -> Items:
    """Return 100 faces (label 0) and 100 cut-outs of backgrounds (label 1).

    The source does not name the people: one person may be in two splits.

    Args:
        files: one ``lfw_subset.npy``, (200, 25, 25) float64 in [0, 1], faces first.

    Raises:
        InvalidData: the file is not what it must be.
    """
    path = one_file(files)
    try:
        pixels = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise InvalidData(f"{path.name} is no numeric .npy file: {error}") from None
    if not isinstance(pixels, np.ndarray) or pixels.shape != (2 * FACES, 25, 25):
        raise InvalidData(
            f"{path.name} holds {getattr(pixels, 'shape', 'several arrays')}; "
            f"expected one array of the shape {(2 * FACES, 25, 25)}"
        )
    if not (pixels.min() >= 0 and pixels.max() <= 1):  # so that NaN is refused too
        raise InvalidData(f"{path.name} has pixels outside [0, 1], or NaN")
    images = np.rint(pixels * 255).astype(np.uint8)
    labels = np.repeat(np.array([0, 1], dtype=np.int64), FACES)
    return Items(images, labels, [f"row{row:05d}" for row in range(2 * FACES)])
