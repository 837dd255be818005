"""Square grey pictures in a gzipped CSV: a row a picture, its pixels row by row, then its label."""

import gzip
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from taskvec.errors import InvalidData


def read(path: Path, side: int, white: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return pixels (N, side, side) in 0..white and labels (N,), both int64.

    Args:
        path: the file; without a header line, all fields integers.
        side: pixels along an edge.
        white: the largest value that a pixel may have.

    Raises:
        InvalidData: it is no such file, or a pixel lies outside its range.
    """
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            rows = np.loadtxt(file, delimiter=",", dtype=np.int64, ndmin=2)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InvalidData(f"{path.name} is no gzipped CSV of integers: {error}") from None
    if rows.shape[1] != side * side + 1:
        raise InvalidData(
            f"{path.name} has {rows.shape[1]} columns; expected {side * side} pixels and a label"
        )
    pixels = rows[:, :-1].reshape(-1, side, side)
    if pixels.min() < 0 or pixels.max() > white:
        raise InvalidData(
            f"{path.name} has pixels from {pixels.min()} to {pixels.max()}; expected 0 to {white}"
        )
    return pixels, rows[:, -1]
