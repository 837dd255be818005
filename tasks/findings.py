"""What a report says of an experiment, before it is laid out: read, compared, put into words."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tasks import kept
from tasks.artifacts import Artifacts
from tasks.inputs import mapped
from taskvec import gates, similarity, summaries, tables
from taskvec.errors import MissingArtifact
from taskvec.lazy import Lazy
from taskvec.mapped import StoredVector
from taskvec.params import Constraint, EditParams, Params
from taskvec.summaries import Estimate, Gain, Gains, Scores

LAYER = "@"  # between the name of a coefficient and that of a layer


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
        """Return the chosen coefficients, and options, as text: ``c = 0.5, ties.density = 0.2``.

        Of a coefficient that has a value a layer the mean is given, and the range.
        """
        found = [f"{name} = {_spread(v)}" for name, v in sorted(self.layers(edit).items())]
        for name, value in sorted(self.chosen[edit].items()):
            if name.startswith("option."):
                text = f"{value:g}" if isinstance(value, float) else str(value)
                found.append(f"{name.removeprefix('option.')} = {text}")
        return ", ".join(found)

    def layers(self, edit: str) -> dict[str, list[float]]:
        """Return the chosen value of each coefficient, or its values by layer."""
        found: dict[str, list[float]] = {}
        for key, value in self.chosen[edit].items():
            if key.startswith("coefficient."):
                name = key.removeprefix("coefficient.").partition(LAYER)[0]
                found.setdefault(name, []).append(value)
        return found

    def intervals(self, edit: str) -> str:
        """Return which coefficients are not significantly worse: ``c from 0.4 to 0.6``.

        They are on validation data; empty where the search did not say.
        """
        chosen = self.chosen[edit]
        return ", ".join(
            f"{name} from {chosen[f'interval.{name}.low']:g} to {chosen[f'interval.{name}.high']:g}"
            for name in sorted(self.layers(edit))
            if f"interval.{name}.low" in chosen
        )

    def price(self, edit: str) -> str:
        """Return what the search cost: ``4,000 image evaluations, 25 % of the grid's 16,000``."""
        paid = int(self.chosen[edit]["image_evaluations"])
        text = f"{paid:,} image evaluations"
        grid = int(self.chosen[edit].get("grid_image_evaluations", paid))
        return text if grid == paid else f"{text}, {100 * paid / grid:.0f} % of the grid's {grid:,}"

    def chosen_search(self, edit: str) -> pd.DataFrame:
        """Return the part of a search that a figure can show.

        It has the complete evaluations at the chosen options; of a coefficient that has a value a
        layer it has the mean.
        """
        table = self.searches[edit]
        table = table[table["complete"]]
        for column in [name for name in table if str(name).startswith("option.")]:
            value = table[column][table["chosen"]].iloc[0]
            table = table[table[column] == value]
        columns = [str(name) for name in table if str(name).startswith("coefficient.")]
        layered = [name for name in columns if LAYER in name]
        for column in dict.fromkeys(name.partition(LAYER)[0] for name in layered):
            own = [name for name in layered if name.startswith(f"{column}{LAYER}")]
            table = table.assign(**{column: table[own].mean(axis=1)}).drop(columns=own)
        return table


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:g}"
    mean = math.fsum(values) / len(values)
    return f"{mean:.3g} on average ({min(values):.3g} to {max(values):.3g} by layer)"


def gather(artifacts: Artifacts, params: Params, seed: int) -> Run:
    """Read what one seed left behind: all experts, and the edits that are made for it."""
    edits = [name for name, edit in params.edits.items() if seed in params.seeds_of(edit)]
    evaluations = [
        read_table(artifacts.evaluation(name, seed), tables.Evaluation)
        for name in (*params.experts, *edits)
    ]
    vectors = {task: artifacts.vector(task, seed) for task in params.tasks}
    cosines, size = kept.once(_cosines, vectors, files=list(vectors.values()))
    return Run(
        seed=seed,
        scores=Scores.gather(evaluations),
        searches={
            edit: read_table(artifacts.search_table(edit, seed), tables.Search) for edit in edits
        },
        chosen={edit: read_json(artifacts.coefficients(edit, seed)) for edit in edits},
        cosines=cosines,
        parameters=size,
    )


