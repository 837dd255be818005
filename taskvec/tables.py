"""The tables that cross stage borders, as pandera schemas; checked whenever one is read or written.

Shares (accuracy, ratio) are fractions in [0, 1] unless a ratio exceeds 1; counts are items.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pandera.pandas as pa
from pandera.errors import SchemaErrors
from pandera.typing import Series

from taskvec.atomic import write_text
from taskvec.errors import InvalidData, MissingArtifact

SPLITS = ["train", "validation", "test"]
TEXT = ("split", "group", "digest", "model", "task", "subset", "kind", "start")


class Table(pa.DataFrameModel):
    """What all tables have in common: exactly the declared columns, right types."""

    class Config:
        """Strict, typed."""

        strict = True
        coerce = True
        unique_column_names = True

    @pa.dataframe_check(error="numbers must be finite")
    def _finite(cls, table: pd.DataFrame) -> Any:
        return ~np.isinf(table.select_dtypes("float")).any(axis=1)  # NaN: see nullable


class Items(Table):
    """Every item of a task; the splits share none."""

    item: Series[int] = pa.Field(ge=0, description="position in its split")
    split: Series[str] = pa.Field(isin=SPLITS)
    group: Series[str] = pa.Field(description="items of one group never cross splits")
    label: Series[int] = pa.Field(ge=0)
    digest: Series[str] = pa.Field(str_matches=r"^[0-9a-f]{64}$", description="of the pixels")
    alignment: Series[bool] = pa.Field(description="one of the pictures that align the base")
    classes: Series[int] | None = pa.Field(
        ge=2, description="of the head, where not all of them occur in the data"
    )

    @pa.dataframe_check(error="an item is in two splits")
    def _disjoint(cls, table: pd.DataFrame) -> Any:
        return table.groupby("digest")["split"].transform("nunique") == 1

    @pa.dataframe_check(error="a group is in two splits")
    def _groups_disjoint(cls, table: pd.DataFrame) -> Any:
        return table.groupby("group")["split"].transform("nunique") == 1

    @pa.dataframe_check(error="alignment pictures must be training items")
    def _alignment_trains(cls, table: pd.DataFrame) -> Any:
        return ~table["alignment"] | (table["split"] == "train")

    @pa.dataframe_check(error="labels must be dense: 0 to the number of classes - 1")
    def _dense(cls, table: pd.DataFrame) -> Any:
        if "classes" in table:
            return table["label"] < table["classes"]
        found = set(table["label"])
        return bool(found) and found == set(range(len(found)))


class Training(Table):
    """The fine-tuning curve of one task."""

    step: Series[int] = pa.Field(ge=1, unique=True)
    loss: Series[float] = pa.Field(ge=0, description="cross-entropy of the batch, nats")
    learning_rate: Series[float] = pa.Field(ge=0)


class Search(Table):
    """Everything that a search evaluated, in order, on validation data.

    Beside these columns: ``coefficient.NAME`` (``coefficient.NAME@LAYER`` where layers have values
    of their own), ``option.METHOD.NAME`` for an option that has several values, and for each task
    of the objective and of the constraint ``accuracy.TASK``, ``loss.TASK`` (mean cross-entropy in
    nats) and ``ratio.TASK`` (to the pre-trained model's accuracy). A strategy may look at a part of
    the items first: such a row has ``complete`` false, and only complete rows can be compared.
    """

    point: Series[int] = pa.Field(ge=0, unique=True)
    coefficient: Series[float] = pa.Field(alias=r"^coefficient\..+$", regex=True)
    option: Series[object] | None = pa.Field(alias=r"^option\..+$", regex=True)
    accuracy: Series[float] = pa.Field(alias=r"^accuracy\..+$", regex=True, ge=0, le=1)
    loss: Series[float] = pa.Field(alias=r"^loss\..+$", regex=True, ge=0)
    ratio: Series[float] = pa.Field(alias=r"^ratio\..+$", regex=True, ge=0, nullable=True)
    objective: Series[float] = pa.Field(description="the value that is made large or small")
    items: Series[int] = pa.Field(ge=1, description="validation items asked, over all tasks")
    complete: Series[bool] = pa.Field(description="these are all validation items")
    feasible: Series[bool] = pa.Field(description="the constraint holds, or there is none")
    not_worse: Series[bool] = pa.Field(
        description="complete, feasible and not significantly worse than the chosen one"
    )
    chosen: Series[bool]

    @pa.check("chosen", error="exactly one point must be chosen")
    def _one(cls, chosen: Any) -> bool:
        return int(chosen.sum()) == 1

    @pa.dataframe_check(error="only complete points can be chosen or compared")
    def _compared(cls, table: pd.DataFrame) -> Any:
        return table["complete"] | ~(table["chosen"] | table["not_worse"])


class Evaluation(Table):
    """How models do on tasks: one row a model, task and split."""

    model: Series[str] = pa.Field(
        description="pretrained, finetuned or the name of a variant or an edit"
    )
    seed: Series[int] = pa.Field(ge=0)
    task: Series[str]
    split: Series[str] = pa.Field(isin=["validation", "test"])
    items: Series[int] = pa.Field(ge=1)
    correct: Series[int] = pa.Field(ge=0)
    accuracy: Series[float] = pa.Field(ge=0, le=1)
    low: Series[float] = pa.Field(ge=0, le=1, description="Wilson interval, 95 %, lower end")
    high: Series[float] = pa.Field(ge=0, le=1, description="Wilson interval, 95 %, upper end")
    loss: Series[float] = pa.Field(ge=0, description="mean cross-entropy, nats")
    loss_low: Series[float] = pa.Field(ge=0, description="normal interval, 95 %, lower end")
    loss_high: Series[float] = pa.Field(ge=0, description="normal interval, 95 %, upper end")
    normalized: Series[float] = pa.Field(ge=0, description="accuracy / fine-tuned accuracy")
    ratio: Series[float] = pa.Field(
        ge=0, nullable=True, description="accuracy / pre-trained accuracy"
    )
    chance: Series[float] = pa.Field(gt=0, lt=1, description="1 / classes")

    @pa.dataframe_check(error="a model, task, split and seed stand twice")
    def _unique(cls, table: pd.DataFrame) -> Any:
        return ~table.duplicated(["model", "seed", "task", "split"], keep=False)

    @pa.dataframe_check(error="accuracy must be correct / items, inside its interval")
    def _consistent(cls, table: pd.DataFrame) -> Any:
        exact = (table["accuracy"] - table["correct"] / table["items"]).abs() < 1e-12
        inside = (table["low"] <= table["accuracy"]) & (table["accuracy"] <= table["high"])
        return exact & inside

    @pa.dataframe_check(error="the loss must be inside its interval")
    def _loss_inside(cls, table: pd.DataFrame) -> Any:
        return (table["loss_low"] <= table["loss"]) & (table["loss"] <= table["loss_high"])


def check(table: pd.DataFrame, schema: type[Table], name: str) -> pd.DataFrame:
    """Return the table if it satisfies its schema.

    Raises:
        InvalidData: it does not; the message lists the first failure cases.
    """
    try:
        checked = schema.validate(table, lazy=True)
    except SchemaErrors as errors:
        cases = errors.failure_cases.drop_duplicates(["check", "index"])
        columns = ["column", "check", "failure_case", "index"]
        raise InvalidData(
            f"{name} breaks the schema {schema.__name__} in {len(cases)} places; the first:\n"
            + cases[columns].head(5).to_string(index=False)
        ) from None
    _refuse_conversions(table, checked, name)
    return checked


def _refuse_conversions(before: pd.DataFrame, after: pd.DataFrame, name: str) -> None:
    """Refuse a column whose values the schema's type would change: 1.5 is no count."""
    for column in before:
        empty = before[column].isna() & after[column].isna()
        changed = ((before[column] != after[column]) & ~empty).to_numpy()
        if changed.any():
            row = int(changed.argmax())
            raise InvalidData(
                f"{name}: {column} is {before[column].tolist()[row]!r} in row {row}; "
                f"expected {after[column].dtype}"
            )


def write(path: Path, table: pd.DataFrame, schema: type[Table]) -> None:
    """Check a table and write it as CSV, all or nothing."""
    text = check(table, schema, path.name).to_csv(index=False, lineterminator="\n")
    write_text(path, text)


def read(path: Path, schema: type[Table]) -> pd.DataFrame:
    """Read a CSV written by `write` and check it again."""
    if not path.is_file():
        raise MissingArtifact(f"{path} does not exist; `taskvec run` makes it")
    # A group 007 is no number and a task may be called nan: names are read as they stand.
    table = pd.read_csv(path, dtype=dict.fromkeys(TEXT, str), keep_default_na=False, na_values=[""])
    return check(table, schema, path.name)
