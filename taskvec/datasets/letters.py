"""The letters A to J in many fonts, black on white, slightly distorted; drawn, not photographed.

Each split has fonts of its own, of every family, so that the test asks for letters never seen.
"""

from collections.abc import Mapping
from hashlib import sha256
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from taskvec.datasets.items import Items
from taskvec.errors import InvalidData

LETTERS = "ABCDEFGHIJ"
# Fonts (file names without suffix) by split; no font is in two.
FONTS = {
    "train": (
        "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold",
        "STIXGeneral", "cmb10", "cmmi10", "cmr10",
    ),
    "validation": ("DejaVuSansMono-Bold", "STIXGeneralItalic", "cmtt10"),
    "test": (
        "DejaVuSans-BoldOblique", "DejaVuSansMono", "DejaVuSerif-Italic", "STIXGeneralBol",
        "cmss10", "cmti10",
    ),
}  # fmt: skip
CANVAS = 64  # pixels along an edge
HEIGHT = 44  # size of the font, pixels


def load(files: Mapping[str, Path], *, variants: int = 20, seed: int = 0) -> Items:
    """Return ``variants`` distorted drawings (64 x 64) of each letter in each font.

    Args:
        files: TrueType fonts that `FONTS` names.
        variants: drawings of one letter in one font.
        seed: which distortions are drawn.

    Raises:
        InvalidData: a file is no font, or has no split.
    """
    images, labels, groups, splits = [], [], [], []
    for name in sorted(files):
        font, split = _font(files[name]), _split(files[name].stem)
        for (label, letter), variant in product(enumerate(LETTERS), range(variants)):
            key = f"{seed}:{files[name].stem}:{letter}:{variant}"
            images.append(_distort(_draw(letter, font), key))
            labels.append(label)
            groups.append(files[name].stem)
            splits.append(split)
    if not images:
        raise InvalidData(f"{len(files)} fonts, {variants} variants: no letters; name more of both")
    return Items(np.stack(images), np.array(labels, dtype=np.int64), groups, splits)


def _font(path: Path) -> ImageFont.FreeTypeFont:
    try:
        # the basic layout needs no library beside FreeType, which is part of Pillow
        return ImageFont.truetype(path, HEIGHT, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise InvalidData(f"{path.name} is no font: {error}") from None


def _split(stem: str) -> str:
    for split, fonts in FONTS.items():
        if stem in fonts:
            return split
    raise InvalidData(
        f"the font {stem} has no split; add it to FONTS in taskvec/datasets/letters.py"
    )


def _draw(letter: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    canvas = Image.new("L", (CANVAS, CANVAS), 255)
    left, top, right, bottom = font.getbbox(letter)
    corner = (round((CANVAS - left - right) / 2), round((CANVAS - top - bottom) / 2))
    ImageDraw.Draw(canvas).text(corner, letter, font=font, fill=0)
    return canvas


def _distort(picture: Image.Image, key: str) -> NDArray[np.uint8]:
    """Return a picture stretched, sheared and shifted at random; the key is the randomness."""
    a, b, c, d, right, down = _uniforms(key)
    # output -> input about the middle: diagonal 0.85 to 1.2, off it up to 0.15, shifts up to 5 px
    a, d = 1.025 + 0.175 * a, 1.025 + 0.175 * d
    b, c = 0.15 * b, 0.15 * c
    middle = CANVAS / 2
    matrix = (
        a, b, middle - (a + b) * middle + 5 * right,
        c, d, middle - (c + d) * middle + 5 * down,
    )  # fmt: skip
    moved = picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=255
    )
    return np.asarray(moved)


def _uniforms(key: str) -> list[float]:
    """Return six numbers in [-1, 1) that depend on the key alone, on every platform."""
    digest = sha256(key.encode()).digest()
    words = [int.from_bytes(digest[4 * i : 4 * i + 4], "big") for i in range(6)]
    return [word / 2**31 - 1 for word in words]
