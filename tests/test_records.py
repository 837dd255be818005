"""Reading DVC's records without DVC gives what DVC reads."""

from pathlib import Path
from typing import Any

import pytest
from dvc.stage.cache import _get_cache_hash
from dvc.utils.serialize import dumps_yaml, loads_yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.records import Execution, Records, chunks, digest_of_entry, is_weights, parsed
from taskvec.errors import InvalidInput
from tests.project import ROOT

law = settings(deadline=None, max_examples=60)
words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1)
names = st.from_regex(r"[A-Za-z][A-Za-z0-9_@.-]{0,20}", fullmatch=True)
md5s = st.from_regex(r"[0-9a-f]{32}(\.dir)?", fullmatch=True)
scalars = st.one_of(
    st.integers(-(10**9), 10**9),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.booleans(),
    st.none(),
    words,
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner)),
    max_leaves=6,
)
files = st.dictionaries(names, md5s, max_size=4)


def listed(found: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {"path": path, "hash": "md5", "md5": md5, "size": 3, **({"nfiles": 2} if i else {})}
        for i, (path, md5) in enumerate(found.items())
    ]


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Any]:
    """Draw an entry of a lock file."""
    parts = {"deps": listed(draw(files)), "outs": listed(draw(files))}
    params = draw(st.dictionaries(names, st.dictionaries(names, values, max_size=3), max_size=2))
    kept = {key: value for key, value in {**parts, "params": params}.items() if value}
    return {"cmd": draw(words), **kept}


@law
@given(st.dictionaries(names, entries(), max_size=3))
def test_the_entries_of_a_lock_file_are_those_that_dvc_reads(stages: dict[str, Any]) -> None:
    text = dumps_yaml({"schema": "2.0", "stages": stages})
    theirs = loads_yaml(text)["stages"]
    found = {name: parsed(entry) for name, entry in chunks(text)}
    assert found.keys() == theirs.keys()
    for name, entry in theirs.items():
        one = found[name]
        assert one.command == entry["cmd"]
        assert one.inputs == {dep["path"]: dep["md5"] for dep in entry.get("deps", [])}
        assert one.outputs == {out["path"]: out["md5"] for out in entry.get("outs", [])}
        assert one.parameters == entry.get("params", {})


@law
@given(entries())
def test_an_entry_has_the_digest_that_the_run_cache_gives_it(entry: dict[str, Any]) -> None:
    text = dumps_yaml(entry)
    assert digest_of_entry(text) == _get_cache_hash(loads_yaml(text))
    assert parsed(text).ident == parsed(dumps_yaml({"a-stage": entry})).ident


@law
@given(entries(), st.data())
def test_another_entry_has_another_digest(entry: dict[str, Any], data: st.DataObject) -> None:
    other = data.draw(entries())
    same = parsed(dumps_yaml(entry)) == parsed(dumps_yaml(other))
    assert (parsed(dumps_yaml(entry)).ident == parsed(dumps_yaml(other)).ident) == same


@pytest.mark.parametrize("name", ["dvc.lock", "edits/dvc.lock", "experiments/addition/dvc.lock"])
def test_the_committed_lock_files_are_read_whole(name: str) -> None:
    text = (ROOT / name).read_text()
    found = {stage: parsed(entry) for stage, entry in chunks(text)}
    theirs = loads_yaml(text)["stages"]
    assert found.keys() == theirs.keys() and found
    assert all(found[stage].command == entry["cmd"] for stage, entry in theirs.items())


@pytest.mark.parametrize(
    "text",
    ["", "a: 1", "cmd: x\nouts: [{path: a}]", "cmd: x\ndeps: 3", "a: [", "stage:\n  deps: []"],
)
def test_what_is_no_entry_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="no entry of DVC"):
        parsed(text)


def test_a_stage_is_named_after_its_command() -> None:
    made = Execution("python -m tasks search addition-0", {}, {}, {})
    assert (made.stage, made.item, made.name) == ("search", "addition-0", "search addition-0")
    alone = Execution("python -m tasks pretrain", {}, {}, {})
    assert (alone.stage, alone.item) == ("pretrain", "")
    assert Execution("taskvec edit 'c * a'", {}, {}, {}).stage == "taskvec"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("data/checkpoints/mnist-0.safetensors", True),
        ("data/vectors/mnist-0.safetensors", True),
        ("data/edits/addition-0/basis.safetensors", True),
        ("data/edits/addition-0/search.csv", False),
        ("data/heads/mnist.safetensors", False),
        ("data/prepared/mnist/train.safetensors", False),
        ("checkpoints.safetensors", False),
    ],
)
def test_weights_are_told_from_other_files(path: str, expected: bool) -> None:
    assert is_weights(path) == expected


def test_the_cache_lies_where_the_configuration_says(tmp_path: Path) -> None:
    assert Records(tmp_path).cache == tmp_path / ".dvc" / "cache"
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[cache]\n    dir = ../elsewhere\n")
    assert Records(tmp_path).cache.resolve() == tmp_path / "elsewhere"
    (tmp_path / ".dvc" / "config.local").write_text("[cache]\n    dir = /far/away\n")
    assert Records(tmp_path).cached("abcdef") == Path("/far/away/files/md5/ab/cdef")


def test_a_directory_that_is_no_repository_has_no_history(tmp_path: Path) -> None:
    records = Records(tmp_path)
    assert records.lock_files() == [] and list(records.run_cache()) == []
    assert list(records.history()) == [] and records.at("HEAD", "dvc.lock") == ""
