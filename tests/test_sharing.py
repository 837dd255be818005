"""What one host has answered, another one need not."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.sharing import Shared
from taskvec.memo import Memo, key


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Shared, Shared]]:
    with Memo(tmp_path / "one.sqlite") as memo:
        memo.put(key(before=True), b"known")
    one, other = Shared(tmp_path / "one.sqlite"), Shared(tmp_path / "other.sqlite")
    yield one, other
    one.close()
    other.close()


def test_answers_travel_once_and_do_not_come_back(
    pair: tuple[Shared, Shared], tmp_path: Path
) -> None:
    one, other = pair
    assert one.new() == []  # what was known before is not told
    with Memo(tmp_path / "one.sqlite") as memo:
        for number in range(3):
            memo.put(key(number=number), bytes([number]))
    rows = one.new()
    assert len(rows) == 3 and one.new() == []
    other.receive(rows)
    assert other.new() == []
    with Memo(tmp_path / "other.sqlite") as memo:
        assert [memo.get(key(number=n)) for n in range(3)] == [b"\0", b"\1", b"\2"]
        memo.put(key(own=True), b"mine")
    one.receive(other.new())
    assert one.new() == []
    with Memo(tmp_path / "one.sqlite") as memo:
        assert memo.get(key(own=True)) == b"mine"


def test_what_is_known_is_not_replaced(pair: tuple[Shared, Shared], tmp_path: Path) -> None:
    one, other = pair
    with Memo(tmp_path / "other.sqlite") as memo:
        memo.put(key(a=1), b"theirs")
    rows = other.new()
    with Memo(tmp_path / "one.sqlite") as memo:
        memo.put(key(a=1), b"ours")
        one.receive(rows)
        assert memo.get(key(a=1)) == b"ours"
    (tmp_path / "one.sqlite").unlink()
    assert one.new() == []  # a memory may go at any time
