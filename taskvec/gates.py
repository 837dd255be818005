"""What stops a run: an expert that is not what was trained, and test data that is no test.

Values in, findings out; no files. A closed gate stops the run unless params.yaml overrides it with
a reason, which is recorded. An edit whose constraint fails on test data is marked, and goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, nan
from typing import Any, Literal

from taskvec.errors import GateClosed, IncompatibleWeights
from taskvec.params import Constraint
from taskvec.summaries import Estimate, Score, ratio

PASSED = "passed"
SHOWN = 3  # leaked items that a message names
# Beyond it a perplexity counts as exp(150), so that squares of products stay finite.
LARGEST_LOSS = 150.0

Feasibility = Literal["feasible", "infeasible", "open"]


@dataclass(frozen=True)
class Count:
    """How many items of a split a model gets right.

    Attributes:
        correct: items.
        items: all of them.
        groups: how many independent groups they come from: fonts, regions, tracks; as many as
            items where every item stands for itself.
    """

    correct: int
    items: int
    groups: int

    @property
    def accuracy(self) -> float:
        """The share of correct items."""
        return self.correct / self.items

    def __str__(self) -> str:
        return f"{self.correct} of {self.items} items ({100 * self.accuracy:.2f} %)"


@dataclass(frozen=True)
class Finding:
    """What one gate says of one model.

    Attributes:
        gate: which one.
        name: the task, variant or edit whose model it is.
        problems: why the gate is closed; none if it is open.
        note: how an open gate is recorded.
    """

    gate: Literal["expert", "leak"]
    name: str
    problems: tuple[str, ...] = ()
    note: str = PASSED

    @property
    def key(self) -> str:
        """How gates.override of params.yaml names it: ``leak mnist``."""
        return f"{self.gate} {self.name}"


def settle(findings: Sequence[Finding], override: Mapping[str, str]) -> dict[str, str]:
    """Return what is recorded of each gate: that it is open, or why it was overridden.

    Args:
        findings: at most one a gate.
        override: "expert NAME" or "leak NAME" -> the reason to go on all the same.

    Raises:
        GateClosed: a gate is closed and not overridden.
    """
    closed = [item for item in findings if item.problems and item.key not in override]
    if closed:
        raise GateClosed("\n".join(map(_explain, closed)))
    return {
        f"gate.{item.gate}": f"overridden: {override[item.key]}" if item.problems else item.note
        for item in findings
    }


def _explain(finding: Finding) -> str:
    return (
        f"the {finding.gate} gate is closed for {finding.name}: {'; '.join(finding.problems)}. "
        "To go on all the same, say why in params.yaml: "
        f'gates: {{override: {{"{finding.key}": "why"}}}}'
    )


# Experts: a checkpoint does what its header says that it does.


def recorded_score(metadata: Mapping[str, Any], file: str) -> dict[str, Count]:
    """Return the validation score that a checkpoint records of itself, by task; may be empty.

    Args:
        metadata: of its header.
        file: its name, for the message.

    Raises:
        IncompatibleWeights: there is a score, but not as fine_tune writes it.
    """
    score = metadata.get("score")
    if score is None:
        return {}
    try:
        if score["split"] != "validation":
            raise ValueError("not of validation data")
        counts = {str(task): _count(entry) for task, entry in score["tasks"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise IncompatibleWeights(
            f"{file} records the score {str(score)[:80]!r}; expected "
            '{"split": "validation", "tasks": {TASK: {"correct": n, "items": n}}}: '
            "fine-tune it anew"
        ) from None
    return counts


def _count(entry: Mapping[str, Any]) -> Count:
    correct, items = entry["correct"], entry["items"]
    if not (type(correct) is type(items) is int and 0 <= correct <= items and items > 0):
        raise ValueError("no count")
    return Count(correct, items, items)


def expert(
    name: str,
    file: str,
    recorded: Mapping[str, Count],
    measured: Mapping[str, Count],
    tolerance: float,
) -> Finding:
    """Return whether a checkpoint, evaluated from its file, reproduces its recorded score.

    Args:
        name: the task or variant.
        file: the name of the checkpoint.
        recorded: task -> validation score in its header; empty for a foreign one.
        measured: task -> validation score of the file.
        tolerance: how far two accuracies may be apart; a fraction.
    """
    shared = [task for task in measured if task in recorded]
    if not shared:
        return Finding("expert", name, note="no recorded score")
    problems = [
        f"{file} gets {measured[task]} of {task}'s validation data right, but records "
        f"{recorded[task]}, more than {100 * tolerance:g} points (gates.expert_tolerance) apart; "
        "the file or the data is not what it was made with: delete it and `taskvec run` to "
        "fine-tune it anew"
        for task in shared
        if _above(abs(measured[task].accuracy - recorded[task].accuracy), tolerance)
    ]
    return Finding("expert", name, tuple(problems))


# Leaks: test items in training data, and test scores that only a leak explains.


@dataclass(frozen=True)
class Leak:
    """A picture that is a test item of one task and a training item of another, or the same."""

    task: str
    item: int
    source: str
    source_item: int

    def __str__(self) -> str:
        return (
            f"test item {self.item} of {self.task} is training item {self.source_item} "
            f"of {self.source}"
        )


def leaks(
    training: Mapping[str, Mapping[str, int]], test: Mapping[str, Mapping[str, int]]
) -> list[Leak]:
    """Return the test items that were trained on, in the order of tasks and items.

    Args:
        training: task whose data went in -> digest of the pixels -> place in its training split.
        test: task evaluated on -> digest -> place in its test split.
    """
    return [
        Leak(task, place, source, training[source][digest])
        for task, items in test.items()
        for source in training
        for digest, place in sorted(items.items(), key=lambda entry: entry[1])
        if digest in training[source]
    ]


def leak(
    name: str,
    file: str,
    leaked: Sequence[Leak],
    scores: Mapping[str, tuple[Count, Count]],
    *,
    margin: float,
    level: float,
) -> Finding:
    """Return whether what a model was trained on can have held test items.

    Args:
        name: the task, variant or edit.
        file: the name of its checkpoint.
        leaked: what `leaks` found.
        scores: task -> (validation, test).
        margin: test accuracy may exceed validation accuracy by less than this; a fraction.
        level: or by more, if `p_above` is not below this level.
    """
    problems = []
    if leaked:
        more = f" and {len(leaked) - SHOWN} more" if len(leaked) > SHOWN else ""
        problems.append(
            f"{len(leaked)} test items are in the training data of {file}: "
            f"{', '.join(map(str, leaked[:SHOWN]))}{more}; take them out of one of the tasks"
        )
    suspect = [task for task, (low, high) in scores.items() if _far_above(low, high, margin, level)]
    for task in suspect:
        validation, test = scores[task]
        problems.append(
            f"{file} gets {test} of {task}'s test data right, but only {validation} of its "
            f"validation data: {100 * (test.accuracy - validation.accuracy):.2f} points more, with "
            f"p = {p_above(validation, test):.1e} where {level:.1e} is asked for; look for test "
            "items in its training data and for other differences between the two splits"
        )
    grouped = [
        f"{task} by {low.groups} and {high.groups} groups"
        for task, (low, high) in scores.items()
        if low.groups < low.items or high.groups < high.items
    ]
    # Nothing of the level may be noted: it follows from the whole experiment, which no stage sees.
    note = f"{PASSED}; compared {', '.join(grouped)}" if grouped else PASSED
    return Finding("leak", name, tuple(problems), note)


def _far_above(validation: Count, test: Count, margin: float, level: float) -> bool:
    difference = test.accuracy - validation.accuracy
    return not _above(margin, difference) and p_above(validation, test) < level


def p_above(validation: Count, test: Count) -> float:
    """Return the p value of test accuracy being no higher than validation accuracy.

    Fisher's exact test, one-sided: given how many are right in both splits together, how often
    chance alone puts so few of them into validation. It holds at any level and for any size.
    Items of one group, such as letters of one font, are right or wrong together. They count as one
    (the effective size at an intraclass correlation of 1, the most cautious one: Kish, Survey
    Sampling, 1965), rounded to the side of no difference.
    """
    from scipy.stats import fisher_exact  # slow to import, and rarely needed

    right = -(-validation.correct * validation.groups // validation.items)
    table = [[right, validation.groups - right]]
    right = test.correct * test.groups // test.items
    table.append([right, test.groups - right])
    return float(fisher_exact(table, alternative="less").pvalue)


def _above(value: float, bound: float) -> bool:
    """Return whether a difference of fractions exceeds a bound by more than rounding."""
    return value - bound > 1e-12


# Feasibility: what an edit's constraint says on test data, where nothing is chosen any more.


def bounded(constraint: Constraint, edited: Score, pretrained: Score) -> Estimate:
    """Return the figure that a constraint bounds, with its interval.

    Accuracy, loss or perplexity of a control task: its share of the pre-trained model's, itself,
    or how far it fell or rose. NaN where the pre-trained model's is 0 and a share is asked for.
    """
    after, before = (_measured(constraint, score) for score in (edited, pretrained))
    match constraint.rule[0]:
        case "min_ratio" | "max_ratio":
            return ratio(after, before) if before.value > 0 else Estimate(nan, -inf, inf)
        case "max_drop":
            return before - after
        case "max_rise":
            return after - before
    return after


def _measured(constraint: Constraint, score: Score) -> Estimate:
    if constraint.metric == "accuracy":
        return score.accuracy
    if constraint.metric == "loss":
        return score.loss
    parts = (score.loss.value, score.loss.low, score.loss.high)
    return Estimate(*(exp(min(part, LARGEST_LOSS)) for part in parts))


def holds(constraint: Constraint, figure: Estimate) -> bool:
    """Return whether a figure of `bounded` satisfies the constraint; its interval is not asked."""
    kind, bound = constraint.rule
    return figure.value >= bound if kind.startswith("min") else figure.value <= bound


def settled(constraint: Constraint, figure: Estimate) -> Feasibility:
    """Return on which side of the bound the whole interval of a figure lies, or "open"."""
    kind, bound = constraint.rule
    low, high = figure.low, figure.high
    if kind.startswith("max"):
        low, high, bound = -high, -low, -bound
    if low >= bound:
        return "feasible"
    return "infeasible" if high < bound else "open"


def feasibility(
    constraint: Constraint | None, edited: Mapping[str, Score], pretrained: Mapping[str, Score]
) -> Feasibility:
    """Return whether an edit keeps its constraint on every control task.

    Args:
        constraint: None is always kept.
        edited: task -> score of the edit, and
        pretrained: of the pre-trained model, on the same split.
    """
    found = [
        settled(constraint, bounded(constraint, edited[task], pretrained[task]))
        for task in (constraint.tasks if constraint else ())
        if constraint
    ]
    if "infeasible" in found:
        return "infeasible"
    return "open" if "open" in found else "feasible"