def read_table(path: Path, schema: type[tables.Table]) -> pd.DataFrame:
    """Return what `taskvec.tables.read` returns; nobody changes it."""
    return kept.once(tables.read, path, schema, files=[path])


def _cosines(paths: dict[str, Path]) -> tuple[pd.DataFrame, int]:
    """Return the cosines of vectors, and how many parameters one has."""
    vectors: dict[str, Lazy] = {
        task: StoredVector(mapped(path, "vector")) for task, path in paths.items()
    }
    first = next(iter(vectors.values()))
    return similarity.cosines(vectors), sum(map(first.size, first.shapes))


def read_json(path: Path) -> dict[str, Any]:
    """Return what a stage wrote as JSON."""
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


def bound_verdict(constraint: Constraint, figure: Estimate) -> str:
    """Return what a figure and its interval say about the constraint that bounds it."""
    held = "kept" if gates.holds(constraint, figure) else "broken"
    settled = gates.settled(constraint, figure) != "open"
    return held if settled else f"{held}, but the interval does not settle it"


@dataclass(frozen=True)
class Wording:
    """How a constraint is put into words.

    Attributes:
        figure: what it bounds: ``share of accuracy kept``.
        asked: the bound: ``at least 95 %``.
        show: a value of that figure without its unit: ``96.7``, and
        unit: the unit with a space before it; may be empty.
    """

    figure: str
    asked: str
    show: Callable[[float], str]
    unit: str

    def value(self, figure: Estimate) -> str:
        """Return a figure with its interval: ``96.7 % (93.1 to 99.0)``."""
        return f"{self.show(figure.value)}{self.unit} ({self.span(figure)})"

    def span(self, figure: Estimate) -> str:
        """Return its interval: ``93.1 to 99.0``."""
        return f"{self.show(figure.low)} to {self.show(figure.high)}"


def wording(constraint: Constraint) -> Wording:
    """Return the words for a constraint of any kind, on any metric."""
    kind, bound = constraint.rule
    metric = constraint.metric
    named = {
        "min_ratio": f"share of {metric} kept",
        "max_ratio": f"{metric} as a share of the pre-trained model's",
        "max_drop": f"drop in {metric}",
        "max_rise": f"rise in {metric}",
    }.get(kind, metric)
    show, unit = _decimal, " nats" if metric == "loss" else ""
    if kind.endswith("ratio"):
        show, unit = percent, " %"
    elif metric == "accuracy":
        show, unit = percent, " %" if named == metric else " points"
    limit = f"{bound if show is _decimal else 100 * bound:g}{unit}"
    side = "at least" if kind.startswith("min") else "at most"
    return Wording(named, f"{side} {limit}", show, unit)


def _decimal(value: float) -> str:
    if not math.isfinite(value):
        return percent(value)
    return f"{value:.3g}".replace("-", "\u2212")


def bounded(run: Run, name: str, constraint: Constraint, task: str, split: str) -> Estimate:
    """Return what a constraint bounds of an edit on a control task."""
    return gates.bounded(
        constraint, run.scores.score(name, task, split), run.scores.score("pretrained", task, split)
    )


def feasible_on_test(run: Run, name: str, constraint: Constraint) -> gates.Feasibility:
    """Return whether an edit keeps its constraint on test data."""
    return gates.feasibility(
        constraint,
        {task: run.scores.score(name, task) for task in constraint.tasks},
        {task: run.scores.score("pretrained", task) for task in constraint.tasks},
    )


FEASIBLE = {
    "feasible": "feasible on test data",
    "infeasible": "infeasible on test data: not to be used",
    "open": "open on test data: an interval holds the bound",
}


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
    words = wording(edit.constraint)
    found = [
        f"{words.figure} on {task} {words.value(bounded(run, name, edit.constraint, task, 'test'))}"
        for task in edit.constraint.tasks
    ]
    return f"; {spoken(found)}, with {words.asked} asked for"


def _best_on_validation(run: Run, gains: Gains) -> Gain:
    return max(
        gains.rows,
        key=lambda row: run.scores.accuracy(row.edit, gains.task, "validation").value,
    )
