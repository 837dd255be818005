"""Manifests: the digest of every file below a directory, in one file whose digest says them all.

A manifest is called MANIFEST.sha256 and has the format of `sha256sum`, so that
`sha256sum -c MANIFEST.sha256` checks it, too. Write one and print its own digest with

    python -m taskvec.datasets.manifest DIRECTORY [--most FILES]
"""

import argparse
import hashlib
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from taskvec.atomic import write_text
from taskvec.errors import InvalidData, MissingArtifact, TaskvecError

NAME = "MANIFEST.sha256"
LINE = re.compile(r"([0-9a-f]{64})  (\S(?:.*\S)?)")


def digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path) -> dict[str, str]:
    """Return the files that a manifest lists, relative to its directory -> digest.

    Raises:
        InvalidData: a line is no digest and name, a name stands twice or leads out of the
            directory, or there is none.
    """
    files: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidData(f"{path}: not UTF-8: {error.reason}") from None
    for number, line in enumerate(lines, start=1):
        found = LINE.fullmatch(line)
        if not found or not is_inside(found[2]):
            raise InvalidData(
                f"{path}:{number}: expected a SHA-256, two blanks and the name of a file below "
                f"the directory, found {line[:100]!r}; write it anew: {command(path.parent)}"
            )
        if found[2] in files:
            raise InvalidData(f"{path}:{number}: {found[2]} stands twice")
        files[found[2]] = found[1]
    if not files:
        raise InvalidData(f"{path} lists no file; write it anew: {command(path.parent)}")
    return files


def write(directory: Path, most: int = 0) -> str:
    """Write the manifest of a directory and return its digest.

    Hidden files are left out.

    Args:
        directory: with all its folders.
        most: if not 0, at most so many files of each folder, the first in the order of the
            SHA-256 of their names: a sample of a set that is too large.

    Raises:
        MissingArtifact: the directory does not exist.
        InvalidData: it holds no file, or one whose name no line can hold.
    """
    if not directory.is_dir():
        raise MissingArtifact(f"{directory} is no directory; name the one that holds the set")
    names = _sample(_names(directory), most)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(digest, (directory / name for name in names))
        lines = [f"{mark}  {name}\n" for mark, name in zip(digests, names, strict=True)]
    write_text(directory / NAME, "".join(lines))
    return digest(directory / NAME)


def command(directory: Path) -> str:
    """Return the command that writes the manifest of a directory."""
    return f"python -m taskvec.datasets.manifest {directory}"


def is_inside(name: str) -> bool:
    """Return whether a relative name stays below where it starts, as far as its text says."""
    parts = name.split("/")
    return "\\" not in name and not {"", ".", ".."} & set(parts)


def _names(directory: Path) -> list[str]:
    names = []
    for path in directory.rglob("*"):
        name = path.relative_to(directory).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if name == NAME or hidden or not path.is_file():
            continue
        if not LINE.fullmatch(f"{'0' * 64}  {name}") or not is_inside(name):
            raise InvalidData(
                f"{directory}: the name {name!r} does not fit into a manifest; rename the file"
            )
        names.append(name)
    if not names:
        raise InvalidData(f"{directory} holds no file; name the directory that holds the set")
    return sorted(names)


def _sample(names: list[str], most: int) -> list[str]:
    if not most:
        return names
    folders = defaultdict(list)
    for name in names:
        folders[PurePosixPath(name).parent].append(name)
    drawn = [sorted(found, key=_drawing_key)[:most] for found in folders.values()]
    return sorted(name for found in drawn for name in found)


def _drawing_key(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def main(arguments: Sequence[str]) -> int:
    """Write a manifest, print ``digest  name`` and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m taskvec.datasets.manifest",
        description="Write the digests of all files below a directory into MANIFEST.sha256.",
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--most", type=int, default=0, help="files of each folder; default: all")
    given = parser.parse_args(arguments)
    try:
        mark = write(given.directory, given.most)
    except TaskvecError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(f"{mark}  {given.directory / NAME}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
