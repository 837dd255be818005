"""`python -m flows.watcher ROOT`: tell Prefect when the inputs of a checkout have changed.

Inputs are what no stage makes: the commit, as far as it concerns the graph, and data that DVC
tracks outside of git (files that a lock file names as read and not as made, and those of *.dvc
files). An edited params.yaml that is not committed is no change: somebody is still at work on it.

What was seen last is kept in .taskvec/watched.json, so that a change made while nobody watched is
told at the next start. A change that could not be told is told later.
"""

import hashlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows.records import LOCKS, Records, md5_of
from taskvec.atomic import write_text
from taskvec.errors import InvalidInput

EVENT = "taskvec.inputs.changed"
CHECKOUT = "TASKVEC_CHECKOUT"  # what prefect.yaml calls this checkout
POLL_SECONDS = 2.0
LIST_EVERY = 30.0  # seconds between looks for new inputs
MOST_NAMES = 20  # in an event
# What a commit must touch to be a change; "*" stands for slashes, too.
CONCERNS = (
    "params.yaml", "dvc.yaml", "code.yaml", "edits/dvc.yaml", "results/dvc.yaml", "*.dvc",
    "retractions.yaml", "taskvec/*.py", "tasks/*.py", "experiments/*.yaml",
)  # fmt: skip

# lines of a lock file, as DVC writes it; to parse it as YAML takes seconds
_SECTION, _PATH = re.compile(r"    (\w+):"), re.compile(r"    - path: (.+)")

Mark = tuple[int, int]  # size and time of change


def checkout_id(root: Path) -> str:
    """Return what tells this checkout apart from others: TASKVEC_CHECKOUT, or host and path.

    Raises:
        InvalidInput: the variable is no name.
    """
    if name := os.environ.get(CHECKOUT):
        if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", name):
            raise InvalidInput(f"{CHECKOUT} is {name!r}; expected letters, digits and -")
        return name
    return hashlib.sha256(f"{platform.node()}:{root.resolve()}".encode()).hexdigest()[:12]


def resource(root: Path) -> str:
    """Return what Prefect calls this checkout in events."""
    return f"taskvec.checkout.{checkout_id(root)}"


class Watcher:
    """Looks at a checkout and says what changed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._records = Records(root)
        self._state = root / ".taskvec" / "watched.json"
        self._listed = float("-inf")
        self._names: list[str] = []
        self._marks: dict[str, Mark] = {}  # of files whose digest is known
        self._moving: dict[str, Mark] = {}  # of files that may still be written
        seen: Any = {}
        with suppress(OSError, ValueError):
            seen = json.loads(self._state.read_text())
        self._commit = str(seen.get("commit", ""))
        self._digests: dict[str, str] = dict(seen.get("digests", {}))
        self._first = not seen

    def look(self) -> list[str]:
        """Return the names of inputs that changed since `keep`; the first look finds none."""
        changed = self._committed() + self._rewritten()
        if self._first:
            self._first = False
            self.keep()
            return []
        return list(dict.fromkeys(changed))

    def keep(self) -> None:
        """Remember what is there now as told."""
        self._commit = self._head()
        content = {"commit": self._commit, "digests": self._digests}
        write_text(self._state, json.dumps(content))

    @property
    def commit(self) -> str:
        """The commit that was seen last."""
        return self._head()

    def _head(self) -> str:
        return self._records.git("rev-parse", "HEAD").strip()

    def _committed(self) -> list[str]:
        """Return what the commits since the last one that was told touch, if it concerns us."""
        head = self._head()
        if head == self._commit or not head:
            return []
        self._listed = float("-inf")
        names = self._records.git("diff", "--name-only", "-z", self._commit, head).split("\0")
        inputs = self._inputs()
        found = [n for n in names if n in inputs or any(fnmatch(n, p) for p in CONCERNS)]
        known = self._commit and self._records.git("cat-file", "-t", self._commit).strip()
        if not found and known == "commit":
            self.keep()  # a commit about something else
        return found if known == "commit" else [f"commit {head[:12]}"]

    def _rewritten(self) -> list[str]:
        """Return the data outside of git whose content changed and is at rest."""
        if time.monotonic() - self._listed > LIST_EVERY:
            self._listed = time.monotonic()
            self._names = sorted(self._outside())
            for name in self._digests.keys() - set(self._names):
                del self._digests[name]
        changed = []
        for name in self._names:
            for path in _files(self._root / name):
                key = os.path.relpath(path, self._root)
                mark = _mark(path)
                if mark is None or mark == self._marks.get(key):
                    continue
                if key in self._digests and self._moving.get(key) != mark:
                    self._moving[key] = mark
                    continue
                self._moving.pop(key, None)
                digest = md5_of(path)
                if self._digests.get(key, digest) != digest:
                    changed.append(key)
                self._digests[key], self._marks[key] = digest, mark
        return changed

    def _outside(self) -> set[str]:
        """Return inputs that git does not have: files and directories."""
        found = self._inputs()
        for name in self._git_names("-co", "--exclude-standard", "*.dvc"):
            found.add(name)
            with suppress(OSError, YAMLError, TypeError, KeyError):
                text = (self._root / name).read_text()
                for out in YAML(typ="safe", pure=True).load(text)["outs"]:
                    found.add(os.path.normpath(Path(name).parent / out["path"]))
        return found - set(self._git_names(*found)) | {n for n in found if n.endswith(".dvc")}

    def _inputs(self) -> set[str]:
        """Return what the lock files name as read by a stage and not as made by one."""
        found: dict[str, set[str]] = {"deps": set(), "outs": set()}
        for lock in LOCKS:
            path = self._root / lock
            section = ""
            for line in path.read_text().splitlines() if path.is_file() else ():
                if name := _PATH.match(line):
                    found.get(section, set()).add(name.group(1).strip("'\""))
                elif heading := _SECTION.match(line):
                    section = heading.group(1)
        return found["deps"] - found["outs"]

    def _git_names(self, *arguments: str) -> list[str]:
        if not arguments:
            return []
        return [n for n in self._records.git("ls-files", "-z", *arguments).split("\0") if n]


def watch(root: Path) -> None:
    """Look for ever, and tell Prefect of changes."""
    watcher = Watcher(root)
    beat = root / ".taskvec" / "watcher.beat"
    pending: list[str] = []
    while True:
        beat.touch()
        pending = list(dict.fromkeys([*pending, *watcher.look()]))
        if pending and _told(root, watcher.commit, pending):
            watcher.keep()
            pending = []
        time.sleep(POLL_SECONDS)


def _told(root: Path, commit: str, names: list[str]) -> bool:
    """Emit the event; return whether Prefect has taken it."""
    import asyncio

    try:
        asyncio.run(emit(root, commit, names))
    except Exception as error:  # the server is down, or is starting
        from flows.redaction import reason

        _say(f"not told yet: {reason(error)}")
        return False
    _say(f"told: {', '.join(names[:MOST_NAMES])}")
    return True


async def emit(root: Path, commit: str, names: Iterable[str]) -> None:
    """Tell Prefect that inputs of a checkout changed."""
    from prefect.events import Event, Resource
    from prefect.events.clients import get_events_client

    names = list(names)
    event = Event(
        event=EVENT,
        resource=Resource(
            {"prefect.resource.id": resource(root), "prefect.resource.name": root.name}
        ),
        payload={"commit": commit, "changed": names[:MOST_NAMES], "number": len(names)},
    )
    async with get_events_client() as client:
        await client.emit(event)


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _mark(path: Path) -> Mark | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    watch(Path(sys.argv[1]))
