"""The memory of answers: what went in comes out, or nothing does."""

import multiprocessing
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvec import memo
from taskvec.memo import Memo

KEYS = st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=3)


@given(st.dictionaries(st.binary(min_size=1, max_size=4), st.binary(max_size=40), max_size=8))
def test_what_was_remembered_is_found_under_its_key_alone(
    tmp_path_factory: pytest.TempPathFactory, content: dict[bytes, bytes]
) -> None:
    path = tmp_path_factory.mktemp("memo") / "below" / "answers.sqlite"
    with Memo(path) as memory:
        for key, value in content.items():
            memory.put(key, value)
        assert {key: memory.get(key) for key in content} == content
        assert memory.get(b"another") is None
    with Memo(path) as memory:
        assert {key: memory.get(key) for key in content} == content


@given(KEYS, KEYS)
def test_a_key_depends_on_everything_and_on_no_order(one: dict, other: dict) -> None:  # type: ignore[type-arg]
    same = memo.key(weights=one) == memo.key(weights=dict(reversed(one.items())))
    assert same
    assert (memo.key(weights=one) == memo.key(weights=other)) == (one == other)


def test_no_file_remembers_nothing() -> None:
    with Memo(None) as memory:
        memory.put(b"key", b"value")
        assert memory.get(b"key") is None


def test_where_no_file_can_be_nothing_is_remembered(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "answers.sqlite", tmp_path):
        with Memo(path) as memory:
            memory.put(b"key", b"value")
            assert memory.get(b"key") is None


def test_a_file_that_is_no_database_is_put_aside(tmp_path: Path) -> None:
    path, content = tmp_path / "answers.sqlite", b"no database at all, but as long as one" * 9
    path.write_bytes(content)
    with Memo(path) as memory:
        memory.put(b"key", b"value")
        assert memory.get(b"key") == b"value"
    assert (tmp_path / "answers.broken").read_bytes() == content


@pytest.mark.parametrize("damage", ["flipped", "short", "text", "moved"])
def test_an_entry_that_is_not_as_it_was_written_is_not_used_and_is_replaced(
    tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "answers.sqlite"
    with Memo(path) as memory:
        memory.put(b"key", b"value")
        memory.put(b"other", b"another value")
    connection = sqlite3.connect(path)
    stored = connection.execute("SELECT value FROM answers WHERE key = ?", (b"key",)).fetchone()[0]
    other = connection.execute("SELECT value FROM answers WHERE key = ?", (b"other",)).fetchone()[0]
    changed: bytes | str = {
        "flipped": stored[:-1] + bytes([stored[-1] ^ 1]), "short": stored[:3], "text": "value",
        "moved": other,
    }[damage]  # fmt: skip
    with connection:
        connection.execute("UPDATE answers SET value = ? WHERE key = ?", (changed, b"key"))
    connection.close()
    with Memo(path) as memory:
        assert memory.get(b"key") is None
        memory.put(b"key", b"value")
        assert memory.get(b"key") == b"value"


def write(path: Path, start: int) -> None:
    with Memo(path) as memory:
        for number in range(start, start + 60):
            memory.put(memo.key(number=number), str(number).encode() * 50)


def test_processes_that_write_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    context = multiprocessing.get_context("fork")
    # overlapping, and all of them make the file
    processes = [context.Process(target=write, args=(path, start)) for start in (0, 30, 60)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert list(tmp_path.glob("*.broken")) == []
    with Memo(path) as memory:
        for number in range(120):
            assert memory.get(memo.key(number=number)) == str(number).encode() * 50


def test_threads_share_a_memory(tmp_path: Path) -> None:
    with Memo(tmp_path / "answers.sqlite") as memory, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: memory.put(memo.key(n=n), bytes([n])), range(200)))
        found = list(pool.map(lambda n: memory.get(memo.key(n=n)), range(200)))
    assert found == [bytes([n]) for n in range(200)]


def test_a_reader_goes_on_while_another_writes_and_a_closed_memory_is_silent(
    tmp_path: Path,
) -> None:
    path = tmp_path / "answers.sqlite"
    with Memo(path) as one, Memo(path) as other:
        one.put(b"a", b"1")
        assert other.get(b"a") == b"1"
        other.put(b"b", b"2")
        assert one.get(b"b") == b"2"
    one.put(b"c", b"3")
    assert one.get(b"a") is None
