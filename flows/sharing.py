"""Hosts that work on one search share what they have answered.

A search asks a memory before it asks the model (taskvec/memo.py). An assistant on another host
answers a part of the grid, from the end, and its answers travel into the memory of the host that
searches, as if an assistant there had left them. They decide nothing: an entry is found by a digest
of everything that decides it.
"""

import base64
import os
import signal
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from flows.workers import die_with_parent, redirect
from tasks import stages
from tasks.artifacts import Artifacts
from taskvec import params
from taskvec.memo import Memo
from taskvec.params import Params

Rows = list[list[str]]  # key and content, in base64


class Shared:
    """The memory of a host: what is new in it, and what others add."""

    def __init__(self, path: Path) -> None:
        """Look at a memory; what is in it now is not new."""
        self._path, self._memo = path, Memo(path)
        self._last = self._highest()
        self._received: set[bytes] = set()

    def new(self) -> Rows:
        """Return what was answered here since the last call."""
        rows = []
        for number, key in self._keys():
            self._last = max(self._last, number)
            content = None if key in self._received else self._memo.get(key)
            if content is not None:
                rows.append([_text(key), _text(content)])
        return rows

    def receive(self, rows: Rows) -> None:
        """Add what other hosts have answered."""
        for key, content in rows:
            digest = base64.b64decode(key)
            if self._memo.get(digest) is None:
                self._received.add(digest)
                self._memo.put(digest, base64.b64decode(content))

    def close(self) -> None:
        """Close the memory."""
        self._memo.close()

    def _highest(self) -> int:
        found = list(self._query("SELECT max(rowid), NULL FROM answers", ()))
        return int(found[0][0] or 0) if found else 0

    def _keys(self) -> list[tuple[int, bytes]]:
        query = "SELECT rowid, key FROM answers WHERE rowid > ? ORDER BY rowid"
        return self._query(query, (self._last,))

    def _query(self, query: str, values: Iterable[int]) -> list[tuple[int, bytes]]:
        try:
            with closing(
                sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=ro", uri=True)
            ) as c:
                return c.execute(query, tuple(values)).fetchall()
        except sqlite3.DatabaseError:  # it is only a memory
            return []


def assist(stage: str, item: str, loaded: Params, root: Path, part: int, parts: int) -> None:
    """Answer one of several parts of what a stage will ask, from the last point on.

    A search over a grid is divided point by point. What another stage asks follows from what it
    has found, so that one assistant does all of it.
    """
    from taskvec.numeric import make_deterministic

    make_deterministic()
    artifacts = Artifacts(root)
    keywords = stages.arguments(stage, item, loaded)
    if stage != "search":
        if part == 0:
            stages.run(stage, item, loaded, artifacts, lambda progress: None, assist=True)
        return
    if keywords["search"].strategy != "grid":
        return
    from tasks.search import posed

    with posed(artifacts, **keywords) as problem:
        for coefficients, choice in list(_points(problem))[::-1][part::parts]:
            problem.evaluate(coefficients, choice)


def work(
    stage: str, item: str, root: str, devices: list[str], log: str, part: int, parts: int
) -> None:
    """Assist a stage; the body of a child process."""
    threading.Thread(target=die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    redirect(log)
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    os.chdir(root)
    assist(stage, item, params.load(Path("params.yaml")), Path(root), part, parts)


def _points(problem: Any) -> Iterator[tuple[Any, Any]]:
    from taskvec.search import combinations

    for choice in problem.choices:
        for coefficients in combinations(problem.ranges):
            yield coefficients, choice


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
