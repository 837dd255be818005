"""Modules found by name: data adapters, model families, merging methods, search strategies.

Their options are the keyword arguments of one function, read from the source without importing it,
so that a mistake in params.yaml is reported before torch is even loaded.
"""

import ast
import importlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from taskvec import options as kinds
from taskvec.errors import nearest

# The function that makes a module one of its room; empty: it has the module's own name.
ENTRY = {"datasets": "load", "models": "tower", "merging": "", "strategies": ""}
KEY = {"datasets": "dataset", "models": "family", "merging": "method", "strategies": "strategy"}


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
        wrong = kinds.problem(_kind(known[option]), value)
        if wrong:
            raise Misplaced(wrong, "options", option)
    required = [option for option, default in _defaults(entry).items() if default is None]
    missing = [option for option in required if option not in options]
    if missing:
        raise Misplaced(f"{name} needs {', '.join(missing)}", KEY[room])


def complete(room: str, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return checked options with the defaults of those that are left out; 1 as 1.0 for a float.

    A tuple stands for several values of one option, each of which is checked.

    Raises:
        Misplaced: see `check_options`.
    """
    single = {
        key: value[0] if isinstance(value, tuple) else value for key, value in options.items()
    }
    check_options(room, name, single)
    for key, value in options.items():
        for other in value[1:] if isinstance(value, tuple) else ():
            check_options(room, name, {**single, key: other})
    entry = _entry(room, name)
    assert entry is not None  # or check_options would have raised
    result = {}
    for arg in entry.args.kwonlyargs:
        default = _defaults(entry)[arg.arg]
        value = options[arg.arg] if arg.arg in options else ast.literal_eval(default or "None")
        whole = _kind(arg.annotation) is not float and not _is_float(_kind(arg.annotation))
        convert = (lambda item: item) if whole else float
        result[arg.arg] = tuple(map(convert, value)) if isinstance(value, tuple) else convert(value)
    return result


def constant(room: str, name: str, key: str, default: Any) -> Any:
    """Return a constant of a module, such as ``ORDERED = True``, without importing it."""
    tree = _tree(room, name)
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == key:
            return ast.literal_eval(node.value)
    return default


def summary(room: str, name: str) -> str:
    """Return the first line of a module's docstring."""
    tree = _tree(room, name)
    return (ast.get_docstring(tree) or "").partition("\n")[0] if tree else ""


def _defaults(entry: ast.FunctionDef) -> dict[str, ast.expr | None]:
    names = [arg.arg for arg in entry.args.kwonlyargs]
    return dict(zip(names, entry.args.kw_defaults, strict=True))


def _kind(annotation: ast.expr | None) -> Any:
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        return Literal[ast.literal_eval(annotation.slice)]
    words = ast.unparse(annotation or ast.Name("str")).split("[")[0]
    return kinds.NAMED.get(words, object)


def _is_float(kind: Any) -> bool:
    return getattr(kind, "__origin__", None) is float


def _entry(room: str, name: str) -> ast.FunctionDef | None:
    tree = _tree(room, name)
    wanted = ENTRY[room] or name
    for node in tree.body if tree else ():
        if isinstance(node, ast.FunctionDef) and node.name == wanted:
            return node
    return None


def _tree(room: str, name: str) -> ast.Module | None:
    path = Path(__file__).parent / room / f"{name}.py"
    return _parsed(path, path.stat().st_mtime_ns) if path.is_file() else None


@cache
def _parsed(path: Path, modified: int) -> ast.Module:
    del modified  # only tells apart what the cache may not mix up
    return ast.parse(path.read_bytes())
