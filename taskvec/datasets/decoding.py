"""Pictures of any format and size as arrays of one size, as CLIP's preprocessing cuts them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from taskvec.errors import InvalidData


def read(source: Path | bytes, name: str, *, mode: str = "RGB") -> Image.Image:
    """Return a picture in one of PIL's colour modes.

    Args:
        source: a file, or its contents.
        name: how to call it in a message.
        mode: RGB, or L for grey.

    Raises:
        InvalidData: it is no picture, or broken.
    """
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as picture:
            return picture.convert(mode)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise InvalidData(f"{name} is no picture: {error}") from None


def square(picture: Image.Image, side: int) -> Image.Image:
    """Return the middle of a picture, its shorter edge resized to ``side`` pixels, bicubic.

    Source: Resize and CenterCrop of torchvision, which CLIP's preprocessing is made of
    (arXiv:2103.00020, and ``clip.load``).
    """
    width, height = picture.size
    short = min(width, height)
    width, height = side * width // short, side * height // short
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return resized.crop((left, top, left + side, top + side))


def stack(count: int, picture: Callable[[int], Image.Image], side: int) -> NDArray[np.uint8]:
    """Return pictures as (count, side, side, 3), decoded in several threads.

    Args:
        count: of pictures.
        picture: the picture of a position, in RGB.
        side: pixels along an edge.
    """
    result = np.empty((count, side, side, 3), dtype=np.uint8)

    def put(place: int) -> None:
        result[place] = np.asarray(square(picture(place), side))

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(put, range(count)):  # so that the first error is raised
            pass
    return result
