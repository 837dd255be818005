"""The tables of studies: sweeps over many edits, and fine-tuning on a few images."""

from typing import Any

import pandas as pd
import pandera.pandas as pa
from pandera.typing import Series

from taskvec.metrics import wilson_interval
from taskvec.tables import Table

KINDS = ["merged", "ensemble", "ensemble_finetuned"]
EVALUATED = ["validation", "test"]


class SweepTable(Table):
    """Everything that a sweep evaluated on validation data: one row a subset and coefficient.

    Beside these columns ``accuracy.TASK`` for each task, empty where it was not evaluated.
    """

    subset: Series[str] = pa.Field(description="whose vectors are summed: a+b, sorted")
    size: Series[int] = pa.Field(ge=1, description="how many vectors are summed")
    coefficient: Series[float] = pa.Field(description="c in theta_0 + c * sum")
    screen: Series[bool] = pa.Field(description="only a few images of each task were used")
    items: Series[int] = pa.Field(ge=1, description="images that were used, over all tasks")
    accuracy: Series[float] = pa.Field(
        alias=r"^accuracy\..+$", regex=True, ge=0, le=1, nullable=True
    )
    objective: Series[float] = pa.Field(
        ge=0, description="mean of accuracy / fine-tuned accuracy over the tasks"
    )
    chosen: Series[bool] = pa.Field(description="the coefficient that is taken for this subset")

    @pa.dataframe_check(error="a subset, coefficient and screen stand twice", ignore_na=False)
    def _unique(cls, table: pd.DataFrame) -> Any:
        return ~table.duplicated(["subset", "coefficient", "screen"], keep=False)

    @pa.dataframe_check(error="size must be the number of vectors in subset", ignore_na=False)
    def _counted(cls, table: pd.DataFrame) -> Any:
        return table["subset"].str.count(r"\+") + 1 == table["size"]

    @pa.dataframe_check(
        error="a subset has one chosen row, without screen, unless it was only screened",
        ignore_na=False,
    )
    def _one_chosen(cls, table: pd.DataFrame) -> Any:
        whole = ~table["screen"]
        expected = whole.groupby(table["subset"]).transform("any").astype(int)
        found = (table["chosen"] & whole).groupby(table["subset"]).transform("sum")
        return (found == expected) & ~(table["chosen"] & table["screen"])

    @pa.dataframe_check(error="no accuracy is given", ignore_na=False)
    def _some_accuracy(cls, table: pd.DataFrame) -> Any:
        return table.filter(regex=r"^accuracy\.").notna().any(axis=1)


class Counts(Table):
    """How many items of a split are right, as a share with its interval."""

    split: Series[str] = pa.Field(isin=EVALUATED)
    items: Series[int] = pa.Field(ge=1)
    correct: Series[int] = pa.Field(ge=0)
    accuracy: Series[float] = pa.Field(ge=0, le=1)
    low: Series[float] = pa.Field(ge=0, le=1, description="Wilson interval, 95 %, lower end")
    high: Series[float] = pa.Field(ge=0, le=1, description="Wilson interval, 95 %, upper end")

    @pa.dataframe_check(error="accuracy must be correct / items, inside its interval")
    def _consistent(cls, table: pd.DataFrame) -> Any:
        exact = (table["accuracy"] - table["correct"] / table["items"]).abs() < 1e-12
        inside = (table["low"] <= table["accuracy"]) & (table["accuracy"] <= table["high"])
        return exact & inside


class SweepChosen(Counts):
    """How the subsets of a sweep do at their chosen coefficients, merged and as ensembles."""

    subset: Series[str] = pa.Field(description="whose vectors are summed: a+b, sorted")
    size: Series[int] = pa.Field(ge=1, description="how many vectors are summed")
    kind: Series[str] = pa.Field(
        isin=KINDS,
        description="merged: theta_0 + c * sum; ensemble: mean logits of all theta_0 + c * tau; "
        "ensemble_finetuned: the same with c = 1",
    )
    coefficient: Series[float] = pa.Field(description="c")
    task: Series[str]
    normalized: Series[float] = pa.Field(ge=0, description="accuracy / fine-tuned accuracy")

    @pa.dataframe_check(error="a subset, kind, task and split stand twice")
    def _unique(cls, table: pd.DataFrame) -> Any:
        return ~table.duplicated(["subset", "kind", "task", "split"], keep=False)

    @pa.dataframe_check(error="a subset has one coefficient, and fine-tuned models have 1")
    def _coefficients(cls, table: pd.DataFrame) -> Any:
        number = table.groupby(["subset", "kind"])["coefficient"].transform("nunique")
        finetuned = table["kind"] == "ensemble_finetuned"
        return (number == 1) & (~finetuned | (table["coefficient"] == 1))


class FewShotTable(Counts):
    """Accuracy after fine-tuning on a few labelled images a class, from several starts."""

    start: Series[str] = pa.Field(description="pretrained or the name of an edit")
    shots: Series[int] = pa.Field(ge=0, description="labelled training images a class")

    @pa.dataframe_check(error="a start, shots and split stand twice")
    def _unique(cls, table: pd.DataFrame) -> Any:
        return ~table.duplicated(["start", "shots", "split"], keep=False)


def shares(correct: int, items: int) -> dict[str, float]:
    """Return the figures of `Counts`: items, correct, accuracy and its Wilson interval."""
    low, high = wilson_interval(correct, items)
    return {
        "items": items,
        "correct": correct,
        "accuracy": correct / items,
        "low": low,
        "high": high,
    }
