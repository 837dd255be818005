"""Compare many edits ``theta_0 + c * (sum of some vectors)``, as rows of one table."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import pandas as pd
import torch
from torch import Tensor

from tasks.artifacts import Artifacts
from tasks.inputs import architecture, check_origin, checkpoint, head, images
from tasks.stages import Emit
from tasks.validation import Validation
from taskvec import checkpoints, tables
from taskvec.answers import CHUNK, Answers, join
from taskvec.errors import InvalidData
from taskvec.flat import FlatEditor
from taskvec.memo import Memo
from taskvec.metrics import Pictures, normalized_accuracy
from taskvec.params import Sweep
from taskvec.sections import Model
from taskvec.study_tables import EVALUATED, KINDS, SweepChosen, SweepTable, shares
from taskvec.sweeps import Subset, best, climb, coarse, going_on, subsets, usual_price
from taskvec.towers import Tower

Row = dict[str, object]
Accuracies = Mapping[str, Mapping[str, float]]  # task -> split -> of the fine-tuned model


def sweep(
    artifacts: Artifacts, *, name: str, seed: int, model: Model, sweep: Sweep, emit: Emit
) -> None:
    """Write the table of everything evaluated, and how the subsets do at their chosen coefficients.

    With ``screen``, every subset is compared on a few images of each task, at coefficients from
    coarse to fine; those that go on are evaluated on all validation images, from the best
    coefficient of the screening on until its neighbours are no better (`taskvec.sweeps.climb`).
    Without it, every subset is evaluated on all images at all coefficients. Test data is looked at
    last and decides nothing.

    Args:
        artifacts: where files lie.
        name: of the sweep.
        seed: of the fine-tuned models.
        model: architecture.
        sweep: what to compare.
        emit: is told the progress.

    Source: arXiv:2212.04089, section 4 (sums of all subsets) and appendix F (ensembles).
    """
    progress = _Progress(emit, _steps(sweep))
    with _opened(artifacts, seed, model, sweep, progress) as trials:
        chosen = _choose(trials, sweep)
    rows = trials.of_chosen(chosen)
    for task in trials.finetuned:
        own = {subset: c for subset, c in chosen.items() if task in trials.tasks(subset)}
        for split in EVALUATED if own else ():
            data = _Data(artifacts, trials.sums, task, split)
            rows += data.merged(own) if split == "test" else []
            rows += data.ensembles(own) if sweep.ensembles else []
        progress.step()
    tables.write(artifacts.sweep_table(name, seed), trials.table(chosen), SweepTable)
    tables.write(
        artifacts.sweep_chosen(name, seed), _normalized(rows, trials.finetuned), SweepChosen
    )
    progress.end()


def assist(
    artifacts: Artifacts, *, name: str, seed: int, model: Model, sweep: Sweep, emit: Emit
) -> None:
    """Ask what `sweep` will ask, from the last subset on, so that it finds the answers.

    The arguments are those of `sweep`.
    """
    del name
    progress = _Progress(emit, _steps(sweep))
    with _opened(artifacts, seed, model, sweep, progress) as trials:
        _choose(trials, sweep, backwards=True)


@contextmanager
def _opened(
    artifacts: Artifacts, seed: int, model: Model, sweep: Sweep, progress: "_Progress"
) -> Iterator["_Trials"]:
    """Yield what evaluates edits."""
    tower = architecture(model)
    pretrained = checkpoint(artifacts.pretrained(), tower)
    tower.load(pretrained.tensors)
    sums = _Sums(artifacts, tower, pretrained.fingerprint, sweep.vectors, seed)
    finetuned = {task: _finetuned(artifacts, task, seed) for task in sorted(sweep.vectors)}
    with Memo(artifacts.memo()) as memo:
        validation = Validation(artifacts, tower, finetuned, memo)
        yield _Trials(validation, sums, sweep, finetuned, progress)


def _steps(sweep: Sweep) -> int:
    """Return how many edits are evaluated on validation data as a rule, plus one a task."""
    values = sweep.coefficient.values()
    number = len(subsets(sweep.vectors, sweep.sizes))
    if not sweep.screen:
        return number * len(values) + len(sweep.vectors)
    kept = min(number, sweep.keep + 1) * usual_price(values, values[:1])
    return number * usual_price(values, coarse(values)) + kept + len(sweep.vectors)


def _finetuned(artifacts: Artifacts, task: str, seed: int) -> dict[str, float]:
    """Return the accuracy of a task's fine-tuned model on each split."""
    table = tables.read(artifacts.evaluation(task, seed), tables.Evaluation)
    rows = table[(table["model"] == "finetuned") & (table["task"] == task)]
    return {str(split): float(rows.set_index("split")["accuracy"][split]) for split in EVALUATED}


