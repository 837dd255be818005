"""Modules found by their name: their options are read from the source, never by importing it."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

import taskvec.merging
from taskvec import plugins
from taskvec.plugins import (
    Misplaced,
    check_options,
    complete,
    constant,
    load,
    names,
    summary,
)

METHOD = '''"""A method (somebody, somewhere).

More words.
"""
from taskvec.options import Count, Fraction
from typing import Literal
import taskvec_does_not_exist

ORDERED = True
OPERANDS = 2
STATISTICS = ("fisher",)
SCALE: float = 3


def helper(x, *, other=1):
    return x


def toy(
    vectors,
    *,
    density: Fraction = 0.2,
    alpha: float = -1.0,
    count: Count = 3,
    how: Literal["a", "b"] = "a",
    only: Literal["x"] = "x",
    flag: bool = False,
    text: str = "t",
    free="f",
    parts: list[int] = [1],
    odd: complex = 1,
):
    return vectors


def needs(vectors, *, level: int):
    return vectors
'''


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a room of merging methods that holds what a test writes into it."""
    directory = tmp_path / "merging"
    directory.mkdir()
    monkeypatch.setattr(plugins, "__file__", str(tmp_path / "plugins.py"))
    (directory / "__init__.py").write_text('"""A room."""\n')
    (directory / "toy.py").write_text(METHOD)
    return directory


def misplaced(*arguments: Any) -> tuple[str, tuple[str | int, ...]]:
    with pytest.raises(Misplaced) as caught:
        complete("merging", *arguments)
    return str(caught.value), caught.value.place


def test_a_module_is_a_method_if_it_has_a_function_of_its_name(room: Path) -> None:
    (room / "helpers.py").write_text("def other(x): ...\nhelpers = 3\n")
    (room / "klass.py").write_text("class klass: ...\n")
    (room / "inner.py").write_text("if True:\n    def inner(x): ...\n")
    (room / "notes.txt").write_text("def notes(x): ...\n")
    (room / "needs.py").write_text(METHOD)
    assert names("merging") == ["needs", "toy"]


def test_other_rooms_have_a_function_of_a_fixed_name() -> None:
    assert {"mnist", "digits", "npz"} <= set(names("datasets"))
    assert "items" not in names("datasets")
    assert {"bundled", "open_clip"} <= set(names("models"))
    assert {"ties", "task_arithmetic", "slerp"} <= set(names("merging"))


def test_nothing_is_imported_to_read_options(room: Path) -> None:
    check_options("merging", "toy", {"density": 0.5, "how": "b", "flag": True})
    assert constant("merging", "toy", "OPERANDS", 0) == 2
    assert summary("merging", "toy") == "A method (somebody, somewhere)."
    assert "taskvec_does_not_exist" not in sys.modules
    assert "taskvec.merging.toy" not in sys.modules


def test_options_that_are_left_out_are_filled_in_with_their_defaults(room: Path) -> None:
    assert complete("merging", "toy", {}) == {
        "density": 0.2, "alpha": -1.0, "count": 3, "how": "a", "only": "x", "flag": False,
        "text": "t", "free": "f", "parts": [1], "odd": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"density": 1}, 1.0),
        ({"alpha": 2}, 2.0),
        ({"count": 5}, 5),
        ({"alpha": (1, 2.5, -3)}, (1.0, 2.5, -3.0)),
        ({"density": (1,)}, (1.0,)),
        ({"count": (1, 2)}, (1, 2)),
        ({"how": ("b", "a")}, ("b", "a")),
        ({"flag": True}, True),
        ({"parts": [2, 3]}, [2, 3]),
        ({"free": "g"}, "g"),
    ],
)
def test_whole_numbers_become_floats_where_a_float_is_wanted(
    room: Path, given: dict[str, Any], expected: Any
) -> None:
    (name,) = given
    found = complete("merging", "toy", given)[name]
    assert found == expected
    assert type(found) is type(expected)
    if isinstance(found, tuple):
        assert list(map(type, found)) == list(map(type, expected))


