"""What studies read: evaluations, sweeps, few-shot tables, vectors. A missing row is an error."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

from tasks.artifacts import Artifacts
from tasks.findings import read_json
from tasks.inputs import mapped
from taskvec import tables
from taskvec.errors import InvalidParams, MissingArtifact, nearest
from taskvec.lazy import Lazy
from taskvec.mapped import StoredVector
from taskvec.params import EditParams, Params, Sweep
from taskvec.study_tables import FewShotTable, SweepChosen, SweepTable
from taskvec.summaries import Estimate, Scores, mean, ratio
from taskvec.sweeps import Subset, best, subsets

__all__ = ["read_json"]

Item = TypeVar("Item")


def named(items: Mapping[str, Item], name: str, section: str) -> Item:
    """Return an item of params.yaml that a study needs.

    Raises:
        InvalidParams: there is none of this name.
    """
    if name not in items:
        raise InvalidParams(
            f"this study needs {section}.{name} in its params.yaml; {nearest(name, items)}"
        )
    return items[name]


def group(params: Params, name: str) -> dict[str, EditParams]:
    """Return the edits of a group.

    Raises:
        InvalidParams: there are none.
    """
    found = {edit: item for edit, item in params.edits.items() if item.group == name}
    if not found:
        known = sorted({item.group for item in params.edits.values() if item.group})
        raise InvalidParams(f"this study needs edits of group {name!r}; {nearest(name, known)}")
    return found


def scores(artifacts: Artifacts, names: Iterable[str], seed: int) -> Scores:
    """Return the evaluations of tasks, variants and edits for one seed."""
    found = (tables.read(artifacts.evaluation(name, seed), tables.Evaluation) for name in names)
    return Scores.gather(found)


def by_seed(artifacts: Artifacts, names: Iterable[str], seeds: Iterable[int]) -> dict[int, Scores]:
    """Return the evaluations for several seeds; a name may stand several times."""
    once = list(dict.fromkeys(names))
    return {seed: scores(artifacts, once, seed) for seed in seeds}


def chosen(artifacts: Artifacts, edit: str, seed: int) -> dict[str, Any]:
    """Return the chosen coefficients of an edit, and what they cost and reach on validation."""
    return read_json(artifacts.coefficients(edit, seed))


def vectors(artifacts: Artifacts, names: Iterable[str], seed: int) -> dict[str, Lazy]:
    """Return the vectors of tasks and variants."""
    return {name: StoredVector(mapped(artifacts.vector(name, seed), "vector")) for name in names}


@dataclass(frozen=True)
class Swept:
    """What one seed of a sweep left behind.

    Attributes:
        seed: of the fine-tuned models.
        subsets: all that the sweep compares, sorted by size and names.
        rows: (subset, kind, task, split) -> accuracy at the chosen coefficient.
        coefficients: (subset, kind) -> the chosen coefficient.
        scores: of the tasks' pre-trained and fine-tuned models.
    """

    seed: int
    subsets: list[Subset]
    rows: Mapping[tuple[str, str, str, str], Estimate]
    coefficients: Mapping[tuple[str, str], float]
    scores: Scores

    def kept(self) -> list[Subset]:
        """Return the subsets that were evaluated on test data."""
        return [item for item in self.subsets if ("+".join(item), "merged") in self.coefficients]

    def coefficient(self, subset: Subset, kind: str = "merged") -> float:
        """Return the coefficient that was chosen for a subset."""
        return row(self.coefficients, ("+".join(subset), kind))

    def accuracy(
        self, subset: Subset, task: str, split: str = "test", kind: str = "merged"
    ) -> Estimate:
        """Return the accuracy of a subset's edit on a task."""
        return row(self.rows, ("+".join(subset), kind, task, split))

    def normalized(
        self, subset: Subset, tasks: Sequence[str], split: str = "test", kind: str = "merged"
    ) -> Estimate:
        """Return the mean over tasks of accuracy / fine-tuned accuracy."""
        return mean(
            [
                ratio(
                    self.accuracy(subset, task, split, kind),
                    self.scores.accuracy("finetuned", task, split),
                )
                for task in tasks
            ]
        )


def swept(artifacts: Artifacts, name: str, sweep: Sweep, seed: int) -> Swept:
    """Return what one seed of a sweep left behind."""
    found = tables.read(artifacts.sweep_chosen(name, seed), SweepChosen)
    records = found.to_dict("records")
    return Swept(
        seed,
        subsets(sweep.vectors, sweep.sizes),
        {
            (one["subset"], one["kind"], one["task"], one["split"]): Estimate(
                one["accuracy"], one["low"], one["high"]
            )
            for one in records
        },
        {(one["subset"], one["kind"]): float(one["coefficient"]) for one in records},
        scores(artifacts, sweep.vectors, seed),
    )


def screening(artifacts: Artifacts, name: str, sweep: Sweep, seed: int) -> dict[Subset, float]:
    """Return, of each subset, its best objective on the validation images that all subsets saw."""
    table = tables.read(artifacts.sweep_table(name, seed), SweepTable)
    groups = dict(list(table[table["screen"] == bool(sweep.screen)].groupby("subset")))
    found = {}
    for subset in subsets(sweep.vectors, sweep.sizes):
        rows = row(groups, "+".join(subset))
        own: dict[float, float] = dict(zip(rows["coefficient"], rows["objective"], strict=True))
        found[subset] = float(own[best(own)])
    return found


@dataclass(frozen=True)
class FewShots:
    """What one seed of a few-shot study left behind: (start, shots, split) -> accuracy."""

    rows: Mapping[tuple[str, int, str], Estimate]

    def accuracy(self, start: str, shots: int, split: str = "test") -> Estimate:
        """Return the accuracy after fine-tuning on some labelled images a class."""
        return row(self.rows, (start, shots, split))


def few_shots(artifacts: Artifacts, name: str, seed: int) -> FewShots:
    """Return what one seed of a few-shot study left behind."""
    table = tables.read(artifacts.few_shot(name, seed), FewShotTable)
    return FewShots(
        {
            (one["start"], one["shots"], one["split"]): Estimate(
                one["accuracy"], one["low"], one["high"]
            )
            for one in table.to_dict("records")
        }
    )


def by(items: Iterable[Item], key: Callable[[Item], Any]) -> dict[Any, list[Item]]:
    """Return the items by their key, in ascending order of the keys."""
    return {name: list(found) for name, found in groupby(sorted(items, key=key), key)}


def row(rows: Mapping[Any, Item], key: Any) -> Item:
    """Return the row of a table that stands under a key.

    Raises:
        MissingArtifact: there is none.
    """
    if key not in rows:
        words = ", ".join(map(str, key)) if isinstance(key, tuple) else str(key)
        raise MissingArtifact(
            f"the tables of this study have no row for {words}; run the study again: "
            "`taskvec run --experiment NAME`"
        )
    return rows[key]
