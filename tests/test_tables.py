"""The tables between stages: good ones pass unchanged, every planted fault is named."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskvec.atomic import write_text
from taskvec.errors import InvalidData, MissingArtifact
from taskvec.tables import Evaluation, Items, Search, Table, Training, check, read, write

GOOD: dict[type[Table], dict[str, list[Any]]] = {
    Items: {
        "item": [0, 1, 0, 0],
        "split": ["train", "train", "validation", "test"],
        "group": ["007", "NA", "nan", 'a, "b"'],
        "label": [0, 1, 1, 0],
        "digest": [digit * 64 for digit in "0a1b"],
        "alignment": [True, False, False, False],
    },
    Training: {"step": [1, 2], "loss": [2.3, 0.1 + 0.2], "learning_rate": [0.0, 1e-5]},
    Search: {
        "point": [0, 1],
        "coefficient.c": [0.0, 1.0],
        "items": [100, 200],
        "complete": [False, True],
        "accuracy.mnist": [0.25, 0.5],
        "ratio.mnist": [1.0, 2.0],
        "loss.mnist": [2.0, 1.5],
        "objective": [0.25, 0.5],
        "feasible": [True, True],
        "not_worse": [False, True],
        "chosen": [False, True],
    },
    Evaluation: {
        "model": ["pretrained", "null"],
        "seed": [0, 0],
        "task": ["mnist", "Infinity"],
        "split": ["test", "validation"],
        "items": [3, 4],
        "correct": [1, 4],
        "accuracy": [1 / 3, 1.0],
        "low": [0.06, 0.51],
        "high": [0.8, 1.0],
        "loss": [1.7, 0.0],
        "loss_low": [0.9, 0.0],
        "loss_high": [2.5, 0.1],
        "normalized": [0.5, 1.25],
        "ratio": [1.0, 3.0],
        "chance": [0.1, 0.5],
    },
}
SCHEMAS = pytest.mark.parametrize("schema", GOOD, ids=lambda schema: schema.__name__)


def table(schema: type[Table], **changes: list[Any] | None) -> pd.DataFrame:
    columns = {**GOOD[schema], **{name.replace("__", "."): v for name, v in changes.items()}}
    return pd.DataFrame({name: value for name, value in columns.items() if value is not None})


@SCHEMAS
def test_a_good_table_comes_back_as_it_was_written(tmp_path: Path, schema: type[Table]) -> None:
    path = tmp_path / "made" / "table.csv"
    write(path, table(schema), schema)
    pd.testing.assert_frame_equal(read(path, schema), table(schema), check_exact=True)
    first = path.read_bytes()
    write(path, read(path, schema), schema)
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["table.csv"]


@pytest.mark.parametrize("schema", [Search, Evaluation], ids=lambda schema: schema.__name__)
def test_a_ratio_to_nothing_is_empty(tmp_path: Path, schema: type[Table]) -> None:
    (name,) = (column for column in table(schema).columns if column.startswith("ratio"))
    path, empty = tmp_path / "table.csv", table(schema).assign(**{name: [math.nan, 1.0]})
    write(path, empty, schema)
    pd.testing.assert_frame_equal(read(path, schema), empty, check_exact=True)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=20))
def test_floats_survive_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, losses: list[float]
) -> None:
    path = tmp_path_factory.mktemp("floats") / "table.csv"
    steps = list(range(1, len(losses) + 1))
    frame = table(Training, step=steps, loss=losses, learning_rate=losses)
    write(path, frame, Training)
    assert read(path, Training)["loss"].tolist() == losses


@SCHEMAS
def test_a_column_too_few_too_many_or_twice_is_refused(schema: type[Table]) -> None:
    good = table(schema)
    name = str(good.columns[-1])
    with pytest.raises(InvalidData, match=name):
        check(good.drop(columns=name), schema, "table.csv")
    with pytest.raises(InvalidData, match="surplus"):
        check(good.assign(surplus=1), schema, "table.csv")
    with pytest.raises(InvalidData, match=r"labels_unique[\s\S]*" + name):
        check(pd.concat([good, good[[name]]], axis=1), schema, "table.csv")


@SCHEMAS
def test_missing_values_are_refused(schema: type[Table]) -> None:
    for name in table(schema).columns:
        if name.startswith("ratio"):
            continue  # empty where the pre-trained model is never right
        damaged = table(schema).astype({name: object})
        damaged.loc[1, name] = None
        with pytest.raises(InvalidData, match=r"places; the first|is None in row 1"):
            check(damaged, schema, "table.csv")


@pytest.mark.parametrize(
    ("schema", "changes", "message"),
    [
        (Items, {"digest": ["0" * 64, "a" * 64, "0" * 64, "b" * 64]}, "an item is in two splits"),
        (Items, {"group": ["x", "y", "y", "z"]}, "a group is in two splits"),
        (Items, {"alignment": [False, False, True, False]}, "must be training items"),
        (Items, {"label": [0, 2, 2, 0]}, "labels must be dense"),
        (Items, {"label": [0, 10**12, 1, 0]}, "labels must be dense"),
        (Items, {"label": [0, -1, 1, 0]}, "label.*-1"),
        (Items, {"label": [0, 0.5, 1, 0]}, "label is 0.5 in row 1; expected int64"),
        (Items, {"item": [0, -1, 0, 0]}, "item.*-1"),
        (Items, {"item": [0, "one", 0, 0]}, "item.*one"),
        (Items, {"split": ["train", "dev", "validation", "test"]}, "split.*dev"),
        (Items, {"digest": ["0" * 64, "A" * 64, "1" * 64, "b" * 64]}, "digest.*AAAA"),
        (Items, {"group": [1, 2, 3, 4]}, "group is 1 in row 0; expected str"),
        (Items, {"alignment": ["True", "", "", ""]}, "alignment is 'True' in row 0"),
        (Items, {name: [] for name in GOOD[Items]}, "labels must be dense"),
        (Training, {"step": [1, 1]}, "step.*unique"),
        (Training, {"step": [0, 1]}, "step.*0"),
        (Training, {"loss": [-0.1, 1.0]}, "loss.*-0.1"),
        (Training, {"loss": [math.inf, 1.0]}, "numbers must be finite"),
        (Training, {"loss": [1.0, math.nan]}, "loss.*not_nullable"),
        (Training, {"learning_rate": [0.1, -1.0]}, "learning_rate.*-1"),
        (Search, {"chosen": [False, False]}, "exactly one point must be chosen"),
        (Search, {"chosen": [True, True]}, "exactly one point must be chosen"),
        (Search, {"point": [1, 1]}, "point.*unique"),
        (Search, {"accuracy__mnist": [0.5, 1.01]}, "accuracy.mnist.*1.01"),
        (Search, {"accuracy__mnist": None}, "accuracy"),
        (Search, {"ratio__mnist": [-1.0, 1.0]}, "ratio.mnist.*-1"),
        (Search, {"coefficient__c": [math.inf, 0.0]}, "numbers must be finite"),
        (Evaluation, {"model": ["x", "x"], "task": ["t", "t"], "split": ["test", "test"]}, "twice"),
        (Evaluation, {"split": ["test", "train"]}, "split.*train"),
        (Evaluation, {"correct": [2, 4]}, "accuracy must be correct / items"),
        (Evaluation, {"accuracy": [0.3333, 1.0]}, "accuracy must be correct / items"),
        (Evaluation, {"low": [0.4, 0.51]}, "inside its interval"),
        (Evaluation, {"high": [0.3, 1.0]}, "inside its interval"),
        (Evaluation, {"items": [0, 4]}, "items.*0"),
        (Evaluation, {"loss": [-0.1, 0.0], "loss_low": [-0.2, 0.0]}, "loss.*-0.1"),
        (Evaluation, {"loss": [0.8, 0.0]}, "the loss must be inside its interval"),
        (Evaluation, {"loss_high": [1.6, 0.1]}, "the loss must be inside its interval"),
        (Evaluation, {"loss_high": [math.inf, 0.1]}, "numbers must be finite"),
        (Evaluation, {"seed": [-1, 0]}, "seed.*-1"),
        (Evaluation, {"chance": [0.0, 0.5]}, "chance.*0"),
        (Evaluation, {"normalized": [math.inf, 1.0]}, "numbers must be finite"),
    ],
)
def test_planted_faults_are_refused_with_the_case(
    tmp_path: Path, schema: type[Table], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidData, match=message) as caught:
        write(tmp_path / "table.csv", table(schema, **changes), schema)
    assert caught.value.exit_code == 3
    assert "table.csv" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_integers_may_stand_for_floats() -> None:
    checked = check(table(Search, coefficient__c=[0, 1]), Search, "table.csv")
    assert checked["coefficient.c"].tolist() == [0.0, 1.0]


OPTIONS = {
    "option.ties.density": [0.1, 0.25],
    "option.ties.variant": ["sum", "nan"],
    "option.dare.seed": [-1, 12],
    "option.some.flag": [True, False],
}


def test_a_search_may_have_columns_of_options_of_any_type(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write(path, table(Search).assign(**OPTIONS), Search)
    found = read(path, Search)
    for name, values in OPTIONS.items():
        assert found[name].tolist() == values
        assert [type(value) for value in found[name]] == [type(value) for value in values]
    first = path.read_bytes()
    write(path, found, Search)
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("option.ties.density", [0.1, None], r"places; the first|is None|is nan in row 1"),
        ("option.", [0.1, 0.2], "option"),
        ("options.density", [0.1, 0.2], "options.density"),
    ],
)
def test_columns_of_options_are_checked(name: str, values: list[Any], message: str) -> None:
    with pytest.raises(InvalidData, match=message):
        check(table(Search).assign(**{name: values}), Search, "table.csv")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write(path, table(Training), Training)
    path.write_text(path.read_text().replace("2.3", "minus"))
    with pytest.raises(InvalidData, match="minus"):
        read(path, Training)
    write(path, table(Items), Items)
    path.write_text(path.read_text().replace("False", "no"))
    with pytest.raises(InvalidData, match="alignment"):
        read(path, Items)


def test_a_missing_table_is_a_missing_artifact(tmp_path: Path) -> None:
    with pytest.raises(MissingArtifact, match="does not exist") as caught:
        read(tmp_path / "no.csv", Training)
    assert caught.value.exit_code == 5


def test_text_is_replaced_as_a_whole_and_in_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.json"
    write_text(path, "λ = 1\n")
    assert path.read_bytes() == b"\xce\xbb = 1\n"

    def interrupt(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupt)
        with pytest.raises(OSError, match="no space"):
            write_text(path, "λ = 2\n")
    assert path.read_text(encoding="utf-8") == "λ = 1\n"
    assert list(tmp_path.iterdir()) == [path]