@pytest.mark.parametrize(
    ("given", "message", "place"),
    [
        ({"densty": 1}, "unknown key; toy takes density, alpha, count", "densty"),
        ({"vectors": 1}, "unknown key", "vectors"),
        ({"density": 0}, "expected a number above 0 and at most 1, found 0", "density"),
        ({"density": (0.5, 2)}, "expected a number above 0 and at most 1, found 2", "density"),
        ({"density": (2, 0.5)}, "found 2", "density"),
        ({"alpha": "1"}, "expected float, found '1'", "alpha"),
        ({"alpha": True}, "expected float, found True", "alpha"),
        ({"alpha": (1, True)}, "expected float, found True", "alpha"),
        ({"count": 1.0}, "expected int, found 1.0", "count"),
        ({"count": 0}, "expected a number at least 1, found 0", "count"),
        ({"how": "c"}, "expected one of 'a', 'b', found 'c'", "how"),
        ({"only": "y"}, "expected one of 'x', found 'y'", "only"),
        ({"flag": 1}, "expected bool, found 1", "flag"),
        ({"text": 1}, "expected str, found 1", "text"),
        ({"free": 1}, "expected str, found 1", "free"),
        ({"parts": 1}, "expected list, found 1", "parts"),
    ],
)
def test_wrong_options_are_named(
    room: Path, given: dict[str, Any], message: str, place: str
) -> None:
    found, where = misplaced("toy", given)
    assert message in found
    assert where == ("options", place)


def test_options_without_a_default_are_required(room: Path) -> None:
    (room / "needs.py").write_text(METHOD)
    assert complete("merging", "needs", {"level": 3}) == {"level": 3}
    assert misplaced("needs", {}) == ("needs needs level", ("method",))


def test_unknown_modules_are_refused_with_the_nearest_names(room: Path) -> None:
    message, place = misplaced("toi", {})
    assert "no module taskvec/merging/toi.py; did you mean 'toy'?" in message
    assert place == ("method",)
    for where, key in (("datasets", "dataset"), ("models", "family")):
        with pytest.raises(Misplaced, match=f"no module taskvec/{where}/x.py") as caught:
            check_options(where, "x", {})
        assert caught.value.place == (key,)


@pytest.mark.parametrize(
    ("key", "value"),
    [("ORDERED", True), ("OPERANDS", 2), ("STATISTICS", ("fisher",)), ("MISSING", "default")],
)
def test_constants_are_read_from_the_source(room: Path, key: str, value: Any) -> None:
    assert constant("merging", "toy", key, "default") == value


def test_what_is_not_there_has_no_constants_and_no_summary(room: Path) -> None:
    assert constant("merging", "nobody", "ORDERED", False) is False
    assert summary("merging", "nobody") == ""
    (room / "silent.py").write_text("def silent(x): ...\n")
    assert summary("merging", "silent") == ""


def test_a_change_of_the_source_is_seen(room: Path) -> None:
    assert constant("merging", "toy", "OPERANDS", 0) == 2
    path = room / "toy.py"
    path.write_text(METHOD.replace("OPERANDS = 2", "OPERANDS = 3"))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert constant("merging", "toy", "OPERANDS", 0) == 3
    path.unlink()
    assert names("merging") == []


def test_a_module_is_imported_by_its_name_and_only_if_it_is_a_method() -> None:
    assert load("merging", "ties").ties.__name__ == "ties"
    with pytest.raises(ValueError, match="unknown merging module 'tise'; did you mean 'ties'"):
        load("merging", "tise")
    with pytest.raises(ValueError, match="unknown merging module"):
        load("merging", "../errors")


def test_a_new_method_needs_nothing_but_its_module(
    room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from taskvec.expressions import parse

    (room / "novel.py").write_text(
        '"""Novel."""\n\n\ndef novel(vectors, *, power: float = 2):\n    return vectors\n'
    )
    monkeypatch.setattr(taskvec.merging, "__path__", [str(room)])
    monkeypatch.delitem(sys.modules, "taskvec.merging.novel", raising=False)
    assert load("merging", "novel").novel(3) == 3
    assert str(parse("c * novel(b, a)", "ab", "c")) == "c * novel(a, b, power=2.0)"
    monkeypatch.delitem(sys.modules, "taskvec.merging.novel")


def test_a_published_method_names_its_source_and_has_the_published_defaults() -> None:
    assert "arXiv:2306.01708" in summary("merging", "ties")
    assert complete("merging", "ties", {}) == {"density": 0.2, "variant": "mean", "scope": "flat"}
    with pytest.raises(Misplaced, match="tall_mask needs task"):
        complete("merging", "tall_mask", {})
