"""The stage graph, read from dvc.yaml and edits/dvc.yaml without DVC."""

import itertools
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from taskvec.errors import MissingArtifact

REFERENCE = re.compile(r"\$\{\s*(item|key)((?:\.[A-Za-z0-9_]+)*)\s*\}")


@dataclass(frozen=True)
class Stage:
    """A stage as DVC sees it, with ``matrix`` and ``foreach`` expanded.

    Attributes:
        name: as DVC prints it: ``fine_tune@mnist-0``, ``combine-addition-0``.
        kind: the part of the name before the item: ``fine_tune``, ``combine``.
        item: the rest of the name: ``mnist-0``, ``addition-0``; empty if there is none.
        deps: paths of files and directories relative to the root, sorted.
        outs: the same, metrics and plots included.
    """

    name: str
    kind: str
    item: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]


def stage_graph(root: Path) -> list[Stage]:
    """Return all stages of ``root/dvc.yaml`` and ``root/edits/dvc.yaml``, in the files' order.

    Raises:
        MissingArtifact: there is no ``root/dvc.yaml``. An experiment without edits may lack the
            other file.
    """
    first = root / "dvc.yaml"
    if not first.is_file():
        raise MissingArtifact(f"{first} does not exist; run taskvec in the project's root")
    files = [(first, ""), (root / "edits" / "dvc.yaml", "edits")]
    return [stage for path, base in files if path.is_file() for stage in _stages(_load(path), base)]


def edges(stages: Iterable[Stage]) -> list[tuple[str, str]]:
    """Return (producer, consumer) for every stage that reads what another one writes, sorted."""
    stages = list(stages)
    producers = {out: stage.name for stage in stages for out in stage.outs}
    found = {
        (producer, stage.name)
        for stage in stages
        for dep in stage.deps
        for producer in _producers(dep, producers)
        if producer != stage.name
    }
    return sorted(found)


def ancestors(stages: Iterable[Stage], name: str) -> list[Stage]:
    """Return a stage and everything that it needs, in the given order; all if it is unknown."""
    stages = list(stages)
    needs: dict[str, list[str]] = {}
    for producer, consumer in edges(stages):
        needs.setdefault(consumer, []).append(producer)
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting.extend(needs.get(current, []))
    known = any(stage.name == name for stage in stages)
    return [stage for stage in stages if stage.name in seen] if known else stages


def columns(stages: Iterable[Stage]) -> list[list[Stage]]:
    """Return the stages in columns, one a kind, so that edges lead from left to right.

    A kind that stands on both sides of another one (evaluate before and after search) is split.
    """
    stages = list(stages)
    before: dict[str, list[str]] = {stage.name: [] for stage in stages}
    for producer, consumer in edges(stages):
        before[consumer].append(producer)
    # Round by round: the kind of which most stages have all they need goes next, and takes every
    # stage that is ready, so that related stages stay together.
    result: list[list[Stage]] = []
    done: set[str] = set()
    waiting = stages
    while waiting:
        ready = [stage for stage in waiting if done.issuperset(before[stage.name])]
        if not ready:
            return [*result, waiting]  # a cycle: DVC refuses it, and so it is no matter here
        kinds = {stage.kind: 0 for stage in ready}
        blocked = {stage.kind for stage in waiting if stage not in ready}
        # Prefer a kind that is ready as a whole; the file's order decides otherwise.
        kind = next((k for k in kinds if k not in blocked), next(iter(kinds)))
        column = [stage for stage in ready if stage.kind == kind]
        result.append(column)
        done.update(stage.name for stage in column)
        waiting = [stage for stage in waiting if stage.name not in done]
    return result


def _load(path: Path) -> Mapping[str, Any]:
    return YAML(typ="safe", pure=True).load(path.read_text()) or {}


def _stages(document: Mapping[str, Any], base: str) -> Iterator[Stage]:
    for name, block in (document.get("stages") or {}).items():
        for full, body, item, key in _expand(str(name), block):
            yield _stage(full, _substitute(body, item, key), base)


def _expand(name: str, block: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any, Any]]:
    """Yield the name and body of every stage of a block, with its item and key."""
    if "matrix" in block:
        axes = block["matrix"]
        for values in itertools.product(*axes.values()):
            key = "-".join(str(value) for value in values)
            yield f"{name}@{key}", block, dict(zip(axes, values, strict=True)), key
    elif "foreach" in block:
        items = block["foreach"]
        if isinstance(items, Mapping):
            pairs = list(items.items())
        else:
            pairs = [(i if isinstance(v, Mapping) else v, v) for i, v in enumerate(items)]
        for key, item in pairs:
            yield f"{name}@{key}", block["do"], item, key
    else:
        yield name, block, None, None


def _substitute(value: Any, item: Any, key: Any) -> Any:
    if isinstance(value, Mapping):
        return {_substitute(k, item, key): _substitute(v, item, key) for k, v in value.items()}
    if isinstance(value, list):
        return [_substitute(part, item, key) for part in value]
    if isinstance(value, str) and item is not None:
        return REFERENCE.sub(lambda match: _reference(match, item, key), value)
    return value


def _reference(match: re.Match[str], item: Any, key: Any) -> str:
    value = item if match[1] == "item" else key
    for part in match[2].split(".")[1:]:
        if not isinstance(value, Mapping) or part not in value:
            return match[0]
        value = value[part]
    return str(value)


def _stage(name: str, body: Mapping[str, Any], base: str) -> Stage:
    base = posixpath.join(base, body.get("wdir", "."))
    kind, _, item = name.partition("@") if "@" in name else name.partition("-")
    outs = [path for section in ("outs", "metrics", "plots") for path in _paths(body, section)]
    return Stage(
        name,
        kind,
        item,
        tuple(sorted({posixpath.normpath(posixpath.join(base, p)) for p in _paths(body, "deps")})),
        tuple(sorted({posixpath.normpath(posixpath.join(base, p)) for p in outs})),
    )


def _paths(body: Mapping[str, Any], section: str) -> list[str]:
    """Return the paths of a list whose entries are paths or one-key mappings of a path."""
    entries = body.get(section) or []
    return [str(next(iter(e)) if isinstance(e, Mapping) else e) for e in entries]


def _producers(dep: str, producers: Mapping[str, str]) -> list[str]:
    """Return the stages that write a path, something below it or a directory above it."""
    if dep in producers:
        return [producers[dep]]
    above = [str(parent) for parent in Path(dep).parents if str(parent) in producers]
    below = [out for out in producers if out.startswith(f"{dep}/")]
    return [producers[out] for out in above + below]
