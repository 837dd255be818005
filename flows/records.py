"""What DVC has recorded of executed stages: lock files, in git and in the checkout, and run cache.

Reads the files themselves, without DVC: the answers come offline and within a second.
"""

import hashlib
import json
import mmap
import os
import re
import subprocess
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tasks.artifacts import Artifacts, experiments
from taskvec.errors import InvalidInput
from taskvec.headers import canonical

LOCKS = ("dvc.lock", "edits/dvc.lock", "results/dvc.lock")
CHUNK = 1 << 22  # bytes that are hashed at a time
HEAD = re.compile(r"^  (?! )(.+):$")  # the first line of a stage in a lock file
CONTENT = ("command", "inputs", "outputs", "parameters")  # what tells executions apart
WEIGHTS = ("checkpoints", "vectors", "edits")  # the directories that hold them


@dataclass(frozen=True)
class Execution:
    """One execution of a stage: what was made of what.

    Equal executions of two experiments are one, since their paths are relative to the experiment.

    Attributes:
        command: as in dvc.yaml, such as ``python -m tasks search addition-0``.
        inputs: path -> md5 of each file that it read.
        outputs: path -> md5 of each file that it wrote.
        parameters: file -> key -> value of the parameters that it was given.
        run: what else is known: MLflow run, Prefect run, commit, who, when; may be empty.
    """

    command: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    parameters: dict[str, dict[str, Any]]
    run: dict[str, str] = field(default_factory=dict, compare=False)

    @cached_property
    def ident(self) -> str:
        """The sha256 of command, inputs, outputs and parameters."""
        content = {name: getattr(self, name) for name in CONTENT}
        return hashlib.sha256(canonical(content).encode()).hexdigest()

    @property
    def stage(self) -> str:
        """The module of tasks/ that did it; ``taskvec`` for an edit outside the graph."""
        words = self.command.split()
        return words[3] if words[:3] == ["python", "-m", "tasks"] else words[0]

    @property
    def item(self) -> str:
        """What it worked on: a task, or a name and a seed; may be empty."""
        words = self.command.split()
        return words[4] if words[:3] == ["python", "-m", "tasks"] and len(words) > 4 else ""

    @property
    def name(self) -> str:
        """Stage and item, as people call it."""
        return f"{self.stage} {self.item}".strip()


def is_weights(path: str) -> bool:
    """Return whether an output holds weights that edits are made of."""
    parts = Path(path).parts
    return len(parts) > 1 and parts[1] in WEIGHTS and path.endswith(".safetensors")


