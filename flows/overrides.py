"""Runs with other parameters: in a git worktree, so that the checkout is never changed.

The worktree lies in .taskvec/worktrees/DIGEST, where the digest is of the changed values. It shares
DVC's cache: a stage that ran before with the same parameters is not run again, and what is made
there is known here. Its files come from the last commit and what is changed since then.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from flows.records import Records
from flows.store import tracking_uri
from tasks.artifacts import Artifacts
from taskvec import params as parameters
from taskvec.atomic import write_text
from taskvec.errors import InvalidInput, InvalidParams, TaskvecError, nearest
from taskvec.yaml_file import read

DIRECTORY = Path(".taskvec") / "worktrees"
MARK = "taskvec-tree"  # in the worktree's own git directory: what it was made from


def parsed(words: Sequence[str]) -> dict[str, Any]:
    """Return ``["fine_tune.steps=200"]`` as values: key -> what YAML says of the value.

    Raises:
        InvalidInput: one has no key, is no scalar or is given twice.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = (part.strip() for part in word.partition("="))
        try:
            value = YAML(typ="safe", pure=True).load(text)
        except Exception:
            value = ()
        if not key or not equals or not isinstance(value, str | int | float | bool | None):
            raise InvalidInput(
                f"--set {word!r}: expected a key and a value, such as fine_tune.steps=200"
            )
        if key in found:
            raise InvalidInput(f"--set gives {key!r} twice")
        found[key] = value
    return found


def applied(path: Path, overrides: Mapping[str, Any]) -> str:
    """Return the text of a params.yaml with other values at dotted keys.

    Raises:
        InvalidInput: it has no such key, or the key holds more than one value.
        InvalidParams: the result is not what a params.yaml must be.
    """
    raw = read(path)
    for key, value in overrides.items():
        *above, last = key.split(".")
        node, place = raw, ""
        for part in (*above, last):
            if not isinstance(node, dict) or part not in node:
                known = [f"{place}{name}" for name in node] if isinstance(node, dict) else [place]
                raise InvalidInput(f"params.yaml has no {key!r}; {nearest(place + part, known)}")
            if part == last and (place + part) == key:
                break
            node, place = node[part], f"{place}{part}."
        if isinstance(node[last], dict | list):
            raise InvalidInput(f"{key} of params.yaml is a section; give the key of one value")
        node[last] = value
    try:
        parameters.validate(raw, str(path))
    except InvalidParams as error:
        raise InvalidParams(f"with {_words(overrides)}: {error}") from None
    text = StringIO()
    YAML(typ="rt", pure=True).dump(raw, text)
    return text.getvalue()


def checkout(root: Path, overrides: Mapping[str, Any]) -> Path:
    """Return the directory of params.yaml in a worktree with other values.

    What runs there is recorded where runs of this checkout are.

    Args:
        root: the directory of params.yaml here: the checkout, or an experiment in it.
        overrides: dotted key -> value.

    Raises:
        InvalidInput: a key or a value is not possible; nothing was made.
        TaskvecError: git cannot make the worktree.
    """
    text = applied(root / "params.yaml", overrides)
    top = Artifacts(root).top
    below = root.relative_to(top)
    tree = top / DIRECTORY / _digest(str(below), overrides)
    os.environ.setdefault("MLFLOW_TRACKING_URI", tracking_uri(root))
    _refresh(top, tree)
    for place in {tree, tree / below}:
        (place / ".dvc").mkdir(parents=True, exist_ok=True)
        config = f"[cache]\n    dir = {Records(top).cache.resolve()}\n"
        write_text(place / ".dvc" / "config.local", config)
    if (tree / below / "params.yaml").read_text() != text:
        write_text(tree / below / "params.yaml", text)
    return tree / below


def _refresh(top: Path, tree: Path) -> None:
    """Make a worktree, or bring its files to the present state of the checkout."""
    records = Records(top)
    commit = records.git("stash", "create").strip() or records.git("rev-parse", "HEAD").strip()
    if not commit:
        raise TaskvecError(f"{top} has no commit; a run with other values needs a git worktree")
    made_from = records.git("rev-parse", f"{commit}^{{tree}}").strip()
    if (tree / ".git").is_file():
        mark = Path(Records(tree).git("rev-parse", "--absolute-git-dir").strip()) / MARK
        if mark.is_file() and mark.read_text() == made_from:
            return
        _git(tree, "checkout", "--quiet", "--force", "--detach", commit)
    else:
        _git(top, "worktree", "prune")
        _git(top, "worktree", "add", "--quiet", "--force", "--detach", str(tree), commit)
        mark = Path(Records(tree).git("rev-parse", "--absolute-git-dir").strip()) / MARK
    write_text(mark, made_from)


def _git(place: Path, *words: str) -> None:
    done = subprocess.run(["git", *words], cwd=place, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TaskvecError(f"git {words[0]} failed: {done.stderr.strip()}")


def _digest(below: str, overrides: Mapping[str, Any]) -> str:
    content = json.dumps([below, dict(overrides)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _words(overrides: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in overrides.items())
