"""One loader for YAML that people write: YAML 1.2 as DVC reads it (`1e-5` is a number).

Anchors, tags, directives and duplicate keys are refused; lines are kept, so that `explain` can say
where a value that pydantic refuses stands.
"""

import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent, DocumentStartEvent, NodeEvent, ScalarEvent
from ruamel.yaml.reader import ReaderError

from taskvec.errors import InvalidParams

MAX_BYTES = 64 * 1024
MAX_DEPTH = 16


def read(path: Path) -> Any:
    """Return the raw contents of a file, with line numbers attached."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InvalidParams(f"{path} does not exist; run taskvec in the project's root") from None
    if len(data) > MAX_BYTES:
        raise InvalidParams(f"{path} has {len(data)} bytes; at most {MAX_BYTES}")
    try:
        text = data.decode()
        _refuse_tricks(text, path)
        return YAML(typ="rt", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        line = mark.line + 1 if mark else 1
        raise InvalidParams(f"{path}:{line}: {error.problem or error.context}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidParams(f"{path}:{line}: not UTF-8: {error.reason}") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InvalidParams(f"{path}:{line}: {error.reason}") from None
    except ValueError as error:
        raise InvalidParams(f"{path}: {error}") from None


def plain(value: Any) -> Any:
    """Return loader types (which carry comments and lines) as plain Python ones."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _refuse_tricks(text: str, path: Path) -> None:
    depth = 0
    for event in YAML(typ="rt", pure=True).parse(text):
        line = event.start_mark.line + 1
        if isinstance(event, AliasEvent) or (isinstance(event, NodeEvent) and event.anchor):
            raise InvalidParams(f"{path}:{line}: anchors and aliases are not allowed")
        tag = getattr(event, "tag", None)
        if tag:
            raise InvalidParams(f"{path}:{line}: tags such as {tag} are not allowed")
        if isinstance(event, DocumentStartEvent) and (event.version or event.tags):
            raise InvalidParams(f"{path}:{line}: directives such as %YAML are not allowed")
        if isinstance(event, ScalarEvent) and event.value == "<<" and event.style is None:
            raise InvalidParams(f"{path}:{line}: merge keys (<<) are not allowed")
        if isinstance(event, ScalarEvent) and re.search(r"[\ud800-\udfff]", event.value):
            raise InvalidParams(f"{path}:{line}: half of a surrogate pair is no character")
        name = type(event).__name__
        depth += name.endswith("StartEvent") - name.endswith("EndEvent")
        if depth > MAX_DEPTH + 2:
            raise InvalidParams(f"{path}:{line}: nested deeper than {MAX_DEPTH}")


def explain(error: Any, raw: Any, path: str) -> str:
    """Return one line for one pydantic error: file, line, key, what was found."""
    place = getattr(error.get("ctx", {}).get("error"), "place", ())
    line, key = _find(raw, [*error["loc"], *place])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = "unknown key"
    elif error["type"] != "value_error" and not isinstance(error["input"], dict | list):
        message = f"{message}, found {error['input']!r}"
    return f"{path}:{line}: {key + ': ' if key else ''}{message}"


def _find(raw: Any, location: list[Any]) -> tuple[int, str]:
    """Return the 1-based line of the deepest part of a location that the file holds, and its key.

    A location also holds what the file does not: a mark for keys, and ``options`` where they stand
    flat beside the family.
    """
    line, node, keys = 1, raw, []
    for part in location:
        try:
            mark = node.lc.data[part]
            node = node[part]
        except (AttributeError, KeyError, IndexError, TypeError):
            if part not in ("options", "[key]"):
                keys.append(str(part))
            continue
        line = mark[0] + 1
        keys.append(str(part))
    return line, ".".join(keys)
