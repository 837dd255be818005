"""What the report says about the evaluation tables: tables in, estimates out.

All figures are fractions; an `Estimate` carries the bounds of its 95 % interval. Bounds of composed
figures come from the bounds of their parts (MOVER, the method of variance estimates recovery), so
that every interval goes back to the Wilson bounds in the tables and behaves at 0 and 1, where
normal approximations collapse.

MOVER takes the parts to be independent. Here two models are scored on the same items and usually
err on the same ones, and only counts are stored, not pairs; the intervals of differences and ratios
are then wider than paired ones would be. They cover which items were drawn, not the seed.

Sources:
    Newcombe, Statistics in Medicine 17 (1998) 873-890, method 10 (difference);
    Zou and Donner, Statistics in Medicine 27 (2008) 1693-1702 (sums);
    Donner and Zou, Statistical Methods in Medical Research 21 (2012) 347-359 (ratio).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from taskvec.errors import MissingArtifact
from taskvec.expressions import Edit, Linear, Vector

Verdict = Literal["above", "below", "open"]

Z95 = NormalDist().inv_cdf(0.975)  # two-sided 95 % quantile


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; bounds may be infinite where nothing bounds it."""

    value: float
    low: float
    high: float

    def __sub__(self, other: "Estimate") -> "Estimate":
        """Return the difference with Newcombe's hybrid score interval (1998, method 10)."""
        value = self.value - other.value
        below = math.hypot(self.value - self.low, other.high - other.value)
        above = math.hypot(self.high - self.value, other.value - other.low)
        return Estimate(value, value - below, value + above)

    @classmethod
    def of_mean(cls, values: npt.ArrayLike) -> "Estimate":
        """Return the mean of n >= 1 figures, none negative, with its normal interval.

        The interval of a single figure has no width, for nothing is known of its spread.
        """
        drawn = np.asarray(values, dtype=np.float64)
        value = float(drawn.mean())
        spread = float(drawn.std(ddof=1)) / math.sqrt(len(drawn)) if len(drawn) > 1 else 0.0
        return cls(value, max(0.0, value - Z95 * spread), value + Z95 * spread)

    def shift(self, amount: float) -> "Estimate":
        """Return the estimate plus a constant that is known exactly."""
        return Estimate(self.value + amount, self.low + amount, self.high + amount)

    def verdict(self, threshold: float) -> Verdict:
        """Return on which side of a threshold the whole interval lies, or "open"."""
        if self.low >= threshold:
            return "above"
        return "below" if self.high < threshold else "open"


@dataclass(frozen=True)
class Score:
    """One row of an evaluation table.

    Attributes:
        accuracy: with its Wilson interval.
        loss: mean cross-entropy in nats, with its normal interval.
        items: how many items were scored.
        chance: 1 / classes.
    """

    accuracy: Estimate
    loss: Estimate
    items: int
    chance: float

    @classmethod
    def of_row(cls, row: Mapping[Any, Any]) -> "Score":
        """Return a row of a table that satisfies the schema ``Evaluation``."""
        accuracy = Estimate(*(float(row[name]) for name in ("accuracy", "low", "high")))
        loss = Estimate(*(float(row[name]) for name in ("loss", "loss_low", "loss_high")))
        return cls(accuracy, loss, int(row["items"]), float(row["chance"]))


