"""One class of one style, among several: the data of "king = queen + (man - woman)".

A category is written ``STYLE/CLASS``: the name of an .npz file without its suffix, as `npz` reads
it, and a label, or the name that the file's .json (``{"classes": [...]}``) gives it. The labels are
numbered over all categories that are declared, so that a head knows classes that the data lacks.
Source: Ilharco et al., ICLR 2023, arXiv:2212.04089, section 5, kings and queens.
"""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from taskvec.datasets import npz
from taskvec.datasets.items import Items
from taskvec.errors import InvalidData, nearest


def load(files: Mapping[str, Path], *, category: str | list[str], categories: list[str]) -> Items:
    """Return the items of one category, or of several.

    Args:
        files: the ``.npz`` of each style, and its ``.json`` where classes are named.
        category: whose items, such as ``pacs_photo/dog``; or a list of them.
        categories: all that the head knows, in the order of its classes.

    Raises:
        InvalidData: a category is unknown, stands twice or has no item.
    """
    chosen = [category] if isinstance(category, str) else category
    _check(chosen, categories)
    pieces = []
    for name in chosen:
        style = name.partition("/")[0]
        path, label = _parse(name, files)
        found = npz.pieces(path, f"{style}-")
        own = [piece.labelled([label], [categories.index(name)]) for piece in found]
        if not any(len(piece.labels) for piece in own):
            raise InvalidData(f"the category {name} has no item; correct data.options")
        pieces += own
    return npz.pooled(pieces, len(categories))


def _check(chosen: object, categories: list[str]) -> None:
    if not isinstance(chosen, list) or not chosen or len(set(chosen)) != len(chosen):
        raise InvalidData(f"category is {chosen!r}; expected a category or several different ones")
    if len(set(categories)) != len(categories):
        raise InvalidData(f"categories are {categories}; each must stand once")
    for name in chosen:
        if name not in categories:
            raise InvalidData(f"unknown category {name!r}; {nearest(str(name), categories)}")


def _parse(category: str, files: Mapping[str, Path]) -> tuple[Path, int]:
    """Return the file of a category's style and the label of its class."""
    style, _, word = category.partition("/")
    named = {PurePosixPath(name).name: path for name, path in files.items()}
    if f"{style}.npz" not in named:
        styles = [PurePosixPath(name).stem for name in named if name.endswith(".npz")]
        raise InvalidData(f"the category {category!r} is of no file; {nearest(style, styles)}")
    path = named[f"{style}.npz"]
    if word.isdecimal():
        return path, int(word)
    if f"{style}.json" not in named:
        raise InvalidData(
            f"the category {category!r} names a class; add {style}.json to source.files, or write "
            f"the label: {style}/0"
        )
    names = _classes(named[f"{style}.json"])
    if word not in names:
        raise InvalidData(f"{style} has no class {word!r}; {nearest(word, names)}")
    return path, names.index(word)


def _classes(path: Path) -> list[str]:
    """Return the class names of a set, in label order."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["classes"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidData(f'{path.name} is no JSON with "classes": {error}') from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidData(f"{path.name}: classes must be a list of names in label order")
    return names