def parsed(text: str) -> Execution:
    """Return the execution of one entry of a lock file or of the run cache.

    Args:
        text: YAML; under the name of the stage or not.

    Raises:
        InvalidInput: it is no such entry.
    """
    try:
        entry = _yaml().load(text)
        if isinstance(entry, dict) and len(entry) == 1 and "cmd" not in entry:
            (entry,) = entry.values()
        return Execution(
            entry["cmd"],
            {item["path"]: item["md5"] for item in entry.get("deps") or []},
            {item["path"]: item["md5"] for item in entry.get("outs") or []},
            {file: dict(values) for file, values in (entry.get("params") or {}).items()},
        )
    except (YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise InvalidInput(f"no entry of DVC ({type(error).__name__}: {error})") from None


def md5_of(path: Path) -> str:
    """Return the md5 of a file, read through a map so that no byte is copied."""
    found = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        if not os.fstat(stream.fileno()).st_size:
            return found.hexdigest()
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            view = memoryview(content)
            for start in range(0, len(view), CHUNK):
                with view[start : start + CHUNK] as part:
                    found.update(part)
            view.release()
    return found.hexdigest()


def digest_of_entry(text: str) -> str:
    """Return the name that DVC's run cache gives a file with this entry: its content's sha256."""
    entry = _without(_yaml().load(text), ("size", "nfiles"))
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _without(value: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {key: _without(item, keys) for key, item in value.items() if key not in keys}
    return [_without(item, keys) for item in value] if isinstance(value, list) else value


def chunks(text: str) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each stage in a lock file, as DVC writes it.

    Parsing a long lock file takes seconds; most of its entries are those of the last version.
    """
    name, lines = "", list[str]()
    for line in text.splitlines(keepends=True):
        start = HEAD.match(line.rstrip("\n"))
        if start or not line.startswith("  "):
            if name:
                yield name, "".join(lines)
            name, lines = start.group(1).strip("'\"") if start else "", []
        lines.append(line)
    if name:
        yield name, "".join(lines)


@dataclass(frozen=True)
class Records:
    """Where the records of a repository lie.

    Attributes:
        top: the directory of the repository.
    """

    top: Path

    def lock_files(self) -> list[str]:
        """Return the lock files in the checkout, relative to ``top``."""
        names = [*LOCKS, *(f"{self._below(e)}/dvc.lock" for e in experiments(self.top).values())]
        return [name for name in names if (self.top / name).is_file()]

    def of_root(self, root: Path) -> list[str]:
        """Return the lock files of one experiment, or of the repository's own."""
        if Artifacts(root).top == root:
            return [name for name in LOCKS if (root / name).is_file()]
        name = f"{self._below(root)}/dvc.lock"
        return [name] if (self.top / name).is_file() else []

    def at(self, revision: str, lock: str) -> str:
        """Return a lock file at a git revision; empty if there was none."""
        return self.git("show", f"{revision}:{lock}")

    @cached_property
    def cache(self) -> Path:
        """DVC's cache directory."""
        config = ConfigParser(interpolation=None, strict=False)
        config.read([self.top / ".dvc" / name for name in ("config", "config.local")])
        return self.top / ".dvc" / config.get("cache", "dir", fallback="cache").strip('"')

    def cached(self, md5: str) -> Path:
        """Return where a file lies in DVC's cache, if it does."""
        return self.cache / "files" / "md5" / md5[:2] / md5[2:]

    def run_cache(self) -> Iterator[str]:
        """Yield ``KEY/VALUE`` of every execution that DVC remembers, committed or not."""
        for first in _entries(self.cache / "runs"):
            for key in _entries(first):
                start = len(first) + 1
                yield from (path[start:] for path in _entries(key) if not path.endswith(".tmp"))

    def remembered(self, name: str) -> Path:
        """Return the file of an execution that is named as in `run_cache`."""
        return self.cache / "runs" / name[:2] / name

    def refs(self) -> str:
        """Return a digest of what git has: it changes with every commit."""
        text = self.git("for-each-ref", "--format=%(objectname)") + self.git("rev-parse", "HEAD")
        return hashlib.sha256(text.encode()).hexdigest()

    def history(self) -> Iterator[tuple[str, str, str, str, list[tuple[str, str]]]]:
        """Yield (commit, date, author, subject, [(lock file, blob)]), the oldest first."""
        text = self.git(
            "log", "--all", "--reverse", "--raw", "--no-abbrev", "--no-renames",
            "--diff-merges=first-parent",
            "--format=%x00%H%x1f%cI%x1f%an%x1f%s", "--", "*dvc.lock",
        )  # fmt: skip
        for block in text.split("\0")[1:]:
            first, *rest = block.strip("\n").split("\n")
            changes = [line.split("\t") for line in rest if line.startswith(":")]
            blobs = [(name, state.split()[3]) for state, name in changes]
            commit, date, author, subject = first.split("\x1f")
            yield commit, date, author, subject, [(n, b) for n, b in blobs if set(b) != {"0"}]

    def blob(self, name: str) -> str:
        """Return the text of a git object."""
        return self.git("cat-file", "blob", name)

    def git(self, *arguments: str) -> str:
        """Return what git says; empty if it fails or is not there."""
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=self.top, capture_output=True, timeout=60, check=False
            )
        except OSError:
            return ""
        return done.stdout.decode(errors="replace") if done.returncode == 0 else ""

    def _below(self, directory: Path) -> str:
        return directory.relative_to(self.top).as_posix()


def _entries(directory: Path | str) -> list[str]:
    """Return the paths in a directory; none if there is no such directory."""
    try:
        with os.scandir(directory) as found:
            return [entry.path for entry in found]
    except (FileNotFoundError, NotADirectoryError):
        return []


@cache
def _yaml() -> YAML:
    return YAML(typ="safe")
