"""The code of a checkout as it is now, committed or not, as one git commit in a pack.

What git tracks, as it lies in the working tree, and new files in the rooms that hold code or
parameters. Lock files stay behind, so that equal code is an equal commit whatever has run.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from taskvec.errors import InvalidInput, TaskvecError

ROOMS = ("flows", "tasks", "taskvec", "experiments", "edits", "results", "*.yaml", "[!.]*.dvc")
LEFT_OUT = (":(glob)**/dvc.lock",)
MOST_BYTES = 100_000_000  # a checkout without its data
IDENTITY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (
        ("NAME", "taskvec"), ("EMAIL", "taskvec@localhost"), ("DATE", "2000-01-01T00:00:00+0000"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """A commit without parents, a pack that holds all of it, and the names of its files."""

    commit: str
    pack: bytes
    names: frozenset[str]


def take(top: Path) -> Snapshot:
    """Return the code of a repository as it is now; neither its index nor its objects change.

    Raises:
        TaskvecError: it is no git repository.
        InvalidInput: it has too much in it to be sent around.
    """
    place = top / ".taskvec" / "snapshot"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        return _taken(top, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _taken(top: Path, place: Path) -> Snapshot:
    objects = _git(top, {}, "rev-parse", "--path-format=absolute", "--git-path", "objects").strip()
    index = _git(top, {}, "rev-parse", "--path-format=absolute", "--git-path", "index").strip()
    environment = {
        **IDENTITY,
        "GIT_INDEX_FILE": str(place / "index"),
        "GIT_OBJECT_DIRECTORY": str(place / "objects"),
        "GIT_ALTERNATE_OBJECT_DIRECTORIES": objects,
    }
    (place / "objects").mkdir()
    if Path(index).is_file():  # it knows what has not changed since
        shutil.copy2(index, place / "index")
    _git(top, environment, "add", "--update", ".")
    present = [room for room in ROOMS if any(top.glob(room))]
    _git(top, environment, "add", "--", *present)
    _git(top, environment, "rm", "-r", "--cached", "--quiet", "--ignore-unmatch", "--", *LEFT_OUT)
    names = frozenset(_git(top, environment, "ls-files", "-z").split("\0")) - {""}
    _check_size(names, top)
    tree = _git(top, environment, "write-tree").strip()
    commit = _git(top, environment, "commit-tree", "-m", "as it is now", tree).strip()
    pack = _run(
        top, environment, ["pack-objects", "--revs", "--stdout", "-q"], f"{commit}\n".encode()
    )
    return Snapshot(commit, pack, names)


def _check_size(names: frozenset[str], top: Path) -> None:
    sizes = {name: (top / name).lstat().st_size for name in names if (top / name).exists()}
    if sum(sizes.values()) > MOST_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise InvalidInput(
            f"the files that git tracks have {sum(sizes.values()) / 1e6:.0f} MB, the largest is "
            f"{largest}; at most {MOST_BYTES / 1e6:.0f} MB are sent to a cluster: let DVC track "
            "data, and git ignore it"
        )


def _git(top: Path, environment: dict[str, str], *arguments: str) -> str:
    return _run(top, environment, list(arguments), b"").decode()


def _run(top: Path, environment: dict[str, str], arguments: list[str], text: bytes) -> bytes:
    done = subprocess.run(
        ["git", *arguments], cwd=top, env={**os.environ, **environment}, input=text,
        capture_output=True,
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise TaskvecError(f"git {arguments[0]} failed in {top}: {said}")
    return done.stdout