def _choose(trials: "_Trials", sweep: Sweep, *, backwards: bool = False) -> dict[Subset, float]:
    """Evaluate edits; return the coefficient of each subset that is evaluated on all images."""
    values = sweep.coefficient.values()
    way = -1 if backwards else 1
    found = subsets(sweep.vectors, sweep.sizes)[::way]

    def scores(subset: Subset, start: Sequence[float], screen: int | None) -> dict[float, float]:
        return climb(values, start, lambda c: trials.look(subset, c, screen))

    if not sweep.screen:
        return {subset: best(scores(subset, values, None)) for subset in found}
    screened = {subset: scores(subset, coarse(values), sweep.screen) for subset in found}
    tops = {subset: best(tried) for subset, tried in screened.items()}
    kept = going_on({subset: screened[subset][top] for subset, top in tops.items()}, sweep.keep)
    return {subset: best(scores(subset, [tops[subset]], None)) for subset in kept[::way]}


class _Progress:
    """Tells how much has been done; what comes unexpectedly does not count."""

    def __init__(self, emit: Emit, steps: int) -> None:
        self._emit, self._done, self._steps = emit, 0, steps

    def step(self) -> None:
        self._done = min(self._done + 1, self._steps)
        self._emit({"step": self._done, "steps": self._steps})

    def end(self) -> None:
        self._emit({"step": self._steps, "steps": self._steps})


class _Sums:
    """The edits of one tower, made in place."""

    def __init__(
        self, artifacts: Artifacts, tower: Tower, origin: str, vectors: Iterable[str], seed: int
    ) -> None:
        loaded = {
            task: checkpoints.load(artifacts.vector(task, seed), "vector") for task in vectors
        }
        for task, vector in loaded.items():
            check_origin(vector, origin, f"the vector of {task}")
        self.tower = tower
        self._origin = origin
        self._marks = {task: vector.fingerprint for task, vector in loaded.items()}
        # By fingerprint, so that the order of the sum follows from the weights as they are keyed.
        basis = {vector.fingerprint: vector.tensors for vector in loaded.values()}
        self._editor = FlatEditor(tower, basis, {})

    def weights(self, subset: Subset, coefficient: float) -> dict[str, object]:
        """Return what decides the weights of an edit: the origin and what is added to it."""
        return {"origin": self._origin, "sum": self._terms(subset, coefficient)}

    def apply(self, subset: Subset, coefficient: float) -> None:
        """Set the tower to an edit."""
        terms = self._terms(subset, coefficient)
        self._editor.apply({mark: terms.get(mark, 0.0) for mark in self._marks.values()})

    def _terms(self, subset: Subset, coefficient: float) -> dict[str, float]:
        """Return fingerprint -> coefficient; equal vectors are one term, and 0 adds nothing."""
        counts = Counter(self._marks[task] for task in subset if coefficient)
        return {mark: number * coefficient for mark, number in sorted(counts.items())}


