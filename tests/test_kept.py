"""What a process keeps between stages is what it would make anew."""

import os
from pathlib import Path

import pandas as pd
import pytest

from tasks import kept


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return the list of what `length` and `doubled` were really asked for."""
    monkeypatch.setattr(kept, "_made", type(kept._made)())
    _calls.clear()
    return _calls


_calls: list[object] = []


def length(path: Path) -> int:
    _calls.append(path)
    return len(path.read_bytes())


def doubled(table: pd.DataFrame, *, times: int = 2) -> str:
    _calls.append(times)
    return str(table * times)


def test_a_file_is_read_again_only_if_it_changed(calls: list[object], tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("four")
    assert [kept.once(length, path, files=[path]) for _ in range(3)] == [4, 4, 4]
    assert calls == [path]
    path.write_text("sevens!")
    assert kept.once(length, path, files=[path]) == 7
    new = tmp_path / "new"  # as stages write: another file of the same name, even of that time
    new.write_text("another")
    os.utime(new, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    new.replace(path)
    assert kept.once(length, path, files=[path]) == 7
    assert len(calls) == 3
    path.unlink()
    with pytest.raises(FileNotFoundError):
        kept.once(length, path, files=[path])


def test_other_arguments_are_something_else(calls: list[object]) -> None:
    table = pd.DataFrame({"a": [1.0, 2.0]})
    assert kept.once(doubled, table) == kept.once(doubled, table.copy()) == str(table * 2)
    assert calls == [2]
    assert kept.once(doubled, table, times=3) == str(table * 3)
    table.loc[1, "a"] = 5.0
    assert kept.once(doubled, table) == str(table * 2)
    assert calls == [2, 3, 2]


def test_not_everything_is_kept_for_ever(
    calls: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "MADE", 2)
    table = pd.DataFrame({"a": [1]})
    for times in (1, 2, 1, 3, 1, 2):
        kept.once(doubled, table, times=times)
    assert calls == [1, 2, 3, 2]
