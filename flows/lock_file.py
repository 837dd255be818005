"""A lock file of DVC in which one entry may change without the others being written anew.

DVC reads and writes all of it for each stage: where there are thousands, a stage costs seconds.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvc.utils.serialize import dumps_yaml, load_yaml

from taskvec.atomic import write_text

HEAD = dumps_yaml({"schema": "2.0", "stages": {}}).replace(" {}", "")
ENTRY = re.compile(r"^  ([A-Za-z][\w@.-]*):\n", re.MULTILINE)
BODY = re.compile(r"(?: {4}.*\n)*")


class LockFile:
    """The entries of a lock file as DVC would write them. Not thread-safe."""

    def __init__(self, path: Path, order: Mapping[str, int]) -> None:
        """Read nothing yet.

        Args:
            path: of the file, which need not exist.
            order: stage -> its place in the file; stages that are gone come last.
        """
        self._path = path
        self._order = order
        self._texts: dict[str, str] = {}
        self._state: tuple[int, int, int] | None = None  # of the file whose texts these are

    def write(self, name: str, entry: Mapping[str, Any]) -> None:
        """Set the entry of a stage; the file has the old entry or the new one, at any moment."""
        if self._state is None or self._state != _state(self._path):  # somebody else wrote it
            self._texts = _texts(self._path)
        self._texts[name] = _text(name, entry)
        last = len(self._order)
        names = sorted(self._texts, key=lambda stage: self._order.get(stage, last))
        write_text(self._path, HEAD + "".join(self._texts[stage] for stage in names))
        self._state = _state(self._path)


def _texts(path: Path) -> dict[str, str]:
    """Return the text of each entry of a file, as DVC would write it."""
    if not path.is_file():
        return {}
    head, *parts = ENTRY.split(path.read_text(encoding="utf-8"))
    names, bodies = parts[::2], parts[1::2]
    if head == HEAD and len(set(names)) == len(names) and all(map(BODY.fullmatch, bodies)):
        return {name: f"  {name}:\n{body}" for name, body in zip(names, bodies, strict=True)}
    stages = load_yaml(path).get("stages", {})
    return {name: _text(name, entry) for name, entry in stages.items()}


def _text(name: str, entry: Mapping[str, Any]) -> str:
    text: str = dumps_yaml({"stages": {name: entry}})
    return text.partition("\n")[2]


def _state(path: Path) -> tuple[int, int, int]:
    if not path.exists():
        return 0, 0, 0
    state = path.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns
