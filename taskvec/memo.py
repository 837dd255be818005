"""A memory of answers, so that no search asks twice: a SQLite file that several processes share.

It is no cache of a stage: an entry is found by a digest of everything that decides it, so that
deleting the file changes no byte of any output. An entry that does not read back as it was written
is not used; a file that is no database is put aside; where no file can be had, nothing is
remembered.
"""

import hashlib
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeVar

from taskvec.headers import canonical

WAIT_SECONDS = 30.0
PAUSE_SECONDS = 0.02
DIGEST = 8  # bytes
NO_DATABASE = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
Result = TypeVar("Result")


def key(**parts: object) -> bytes:
    """Return the digest of what decides an answer; the parts are what JSON can hold."""
    return hashlib.sha256(canonical(parts).encode()).digest()


class Memo:
    """Bytes by key. Any number of processes and threads may share it."""

    def __init__(self, path: Path | None) -> None:
        """Open or create the file; None remembers nothing."""
        self._connection = _opened(path) if path else None
        self._lock = threading.Lock()  # a transaction belongs to the connection, not to a thread

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def get(self, found_by: bytes) -> bytes | None:
        """Return what is remembered under a key, if anything is."""
        with self._lock:
            if self._connection is None:
                return None
            try:
                row = self._connection.execute(
                    "SELECT value FROM answers WHERE key = ?", (found_by,)
                ).fetchone()
            except sqlite3.DatabaseError:
                return None
        return _read(row[0], found_by) if row else None

    def put(self, found_by: bytes, content: bytes) -> None:
        """Remember something; it replaces an entry that cannot be read."""
        with self._lock:
            if self._connection is None:
                return
            try:
                with self._connection:
                    self._connection.execute(
                        "INSERT OR REPLACE INTO answers VALUES (?, ?)",
                        (found_by, _digest(content, found_by) + content),
                    )
            except sqlite3.DatabaseError:  # busy for too long, disk full: it is only a memory
                return

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None


def _opened(path: Path) -> sqlite3.Connection | None:
    """Return the open database; a file that is none is renamed to ``.broken``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return _patiently(lambda: _open(path))
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode & 0xFF not in NO_DATABASE:
                raise
            path.replace(path.with_suffix(".broken"))
            return _patiently(lambda: _open(path))
    except (OSError, sqlite3.DatabaseError):
        return None


def _patiently(open_: Callable[[], Result]) -> Result:
    """Call until the file is not busy: SQLite does not wait when it changes the journal's mode."""
    end = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return open_()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in BUSY or time.monotonic() > end:
                raise
            time.sleep(PAUSE_SECONDS)


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=WAIT_SECONDS, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose the newest entries
        connection.execute("CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, value BLOB)")
    except sqlite3.DatabaseError:
        connection.close()
        raise
    return connection


def _read(value: object, found_by: bytes) -> bytes | None:
    if not isinstance(value, bytes) or len(value) < DIGEST:
        return None
    digest, content = value[:DIGEST], value[DIGEST:]
    return content if digest == _digest(content, found_by) else None


def _digest(content: bytes, found_by: bytes) -> bytes:
    return hashlib.sha256(found_by + content).digest()[:DIGEST]
