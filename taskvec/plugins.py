"""Modules that are found by their name: data adapters, model families, merging methods.

Their options are the keyword arguments of one function, read from the source without importing it,
so that a mistake in params.yaml is reported before torch is even loaded.
"""

import ast
import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from taskvec.errors import nearest

ENTRY = {"datasets": "load", "models": "tower"}
KEY = {"datasets": "dataset", "models": "family"}
TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,), "int": (int,), "float": (int, float), "bool": (bool,), "list": (list,),
}  # fmt: skip


class Misplaced(ValueError):
    """A value is wrong, and ``place`` says which: the keys below the section that is checked."""

    def __init__(self, message: str, *place: str | int) -> None:
        super().__init__(message)
        self.place = place


def names(room: str) -> list[str]:
    """Return the names of all modules of a room that have its entry function."""
    directory = Path(__file__).parent / room
    return sorted(p.stem for p in directory.glob("*.py") if _entry(room, p.stem) is not None)


def load(room: str, name: str) -> ModuleType:
    """Return the module ``taskvec.<room>.<name>``; the name has been checked with the params."""
    if name not in names(room):
        raise ValueError(f"unknown {room} module {name!r}; {nearest(name, names(room))}")
    return importlib.import_module(f"taskvec.{room}.{name}")


def check_options(room: str, name: str, options: Mapping[str, Any]) -> None:
    """Raise Misplaced unless the module exists and takes these options."""
    entry = _entry(room, name)
    if entry is None:
        raise Misplaced(
            f"no module taskvec/{room}/{name}.py; {nearest(name, names(room))}", KEY[room]
        )
    known = {arg.arg: arg.annotation for arg in entry.args.kwonlyargs}
    for option, value in options.items():
        if option not in known:
            raise Misplaced(
                f"unknown key; {name} takes {', '.join(known) or 'none'}", "options", option
            )
        annotation = ast.unparse(known[option] or ast.Name("str")).split("[")[0]
        expected = TYPES.get(annotation, (object, bool))
        if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
            raise Misplaced(f"expected {annotation}, found {value!r}", "options", option)
    required = [
        arg.arg
        for arg, default in zip(entry.args.kwonlyargs, entry.args.kw_defaults, strict=True)
        if default is None and arg.arg not in options
    ]
    if required:
        raise Misplaced(f"{name} needs {', '.join(required)}", KEY[room])


def _entry(room: str, name: str) -> ast.FunctionDef | None:
    path = Path(__file__).parent / room / f"{name}.py"
    if not path.is_file():
        return None
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.FunctionDef) and node.name == ENTRY[room]:
            return node
    return None
