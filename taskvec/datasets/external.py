"""Sets that no package ships: files below the data root, whose bytes must be those of params.yaml.

The data root is a directory of this machine: the environment variable TASKVEC_DATA says which. Only
the name of a set and the digests of its files are ever recorded. A file called MANIFEST.sha256
stands for all files that it lists, see `taskvec.datasets.manifest`.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from taskvec.datasets import manifest
from taskvec.errors import InvalidData, MissingArtifact
from taskvec.sections import Source, Task

ROOT = "TASKVEC_DATA"
UNKNOWN = "0" * 64  # stands in params.yaml where nobody knows the digest yet


def data_root() -> Path | None:
    """Return the directory below which external sets lie, if the environment names one."""
    value = os.environ.get(ROOT)
    return Path(value) if value else None


def locate(source: Source, root: Path | None = None) -> dict[str, Path]:
    """Return the verified files of an external set: name below the data root -> path.

    Args:
        source: of an external set.
        root: the data root; default: that of the environment.

    Raises:
        MissingArtifact: there is no data root, or a file is missing.
        InvalidData: a file has another digest, or lies outside the data root.
    """
    root = root or data_root()
    if root is None:
        raise MissingArtifact(f"{source.external}: {_which_root()}")
    found = {}
    for name, digest in sorted(source.files.items()):
        path = _verified(root, name, digest)
        if not _is_manifest(name):
            found[name] = path
            continue
        for below, mark in _listed(name, path).items():
            found[below] = _verified(root, below, mark)
    return found


def missing(tasks: Mapping[str, Task], root: Path | None = None) -> list[str]:
    """Return one line for every file of external sets that is not there, and what to do.

    Files are looked for, not read; only manifests are.

    Args:
        tasks: by name; those whose data a package ships are passed over.
        root: the data root; default: that of the environment.
    """
    root = root or data_root()
    lines = []
    for task, item in tasks.items():
        source = item.data.source
        if source.external is not None:
            for name, digest in sorted(source.files.items()):
                lines += [f"{task}: {line}" for line in _problems(root, name, digest)]
    return lines


def _problems(root: Path | None, name: str, digest: str) -> Iterator[str]:
    if root is None:
        yield f"{name}: {_which_root()}"
        return
    try:
        path = _inside(root, name)
        if digest == UNKNOWN:
            yield _unknown(root, name)
        elif not path.is_file():
            yield _not_there(root, name)
        elif _is_manifest(name):
            _check_digest(path, name, digest)
            absent = [other for other in _listed(name, path) if not _inside(root, other).is_file()]
            if absent:
                yield (
                    f"{len(absent)} files that {name} lists are missing below {root}, the first "
                    f"is {absent[0]}; complete the set"
                )
    except InvalidData as error:
        yield str(error)


def _verified(root: Path, name: str, digest: str) -> Path:
    path = _inside(root, name)
    if digest == UNKNOWN:
        raise MissingArtifact(_unknown(root, name))
    if not path.is_file():
        raise MissingArtifact(_not_there(root, name))
    _check_digest(path, name, digest)
    return path


def _check_digest(path: Path, name: str, expected: str) -> None:
    found = manifest.digest(path)
    if found != expected:
        raise InvalidData(
            f"{name} has the wrong digest: found {found}, expected {expected}; get the file that "
            "params.yaml means, or correct source.files"
        )


def _inside(root: Path, name: str) -> Path:
    """Return the path of a name below the data root, with all links followed."""
    path = (root / name).resolve()
    if not manifest.is_inside(name) or not path.is_relative_to(root.resolve()):
        raise InvalidData(
            f"{name} leads out of the data root {root}; put the file itself there, not a link"
        )
    return path


def _listed(name: str, path: Path) -> dict[str, str]:
    """Return the files that a manifest lists, as names below the data root -> digest."""
    folder = PurePosixPath(name).parent
    return {str(folder / other): digest for other, digest in manifest.read(path).items()}


def _is_manifest(name: str) -> bool:
    return PurePosixPath(name).name == manifest.NAME


def _which_root() -> str:
    return f"set {ROOT} or --data-root to the directory that holds the external sets"


def _not_there(root: Path, name: str) -> str:
    return f"{name} is missing below {root}; put it there, or {_which_root()}"


def _unknown(root: Path, name: str) -> str:
    path = root / name
    how = manifest.command(path.parent) if _is_manifest(name) else f"sha256sum {path}"
    return (
        f"the digest of {name} is not known: put the set below {root}, run `{how}` "
        "and put the digest that it prints into params.yaml"
    )
