"""What a report says of an experiment, before it is laid out: read, compared, put into words."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tasks.artifacts import Artifacts
from tasks.inputs import mapped
from taskvec import similarity, summaries, tables
from taskvec.errors import MissingArtifact
from taskvec.lazy import Lazy
from taskvec.mapped import StoredVector
from taskvec.params import EditParams, Params
from taskvec.summaries import Estimate, Gain, Gains, Scores


@dataclass(frozen=True)
class Run:
    """What one seed left behind: everything that a report reads.

    Attributes:
        seed: of the fine-tuned models.
        scores: of all models and edits.
        searches: edit -> what its search evaluated, in the order of params.yaml.
        chosen: edit -> its chosen coefficients and what they reach on validation data.
        cosines: between all task vectors.
        parameters: how many numbers a task vector has.
    """

    seed: int
    scores: Scores
    searches: Mapping[str, pd.DataFrame]
    chosen: Mapping[str, Mapping[str, Any]]
    cosines: pd.DataFrame
    parameters: int

    def coefficients(self, edit: str) -> str:
        """Return the chosen coefficients, and options, as text: ``c = 0.5, ties.density = 0.2``."""
        found = []
        for prefix in ("coefficient.", "option."):
            for name, value in sorted(self.chosen[edit].items()):
                if name.startswith(prefix):
                    text = f"{value:g}" if isinstance(value, float) else str(value)
                    found.append(f"{name.removeprefix(prefix)} = {text}")
        return ", ".join(found)

    def chosen_search(self, edit: str) -> pd.DataFrame:
        """Return the part of a search that has the chosen options: what a figure can show."""
        table = self.searches[edit]
        for column in [name for name in table if str(name).startswith("option.")]:
            value = table[column][table["chosen"]].iloc[0]
            table = table[table[column] == value]
        return table


def gather(artifacts: Artifacts, params: Params, seed: int) -> Run:
    """Read what one seed left behind."""
    evaluations = [
        tables.read(artifacts.evaluation(name, seed), tables.Evaluation)
        for name in (*params.tasks, *params.edits)
    ]
    vectors: dict[str, Lazy] = {
        task: StoredVector(mapped(artifacts.vector(task, seed), "vector")) for task in params.tasks
    }
    first = next(iter(vectors.values()))
    return Run(
        seed=seed,
        scores=Scores.gather(evaluations),
        searches={
            edit: tables.read(artifacts.search_table(edit, seed), tables.Search)
            for edit in params.edits
        },
        chosen={edit: _chosen(artifacts.coefficients(edit, seed)) for edit in params.edits},
        cosines=similarity.cosines(vectors),
        parameters=sum(map(first.size, first.shapes)),
    )


def _chosen(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingArtifact(f"{path} does not exist; `taskvec run` makes it")
    return dict(json.loads(path.read_text()))


# What kind of story an edit tells; groups are told apart from both.


def learning(params: Params) -> dict[str, EditParams]:
    """Return the edits outside groups that make something large: addition."""
    return {n: e for n, e in params.edits.items() if e.objective.maximize and not e.group}


def forgetting(params: Params) -> dict[str, EditParams]:
    """Return the edits that make something small: negation."""
    return {n: e for n, e in params.edits.items() if e.objective.minimize}


def groups(params: Params) -> dict[str, dict[str, EditParams]]:
    """Return the edits that are compared with one another: group -> name -> edit."""
    found: dict[str, dict[str, EditParams]] = {}
    for name, edit in params.edits.items():
        if edit.group:
            found.setdefault(edit.group, {})[name] = edit
    return found


def group_gains(scores: Scores, params: Params, edits: Mapping[str, EditParams]) -> list[Gains]:
    """Return how a group does on each task that one of its edits is evaluated on."""
    return [
        summaries.gains(
            scores, task, {n: params.parse(n) for n, e in edits.items() if task in e.evaluate}
        )
        for task in params.tasks
        if any(task in edit.evaluate for edit in edits.values())
    ]


# Figures as text. A minus sign is a minus sign; bounds that nothing bounds are written as such.


def percent(value: float) -> str:
    """Return a fraction in percent with one decimal and no unit: ``87.1``."""
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "\u221e" if value > 0 else "\u2212\u221e"
    text = f"{100 * value:.1f}"
    return text.replace("-", "" if text == "-0.0" else "\u2212")


def signed(value: float) -> str:
    """Return a difference of fractions in points: ``+10.8``."""
    text = percent(value)
    return text if text[0] in "\u2212u" or text == "0.0" else f"+{text}"


def span(estimate: Estimate) -> str:
    """Return the interval in percent: ``84.0 to 90.2``."""
    if math.isnan(estimate.value):
        return "undefined"
    return f"{percent(estimate.low)} to {percent(estimate.high)}"


def gain_verdict(estimate: Estimate) -> str:
    """Return what the interval of a difference supports."""
    return {"above": "a gain is supported", "below": "a loss is supported"}.get(
        estimate.verdict(0.0), "neither gain nor loss is shown"
    )


def bound_verdict(estimate: Estimate, bound: float) -> str:
    """Return what the interval of a kept share says about the constraint."""
    held = "kept" if estimate.value >= bound else "broken"
    settled = estimate.verdict(bound) != "open"
    return held if settled else f"{held}, but the interval does not settle it"


def cosine_text(value: float) -> str:
    """Return a cosine with three decimals: ``0.162``."""
    return f"{round(value, 3) + 0.0:.3f}".replace("-", "\u2212")


def spoken(names: Sequence[str]) -> str:
    """Return names as a sentence has them: ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def headlines(run: Run, params: Params) -> list[dict[str, str]]:
    """Return what to know first: for each story a figure, what it is, and a sentence."""
    found = []
    for name, edit in learning(params).items():
        value, before = merit(run, name, edit), merit(run, "pretrained", edit)
        what = f"on {edit.evaluate[0]}" if len(edit.evaluate) == 1 else "mean normalised accuracy"
        found.append(
            {
                "figure": f"{percent(value.value)} %",
                "what": f"{name}: {what}",
                "text": f"{name} reaches {percent(value.value)} % {what} (95 % interval "
                f"{span(value)}) at {run.coefficients(name)}, against {percent(before.value)} % "
                f"for the pre-trained model: {signed((value - before).value)} points "
                f"({span(value - before)}).",
            }
        )
    for name, edit in forgetting(params).items():
        target = edit.objective.tasks[0]
        gone = run.scores.forgotten(name, target)
        found.append(
            {
                "figure": f"{percent(gone.value)} %",
                "what": f"{name}: share of {target} forgotten",
                "text": f"{name} takes {target} from {percent_of(run, 'pretrained', target)} to "
                f"{percent_of(run, name, target)} % accuracy: {percent(gone.value)} % "
                f"({span(gone)}) of what the pre-trained model has above chance is gone"
                f"{_controls(run, name, edit)}.",
            }
        )
    for group, edits in groups(params).items():
        for gains in group_gains(run.scores, params, edits):
            best = _best_on_validation(run, gains)
            found.append(
                {
                    "figure": f"{percent(best.accuracy.value)} %",
                    "what": f"{group}: {best.edit} on {gains.task}",
                    "text": f"{best.edit}, the best of group {group} on validation data, reaches "
                    f"{percent(best.accuracy.value)} % ({span(best.accuracy)}) on {gains.task}, "
                    f"against {percent_of(run, 'pretrained', gains.task)} % for the pre-trained "
                    f"model and {percent_of(run, 'finetuned', gains.task)} % for the model "
                    "fine-tuned on it.",
                }
            )
    return found