@dataclass(frozen=True)
class Scores:
    """The evaluation tables of one seed, by (model, task, split)."""

    rows: Mapping[tuple[str, str, str], Score]

    @classmethod
    def gather(cls, evaluations: Iterable[pd.DataFrame]) -> "Scores":
        """Return the rows of several tables that satisfy the schema ``Evaluation``."""
        rows = {}
        for table in evaluations:
            for row in table.to_dict("records"):
                key = (str(row["model"]), str(row["task"]), str(row["split"]))
                rows[key] = Score.of_row(row)
        return cls(rows)

    def find(self, model: str, task: str, split: str = "test") -> Score | None:
        """Return a row, or None where the model was not evaluated on the task."""
        return self.rows.get((model, task, split))

    def score(self, model: str, task: str, split: str = "test") -> Score:
        """Return a row.

        Raises:
            MissingArtifact: the tables do not hold it.
        """
        found = self.find(model, task, split)
        if found is None:
            raise MissingArtifact(
                f"the evaluation tables have no row for {model!r} on {task!r} ({split}); "
                "`taskvec run` evaluates it"
            )
        return found

    def accuracy(self, model: str, task: str, split: str = "test") -> Estimate:
        """Return the accuracy of a model on a task."""
        return self.score(model, task, split).accuracy

    def normalized(self, model: str, tasks: Sequence[str], split: str = "test") -> Estimate:
        """Return the mean over tasks of accuracy / fine-tuned accuracy.

        Source: arXiv:2212.04089, section 4.
        """
        return mean(
            [
                ratio(self.accuracy(model, task, split), self.accuracy("finetuned", task, split))
                for task in tasks
            ]
        )

    def kept(self, model: str, task: str, split: str = "test") -> Estimate:
        """Return accuracy / pre-trained accuracy: what a control task keeps (section 3)."""
        return ratio(self.accuracy(model, task, split), self.accuracy("pretrained", task, split))

    def above_chance(self, model: str, task: str, split: str = "test") -> Estimate:
        """Return accuracy - 1 / classes, which is 0 for a model that guesses."""
        score = self.score(model, task, split)
        return score.accuracy.shift(-score.chance)

    def forgotten(self, model: str, task: str, split: str = "test") -> Estimate:
        """Return the share of the pre-trained model's above-chance accuracy that is gone.

        1 - (accuracy - chance) / (pre-trained accuracy - chance): 0 if nothing is forgotten, 1 at
        chance, more below it.
        """
        left = ratio(
            self.above_chance(model, task, split), self.above_chance("pretrained", task, split)
        )
        return Estimate(1 - left.value, 1 - left.high, 1 - left.low)


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean of independent estimates; distances to the bounds add as squares.

    Source: Zou and Donner (2008), with weights 1 / n.
    """
    n = len(estimates)
    value = math.fsum(item.value for item in estimates) / n
    below = math.hypot(*(item.value - item.low for item in estimates)) / n
    above = math.hypot(*(item.high - item.value for item in estimates)) / n
    return Estimate(value, value - below, value + above)


def ratio(top: Estimate, bottom: Estimate) -> Estimate:
    """Return top / bottom with the interval of Donner and Zou (2012).

    The bounds are the R at which the interval of ``top - R * bottom`` touches 0, that is
    ``(top - R bottom)^2 = (top - low_top)^2 + R^2 (high_bottom - bottom)^2`` for the lower one. The
    upper one is infinite where the interval of ``bottom`` reaches 0, and everything is NaN where
    ``bottom`` itself is not positive.
    """
    if bottom.value <= 0:
        return Estimate(math.nan, math.nan, math.nan)
    product = top.value * bottom.value
    a = bottom.value**2 - (bottom.high - bottom.value) ** 2
    b = top.value**2 - (top.value - top.low) ** 2
    c = top.value**2 - (top.high - top.value) ** 2
    d = bottom.value**2 - (bottom.value - bottom.low) ** 2
    root = math.sqrt(max(0.0, product**2 - a * b))
    if a > 0:
        low = (product - root) / a
    elif product + root > 0 and b >= 0:
        low = b / (product + root)  # the same root, written so that a = 0 does no harm
    else:
        low = 0.0 if top.low >= 0 else -math.inf
    high = math.inf
    if bottom.low > 0:
        high = (product + math.sqrt(max(0.0, product**2 - c * d))) / d
    value = top.value / bottom.value
    # Where an interval has no width, rounding must not put the value outside it.
    return Estimate(value, min(low, value), max(high, value))


def closest(table: pd.DataFrame, names: Sequence[str]) -> tuple[str, str, float]:
    """Return the two different names with the largest cosine, and that cosine.

    Args:
        table: what `taskvec.similarity.cosines` returns.
        names: at least two of its names.
    """
    values = table.loc[list(names), list(names)].to_numpy(dtype=float)
    pairs = [(i, j) for j in range(len(names)) for i in range(j)]
    i, j = max(pairs, key=lambda pair: float(values[pair]))
    return names[i], names[j], float(values[i, j])


@dataclass(frozen=True)
class Gain:
    """How one edit of a group does on one task; gains are differences of test accuracies.

    Attributes:
        edit: its name.
        accuracy: on the test items.
        over_pretrained: against the pre-trained model.
        over_single: against the best edit of a single vector; None for such an edit itself, and
            where the group has none.
        plain: the edit of the group that leaves out this one's minus terms, and the gain over it;
            None where there is no minus term or no such edit.
    """

    edit: str
    accuracy: Estimate
    over_pretrained: Estimate
    over_single: Estimate | None
    plain: tuple[str, Estimate] | None


@dataclass(frozen=True)
class Gains:
    """How the edits of a group do on one task, best first.

    Attributes:
        task: the task.
        single: the edit of a single vector that is best on validation data, if there is one.
        rows: one an edit, by falling test accuracy.
    """

    task: str
    single: str | None
    rows: tuple[Gain, ...]


def gains(scores: Scores, task: str, edits: Mapping[str, Edit]) -> Gains:
    """Compare the edits of a group on one task.

    The single vector to beat is chosen on validation data, so that its test accuracy is as honest
    as that of the others.

    Args:
        scores: of one seed.
        task: what the edits are evaluated on.
        edits: name -> expression in normal form.
    """
    signs = {name: _signs(edit) for name, edit in edits.items()}
    alone = [name for name, (plus, minus) in signs.items() if len(plus | minus) == 1]
    single = max(
        alone, key=lambda name: scores.accuracy(name, task, "validation").value, default=None
    )
    rows = []
    for name, (plus, minus) in signs.items():
        accuracy = scores.accuracy(name, task)
        plain = next((o for o, found in signs.items() if minus and found == (plus, set())), None)
        rows.append(
            Gain(
                name,
                accuracy,
                accuracy - scores.accuracy("pretrained", task),
                accuracy - scores.accuracy(single, task) if single and name not in alone else None,
                (plain, accuracy - scores.accuracy(plain, task)) if plain else None,
            )
        )
    rows.sort(key=lambda row: (-row.accuracy.value, row.edit))
    return Gains(task, single, tuple(rows))


def _signs(edit: Edit) -> tuple[set[str], set[str]]:
    """Return the vectors that an edit adds and those that it subtracts."""
    parts = [*edit.basis.values(), *([edit.offset] if edit.offset else [])]
    weights = [pair for part in parts for pair in _leaves(part, 1.0)]
    plus = {name for name, weight in weights if weight > 0}
    return plus, {name for name, weight in weights if weight < 0}


def _leaves(sum_: Linear, factor: float) -> Iterator[tuple[str, float]]:
    """Yield every vector of a sum with its weight, also those that methods merge."""
    for atom, weight in sum_.terms:
        if isinstance(atom, Vector):
            yield atom.name, factor * weight
        else:
            for operand in atom.operands:
                yield from _leaves(operand, factor * weight)