class _Trials:
    """Everything that is evaluated on validation data."""

    def __init__(
        self,
        validation: Validation,
        sums: _Sums,
        sweep: Sweep,
        finetuned: Accuracies,
        progress: _Progress,
    ) -> None:
        self.sums, self.finetuned = sums, finetuned
        self._validation, self._progress = validation, progress
        self._own = sweep.evaluate == "own"
        self._rows: list[Row] = []
        self._whole: dict[tuple[Subset, float], dict[str, Answers]] = {}

    def tasks(self, subset: Subset) -> Iterable[str]:
        """Return the tasks that an edit is evaluated on."""
        return subset if self._own else self.finetuned

    def look(self, subset: Subset, coefficient: float, screen: int | None) -> float:
        """Return the mean normalised accuracy, on ``screen`` images of each task or on all."""
        found = {task: self._ask(subset, coefficient, task, screen) for task in self.tasks(subset)}
        accuracy = {task: answers.accuracy for task, answers in found.items()}
        normalized = [
            normalized_accuracy(value, self.finetuned[task]["validation"])
            for task, value in accuracy.items()
        ]
        objective = sum(normalized) / len(normalized)
        row: Row = {
            "subset": _label(subset),
            "size": len(subset),
            "coefficient": coefficient,
            "screen": screen is not None,
            "items": sum(map(len, found.values())),
            "objective": objective,
            **{f"accuracy.{task}": accuracy.get(task, float("nan")) for task in self.finetuned},
        }
        self._rows.append(row)
        if screen is None:
            self._whole[subset, coefficient] = found
        self._progress.step()
        return objective

    def _ask(self, subset: Subset, coefficient: float, task: str, screen: int | None) -> Answers:
        items = self._validation.items[task]
        wanted = min(screen or items, items)
        weights = self.sums.weights(subset, coefficient)
        parts = join(
            self._validation.answers(
                weights, lambda: self.sums.apply(subset, coefficient), task, chunk
            )
            for chunk in range(-(-wanted // CHUNK))
        )
        return Answers(parts.correct[:wanted], parts.loss[:wanted])

    def table(self, chosen: Mapping[Subset, float]) -> pd.DataFrame:
        """Return all rows: by subset, the screening first, by coefficient."""
        marks = {_label(subset): coefficient for subset, coefficient in chosen.items()}
        table = pd.DataFrame(self._rows)
        taken = table["subset"].map(marks) == table["coefficient"]
        order = ["size", "subset", "screen", "coefficient"]
        return table.assign(chosen=taken & ~table["screen"]).sort_values(
            order, ascending=[True, True, False, True], ignore_index=True
        )

    def of_chosen(self, chosen: Mapping[Subset, float]) -> list[Row]:
        """Return what the chosen edits reach on all validation images."""
        return [
            _row("merged", subset, coefficient, task, "validation", answers.correct.tolist())
            for subset, coefficient in chosen.items()
            for task, answers in self._whole[subset, coefficient].items()
        ]


class _Data:
    """One split of a task, for models at chosen coefficients."""

    def __init__(self, artifacts: Artifacts, sums: _Sums, task: str, split: str) -> None:
        self._sums, self._task, self._split = sums, task, split
        self._head = head(artifacts, task).to(sums.tower.device)
        self._pictures = Pictures(sums.tower, *images(artifacts, task, split))
        self._labels = torch.cat([labels for _, labels in self._pictures])

    def merged(self, chosen: Mapping[Subset, float]) -> list[Row]:
        """Return what the sums of vectors reach."""
        return [
            self._row("merged", subset, coefficient, self._logits(subset, coefficient))
            for subset, coefficient in chosen.items()
        ]

    def ensembles(self, chosen: Mapping[Subset, float]) -> list[Row]:
        """Return what the mean logits of single models reach, each model computed once."""
        wanted: dict[float, list[tuple[str, Subset]]] = defaultdict(list)
        for subset, coefficient in chosen.items():
            wanted[coefficient].append(("ensemble", subset))
            wanted[1.0].append(("ensemble_finetuned", subset))
        rows = []
        for coefficient, members in wanted.items():
            names = sorted({name for _, subset in members for name in subset})
            logits = {name: self._logits((name,), coefficient) for name in names}
            for kind, subset in members:
                mean = torch.stack([logits[name] for name in subset]).mean(dim=0)
                rows.append(self._row(kind, subset, coefficient, mean))
        return rows

    @torch.inference_mode()
    def _logits(self, subset: Subset, coefficient: float) -> Tensor:
        """Return the logits (N, classes) of an edited model."""
        self._sums.apply(subset, coefficient)
        parts = [self._sums.tower.embed(batch) @ self._head.T for batch, _ in self._pictures]
        logits = torch.cat(parts).cpu()
        if torch.isnan(logits).any():
            raise InvalidData(
                "the model answers NaN; a weight overflowed: use smaller coefficients"
            )
        return logits

    def _row(self, kind: str, subset: Subset, coefficient: float, logits: Tensor) -> Row:
        correct = (logits.argmax(dim=1) == self._labels).tolist()
        return _row(kind, subset, coefficient, self._task, self._split, correct)


def _row(
    kind: str, subset: Subset, coefficient: float, task: str, split: str, correct: list[bool]
) -> Row:
    return {
        "subset": _label(subset),
        "size": len(subset),
        "kind": kind,
        "coefficient": coefficient,
        "task": task,
        "split": split,
        **shares(sum(correct), len(correct)),
    }


def _normalized(rows: Iterable[Row], finetuned: Accuracies) -> pd.DataFrame:
    """Return rows with their normalised accuracy: by subset, kind, task and split."""
    order = {word: place for place, word in enumerate([*KINDS, *EVALUATED])}
    table = pd.DataFrame(rows).sort_values(
        ["size", "subset", "kind", "task", "split"],
        key=lambda column: column.map(order) if column.name in ("kind", "split") else column,
        ignore_index=True,
    )
    return table.assign(
        normalized=[
            normalized_accuracy(row["accuracy"], finetuned[row["task"]][row["split"]])
            for row in table.to_dict("records")
        ]
    )


def _label(subset: Subset) -> str:
    return "+".join(subset)
