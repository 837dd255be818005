"""An index of everything recorded, so that a question about 10,000 executions takes a second.

A SQLite file that is built from the records and brought up to date whenever it is opened; deleting
it loses nothing.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from flows.records import CONTENT, Execution, Records, chunks, is_weights, parsed
from tasks.artifacts import EXPERIMENTS, Artifacts
from taskvec import headers
from taskvec.errors import IncompatibleWeights, InvalidInput, MissingArtifact

VERSION = 1
TABLES = """
CREATE TABLE source (name TEXT PRIMARY KEY, mark TEXT NOT NULL);
CREATE TABLE entry (text BLOB PRIMARY KEY, ident TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE execution (ident TEXT PRIMARY KEY, command TEXT NOT NULL, content TEXT NOT NULL);
CREATE INDEX by_command ON execution (command);
CREATE TABLE record (source TEXT, stage TEXT, ident TEXT, PRIMARY KEY (source, stage, ident))
    WITHOUT ROWID;
CREATE INDEX by_record ON record (ident);
CREATE TABLE made (md5 TEXT, path TEXT, ident TEXT, PRIMARY KEY (md5, path, ident)) WITHOUT ROWID;
CREATE INDEX by_path ON made (path);
CREATE TABLE used (md5 TEXT, path TEXT, ident TEXT, PRIMARY KEY (md5, path, ident)) WITHOUT ROWID;
CREATE TABLE weights (md5 TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, metadata TEXT NOT NULL);
CREATE INDEX by_fingerprint ON weights (fingerprint);
CREATE TABLE revision (id TEXT PRIMARY KEY, date TEXT, author TEXT, subject TEXT);
"""
WAIT_SECONDS = 30.0


class Index:
    """What was executed, by what it used and made."""

    def __init__(self, records: Records) -> None:
        """Open the index and bring it up to date; where no file can be written, in memory."""
        self._records = records
        self._fresh: list[tuple[str, str]] = []  # (md5, path) of outputs that are new to the index
        self._database = self._open(Artifacts(records.top).lineage())
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._database.close()

    def execution(self, ident: str) -> Execution:
        """Return an execution, and when git first recorded it."""
        ((content,),) = self._ask("SELECT content FROM execution WHERE ident = ?", ident)
        commits = self._ask(
            "SELECT v.id, v.date, v.author FROM record r JOIN revision v "
            "ON r.source = 'commit ' || v.id WHERE r.ident = ? ORDER BY v.rowid LIMIT 1", ident,
        )  # fmt: skip
        named = [
            dict(zip(("recorded", "committed", "author"), row, strict=True)) for row in commits
        ]
        return replace(Execution(**json.loads(content)), run=named[0] if named else {})

    def makers(self, md5: str) -> list[str]:
        """Return the executions that wrote these bytes."""
        return [row[0] for row in self._ask("SELECT DISTINCT ident FROM made WHERE md5 = ?", md5)]

    def users(self, md5: str) -> list[str]:
        """Return the executions that read these bytes."""
        return [row[0] for row in self._ask("SELECT DISTINCT ident FROM used WHERE md5 = ?", md5)]

    def paths(self, md5: str) -> list[str]:
        """Return the names of a file: those in the checkout, else those that it ever had."""
        now = self._ask(
            "SELECT DISTINCT r.source, m.path FROM made m JOIN record r ON r.ident = m.ident "
            "WHERE m.md5 = ? AND r.source LIKE 'lock %' ORDER BY r.source, m.path", md5,
        )  # fmt: skip
        if now:
            return list(dict.fromkeys(f"{_prefix(source)}{path}" for source, path in now))
        found = self._ask("SELECT DISTINCT path FROM made WHERE md5 = ? ORDER BY path", md5)
        found = found or self._ask(
            "SELECT DISTINCT path FROM used WHERE md5 = ? ORDER BY path", md5
        )
        return [row[0] for row in found]

    def is_current(self, md5: str) -> bool:
        """Return whether a lock file of the checkout names a file as an output."""
        return bool(self._ask(
            "SELECT 1 FROM made m JOIN record r ON r.ident = m.ident "
            "WHERE m.md5 = ? AND r.source LIKE 'lock %' LIMIT 1", md5,
        ))  # fmt: skip

    def sources(self, ident: str) -> list[tuple[str, str]]:
        """Return (source, stage) of every record of an execution: lock, commit or run cache."""
        return self._ask("SELECT source, stage FROM record WHERE ident = ? ORDER BY source", ident)

    def current(self, lock: str) -> dict[str, str]:
        """Return stage -> execution in a lock file of the checkout."""
        rows = self._ask("SELECT stage, ident FROM record WHERE source = ?", f"lock {lock}")
        return dict(rows)

    def current_of(self, stage: str) -> list[str]:
        """Return the executions of a stage that the lock files of the checkout name."""
        rows = self._ask(
            "SELECT DISTINCT e.ident FROM execution e JOIN record r ON r.ident = e.ident "
            "WHERE r.source LIKE 'lock %' AND e.command GLOB ? ORDER BY e.command",
            f"python -m tasks {stage} *",
        )
        return [row[0] for row in rows]

    def output(self, lock: str, path: str) -> str:
        """Return the md5 of an output in a lock file of the checkout; empty if it has none."""
        rows = self._ask(
            "SELECT m.md5 FROM made m JOIN record r ON r.ident = m.ident "
            "WHERE m.path = ? AND r.source = ?", path, f"lock {lock}",
        )  # fmt: skip
        return str(rows[0][0]) if rows else ""

    def of_command(self, command: str) -> list[str]:
        """Return the executions of a command; those in git first, in their order."""
        rows = self._ask(
            "SELECT e.ident FROM execution e LEFT JOIN record r ON r.ident = e.ident "
            "LEFT JOIN revision v ON r.source = 'commit ' || v.id WHERE e.command = ? "
            "GROUP BY e.ident ORDER BY MIN(v.rowid) IS NULL, MIN(v.rowid)", command,
        )  # fmt: skip
        return [row[0] for row in rows]

    def beginning_with(self, prefix: str) -> list[str]:
        """Return the md5 of every file whose md5 or fingerprint begins with some digits."""
        pattern = f"{prefix}*"
        found = self._ask("SELECT DISTINCT md5 FROM made WHERE md5 GLOB ? LIMIT 9", pattern)
        found += self._ask("SELECT DISTINCT md5 FROM used WHERE md5 GLOB ? LIMIT 9", pattern)
        found += self._ask("SELECT md5 FROM weights WHERE fingerprint GLOB ? LIMIT 9", pattern)
        return sorted({row[0] for row in found})

    def weights(self, md5: str) -> tuple[str, dict[str, Any]]:
        """Return fingerprint and header of a weights file; empty if no such file is at hand."""
        rows = self._ask("SELECT fingerprint, metadata FROM weights WHERE md5 = ?", md5)
        return (rows[0][0], json.loads(rows[0][1])) if rows else ("", {})

    def with_fingerprint(self, fingerprint: str) -> list[str]:
        """Return the md5 of the files that hold these weights."""
        rows = self._ask("SELECT md5 FROM weights WHERE fingerprint = ? ORDER BY md5", fingerprint)
        return [row[0] for row in rows]

    def counts(self) -> dict[str, int]:
        """Return how many executions and files are known."""
        ((executions,),) = self._ask("SELECT COUNT(*) FROM execution")
        ((files,),) = self._ask("SELECT COUNT(DISTINCT md5) FROM made")
        return {"executions": executions, "files": files}

    def _ask(self, question: str, *values: str) -> list[Any]:
        return self._database.execute(question, values).fetchall()

    def _open(self, path: Path) -> sqlite3.Connection:
        try:
            path.parent.mkdir(exist_ok=True)
            return _ready(path)
        except sqlite3.OperationalError:  # read-only, busy for too long
            return _ready(":memory:")
        except (OSError, sqlite3.DatabaseError):  # no database, or one that is torn
            with suppress(OSError):
                path.unlink()
                return _ready(path)
            return _ready(":memory:")

    # ----------------------------------------------------------------------------------------
    # Keeping it up to date

    def _refresh(self) -> None:
        known = dict(self._ask("SELECT name, mark FROM source"))
        self._refresh_history(known)
        self._refresh_locks(known)
        self._refresh_run_cache(known)
        self._refresh_weights()

    def _refresh_locks(self, known: dict[str, str]) -> None:
        names = self._records.lock_files()
        for name in names:
            text = (self._records.top / name).read_text()
            self._replace(known, f"lock {name}", _digest(text).hex(), chunks(text))
        for source in known:
            if source.startswith("lock ") and source.removeprefix("lock ") not in names:
                self._forget(source)

    def _refresh_history(self, known: dict[str, str]) -> None:
        mark = self._records.refs()
        if known.get("history") == mark:
            return
        for commit, date, author, subject, blobs in self._records.history():
            self._database.execute(
                "INSERT OR IGNORE INTO revision VALUES (?, ?, ?, ?)",
                (commit, date, author, subject),
            )
            for name, blob in blobs:
                if f"blob {name} {blob}" in known:
                    continue
                self._mark(f"blob {name} {blob}", commit)
                known[f"blob {name} {blob}"] = commit
                self._record(f"commit {commit}", chunks(self._records.blob(blob)))
        self._mark("history", mark)

    def _refresh_run_cache(self, known: dict[str, str]) -> None:
        present = set()
        for name in self._records.run_cache():
            source = f"run cache {name}"
            present.add(source)
            if source not in known:
                with suppress(OSError):
                    self._mark(source, "")
                    self._record(source, [("", self._records.remembered(name).read_text())])
        for source in known:
            if source.startswith("run cache ") and source not in present:
                self._forget(source)

    def _refresh_weights(self) -> None:
        """Read the headers of weights whose files are at hand.

        Looked for are the files of executions that are new here, and those that the lock files of
        the checkout name, which may have been fetched since.
        """
        rows = self._ask(
            "SELECT DISTINCT m.md5, m.path FROM record r JOIN made m ON m.ident = r.ident "
            "LEFT JOIN weights w ON w.md5 = m.md5 "
            "WHERE r.source LIKE 'lock %' AND w.md5 IS NULL AND m.path LIKE '%.safetensors'"
        )
        rows += self._fresh
        for md5, path in rows:
            if is_weights(path) and (stated := header(self._records.cached(md5))):
                self._database.execute(
                    "INSERT OR REPLACE INTO weights VALUES (?, ?, ?)",
                    (md5, stated.get("fingerprint", ""), json.dumps(stated)),
                )

    def _replace(
        self, known: dict[str, str], source: str, mark: str, found: Iterable[tuple[str, str]]
    ) -> None:
        if known.get(source) != mark:
            self._forget(source)
            self._mark(source, mark)
            self._record(source, found)

    def _record(self, source: str, found: Iterable[tuple[str, str]]) -> None:
        for stage, text in found:
            with suppress(InvalidInput):  # `verify` tells about an entry that cannot be read
                ident = self._ident(text)
                self._database.execute(
                    "INSERT OR IGNORE INTO record VALUES (?, ?, ?)", (source, stage, ident)
                )

    def _ident(self, text: str) -> str:
        """Return the execution of an entry, parsed if its text is new."""
        mark = _digest(text)
        rows = self._database.execute("SELECT ident FROM entry WHERE text = ?", (mark,)).fetchall()
        if rows:
            return str(rows[0][0])
        found = parsed(text)
        content = {name: getattr(found, name) for name in CONTENT}
        insert = self._database.execute
        insert("INSERT INTO entry VALUES (?, ?)", (mark, found.ident))
        insert(
            "INSERT OR IGNORE INTO execution VALUES (?, ?, ?)",
            (found.ident, found.command, json.dumps(content)),
        )
        self._fresh += [(md5, path) for path, md5 in found.outputs.items()]
        for table, files in (("made", found.outputs), ("used", found.inputs)):
            self._database.executemany(
                f"INSERT OR IGNORE INTO {table} VALUES (?, ?, ?)",
                [(md5, path, found.ident) for path, md5 in files.items()],
            )
        return found.ident

    def _forget(self, source: str) -> None:
        """Forget a source, and executions that nothing else records."""
        gone = [row[0] for row in self._ask("SELECT ident FROM record WHERE source = ?", source)]
        delete = self._database.execute
        delete("DELETE FROM record WHERE source = ?", (source,))
        delete("DELETE FROM source WHERE name = ?", (source,))
        for ident in gone:
            if not self._ask("SELECT 1 FROM record WHERE ident = ? LIMIT 1", ident):
                for table in ("execution", "made", "used", "entry"):
                    delete(f"DELETE FROM {table} WHERE ident = ?", (ident,))

    def _mark(self, source: str, mark: str) -> None:
        self._database.execute("INSERT OR REPLACE INTO source VALUES (?, ?)", (source, mark))


def header(path: Path) -> dict[str, Any]:
    """Return what a weights file states of itself; nothing if it is no file of taskvec."""
    try:
        return headers.read_metadata(headers.read_header(path), path)
    except (IncompatibleWeights, MissingArtifact, OSError):
        return {}


def _ready(path: Path | str) -> sqlite3.Connection:
    """Return the open database, empty if another version of this module made it."""
    database = sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None)
    with database:
        database.execute("BEGIN IMMEDIATE")
        (found,) = database.execute("PRAGMA user_version").fetchone()
        if found != VERSION:
            tables = database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
            for (name,) in tables.fetchall():
                database.execute(f"DROP TABLE {name}")
            for statement in TABLES.split(";"):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {VERSION}")
    return database


def _prefix(source: str) -> str:
    """Return the directory of an experiment from its lock file; empty for the repository's own."""
    name = source.removeprefix("lock ")
    return name.removesuffix("dvc.lock") if name.startswith(f"{EXPERIMENTS}/") else ""


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