def gain_sentences(gains: Gains) -> list[tuple[str, str]]:
    """Return each edit of several vectors with what its intervals support, and what they do not."""
    sentences = []
    for row in gains.rows:
        if row.over_single is None:
            continue
        parts = [_compared(row.over_pretrained, "the pre-trained model")]
        parts.append(_compared(row.over_single, f"the best single vector ({gains.single})"))
        if row.plain:
            plain, gain = row.plain
            parts.append(_compared(gain, f"{plain}, the same without the minus term"))
        sentences.append((row.edit, "; ".join(parts)))
    return sentences


def _compared(gain: Estimate, other: str) -> str:
    return f"{signed(gain.value)} points ({span(gain)}) against {other}, {gain_verdict(gain)}"


def merit(run: Run, model: str, edit: EditParams) -> Estimate:
    """Return mean normalised accuracy, or with a single task its accuracy."""
    if len(edit.evaluate) == 1:
        return run.scores.accuracy(model, edit.evaluate[0])
    return run.scores.normalized(model, edit.evaluate)


def percent_of(run: Run, model: str, task: str) -> str:
    """Return a test accuracy in percent, as text."""
    return percent(run.scores.accuracy(model, task).value)


def _controls(run: Run, name: str, edit: EditParams) -> str:
    if not edit.constraint:
        return ""
    kept = []
    for task in edit.constraint.tasks:
        share = run.scores.kept(name, task)
        kept.append(f"{task} keeps {percent(share.value)} % ({span(share)}) of its accuracy")
    return f"; {spoken(kept)}, with {100 * edit.constraint.min_ratio:g} % asked for"


def _best_on_validation(run: Run, gains: Gains) -> Gain:
    return max(
        gains.rows,
        key=lambda row: run.scores.accuracy(row.edit, gains.task, "validation").value,
    )
