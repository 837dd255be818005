"""The table of results over all seeds, as Markdown for the repository."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tasks.findings import (
    Run,
    bound_verdict,
    bounded,
    cosine_text,
    feasible_on_test,
    forgetting,
    gain_verdict,
    group_gains,
    groups,
    learning,
    merit,
    percent,
    percent_of,
    signed,
    span,
    spoken,
    wording,
)
from taskvec import summaries
from taskvec.params import Constraint, EditParams, Params
from taskvec.summaries import Estimate, Gains

MARK = "<!-- written by the report stage; do not edit -->"


def render(runs: Sequence[Run], params: Params) -> str:
    """Return the results over all seeds as Markdown."""
    seeds = ", ".join(str(run.seed) for run in runs)
    parts = [
        MARK,
        "# Results",
        f"Test accuracy in percent, seed{'s' if len(runs) > 1 else ''} {seeds}. Coefficients are "
        "chosen on validation data. In brackets: 95 % intervals over the drawing of test items, "
        "or, beside a mean, the range over seeds. A seed decides the order of the batches; test "
        "items are the same for all seeds.",
        "## Summary",
        _summary(runs, params),
        "## Accuracy",
        _accuracy_table(runs, params),
        *(_learning_part(runs, name, edit) for name, edit in learning(params).items()),
        *(_forgetting_part(runs, name, edit) for name, edit in forgetting(params).items()),
        *(_group_part(runs, params, name, edits) for name, edits in groups(params).items()),
        _cosine_part(runs[0], params),
        _overrides(params),
        "## How the intervals are made",
        "Accuracies have Wilson intervals. Intervals of differences (Newcombe's hybrid score), "
        "ratios (Donner and Zou) and means are built from the Wilson bounds; a loss has a normal "
        "interval. They take the two "
        "models as independent although both see the same items, which usually makes them wider "
        "than paired intervals. None covers the choice of the coefficient, the tasks or the seed.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(runs: Sequence[Run], params: Params) -> str:
    """Return one row an edit: what it is for, before and after, and what it kept."""
    header = ["edit", "what", "pre-trained", "edited", *(f"seed {run.seed}" for run in runs)]
    rows = []
    for name, edit in params.edits.items():
        target = edit.objective.tasks if edit.objective.minimize else edit.evaluate
        several = len(target) > 1
        what = "normalised accuracy, mean" if several else f"accuracy on {target[0]}"
        before, after = (
            [
                (
                    run.scores.normalized(model, target)
                    if several
                    else run.scores.accuracy(model, target[0])
                )
                for run in _made(runs, name)
            ]
            for model in ("pretrained", name)
        )
        rows.append(
            [
                f"`{_code(edit.expression)}`",
                what,
                *(over_seeds([e.value for e in before]) or [percent(before[0].value)]),
                *(over_seeds([e.value for e in after]) or [percent(after[0].value)]),
                *_by_seed(runs, name, map(figure, after)),
            ]
        )
        if edit.constraint:
            rows += [_control_row(runs, name, edit.constraint, t) for t in edit.constraint.tasks]
    return markdown_table(header, rows, 2)


def _control_row(runs: Sequence[Run], name: str, constraint: Constraint, task: str) -> list[str]:
    """Return the row of the summary that shows what a constraint bounds."""
    words = wording(constraint)
    found = [bounded(run, name, constraint, task, "test") for run in _made(runs, name)]
    values = [figure.value for figure in found]
    return [
        "",
        f"{words.figure} on {task}",
        "",
        *(over_seeds(values, words.show) or [words.show(values[0])]),
        *_by_seed(runs, name, (f"{words.show(e.value)} ({words.span(e)})" for e in found)),
    ]


def _made(runs: Sequence[Run], edit: str) -> list[Run]:
    """Return the runs whose seed an edit is made for."""
    return [run for run in runs if edit in run.chosen]


def _by_seed(runs: Sequence[Run], edit: str, cells: Iterable[str]) -> list[str]:
    """Return a cell a run; an empty one where the edit is not made for the seed."""
    found = iter(cells)
    return [next(found) if edit in run.chosen else "" for run in runs]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Return a table; the first ``left`` columns are text, the others figures."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def over_seeds(values: Sequence[float], show: Any = percent) -> list[str]:
    """Return the mean with the range over seeds; nothing where there is one seed."""
    if len(values) == 1:
        return []
    mean = math.fsum(values) / len(values)
    low, high = show(min(values)), show(max(values))
    return [f"{show(mean)} [{low} to {high}]" if low != high else show(mean)]


def figure(estimate: Estimate, show: Any = percent) -> str:
    """Return an estimate with its interval: ``87.1 (84.9 to 89.3)``."""
    return f"{show(estimate.value)} ({span(estimate)})"


def _mean_cell(runs: Sequence[Run], values: Sequence[float]) -> list[str]:
    """Return the mean with the range under `_mean_head`; of one value, that value."""
    return (over_seeds(values) or [percent(values[0])]) if len(runs) > 1 else []


def _mean_head(runs: Sequence[Run]) -> list[str]:
    return ["mean [range]"] if len(runs) > 1 else []


def _accuracy_table(runs: Sequence[Run], params: Params) -> str:
    header = ["model", "task", "items", *_mean_head(runs), *(f"seed {run.seed}" for run in runs)]
    rows = []
    for model in ("pretrained", "finetuned", *params.variants, *params.edits):
        for task in params.tasks:
            found = [run.scores.find(model, task) for run in runs]
            known = [score for score in found if score]
            if not known:
                continue
            rows.append(
                [
                    model,
                    task,
                    str(known[0].items),
                    *_mean_cell(runs, [score.accuracy.value for score in known]),
                    *(figure(score.accuracy) if score else "" for score in found),
                ]
            )
    return markdown_table(header, rows, 2)


def _learning_part(runs: Sequence[Run], name: str, edit: EditParams) -> str:
    """Return mean normalised accuracy, and the points above the pre-trained model's."""
    runs = _made(runs, name)
    what = "accuracy" if len(edit.evaluate) == 1 else "mean normalised accuracy"
    header = ["seed", "coefficients", name, "pretrained", "points above"]
    values = [(merit(run, name, edit), merit(run, "pretrained", edit)) for run in runs]
    rows = [
        [
            str(run.seed),
            run.coefficients(name),
            figure(value),
            figure(before),
            figure(value - before, signed),
        ]
        for run, (value, before) in zip(runs, values, strict=True)
    ]
    if len(runs) > 1:
        rows.append(
            [
                "mean [range]",
                "",
                *over_seeds([value.value for value, _ in values]),
                *over_seeds([before.value for _, before in values]),
                *over_seeds([(value - before).value for value, before in values], signed),
            ]
        )
    verdict = _count_verdicts([value - before for value, before in values])
    return "\n\n".join(
        [
            f"## {name}: {what}",
            f"`{_code(edit.expression)}`, over {spoken(edit.evaluate)}.",
            markdown_table(header, rows, 2),
            f"Against the pre-trained model {verdict}.",
            _search_part(runs, name),
            *(_constraint_part(runs, name, edit.constraint) if edit.constraint else ()),
        ]
    )


def _search_part(runs: Sequence[Run], name: str) -> str:
    """Return what a search cost, and which other coefficients do as well."""
    prices = [run.price(name) for run in runs]
    if len(set(prices)) > 1:
        prices = [f"{price} (seed {run.seed})" for run, price in zip(runs, prices, strict=True)]
    intervals = [f"seed {run.seed}: {text}" for run in runs if (text := run.intervals(name))]
    parts = [f"The search cost {'; '.join(dict.fromkeys(prices))}."]
    if intervals:
        parts.append(
            "Not significantly worse on validation data (paired bootstrap, 95 %): "
            f"{'; '.join(intervals)}."
        )
    return " ".join(parts)


def _forgetting_part(runs: Sequence[Run], name: str, edit: EditParams) -> str:
    """Return what is left of the targets and what the controls keep, on both splits."""
    runs = _made(runs, name)
    header = ["seed", "coefficients", "target", "above chance before", "after", "forgotten"]
    rows = [
        [
            str(run.seed),
            run.coefficients(name),
            task,
            figure(run.scores.above_chance("pretrained", task)),
            figure(run.scores.above_chance(name, task)),
            figure(run.scores.forgotten(name, task)),
        ]
        for task in edit.objective.tasks
        for run in runs
    ]
    parts = [
        f"## {name}: forgetting {spoken(edit.objective.tasks)}",
        f"`{_code(edit.expression)}`. Accuracy above chance in points, and the share of it that is "
        "gone in percent.",
        markdown_table(header, rows, 3),
        _search_part(runs, name),
    ]
    if edit.constraint:
        parts += _constraint_part(runs, name, edit.constraint)
    named = {*edit.objective.tasks, *(edit.constraint.tasks if edit.constraint else [])}
    changes = []
    for task in (task for task in edit.evaluate if task not in named):
        before, after = (
            percent(math.fsum(run.scores.accuracy(model, task).value for run in runs) / len(runs))
            for model in ("pretrained", name)
        )
        changes.append(f"{task} from {before} to {after}")
    if changes:
        parts.append(f"Neither target nor control, mean over seeds: {spoken(changes)} % accuracy.")
    return "\n\n".join(parts)


def _constraint_part(runs: Sequence[Run], name: str, constraint: Constraint) -> list[str]:
    """Return what the control tasks of an edit keep on both splits, and whether that is enough."""
    words = wording(constraint)
    rows = []
    for task in constraint.tasks:
        for run in runs:
            row = [str(run.seed), task]
            for split in ("validation", "test"):
                figure = bounded(run, name, constraint, task, split)
                row += [words.value(figure), bound_verdict(constraint, figure)]
            rows.append(row)
    found = [feasible_on_test(run, name, constraint) for run in runs]
    seeds = [f"{word} for seed {run.seed}" for run, word in zip(runs, found, strict=True)]
    return [
        f"Constraint on validation data: {words.figure}, {words.asked}.",
        markdown_table(["seed", "control", "validation", "", "test", ""], rows, 2),
        f"On test data the edit is {spoken(seeds)} (open: the interval holds the bound).",
    ]


def _group_part(
    runs: Sequence[Run], params: Params, group: str, edits: Mapping[str, EditParams]
) -> str:
    """Return the gains of a group with their intervals and what they support."""
    parts = [f"## {group}"]
    runs = [run for run in runs if all(name in run.chosen for name in edits)]
    if not runs:
        return "\n\n".join([*parts, "No seed has all of these edits: they are not compared."])
    per_run = [{gains.task: gains for gains in group_gains(r.scores, params, edits)} for r in runs]
    for task in per_run[0]:
        found = [by_task[task] for by_task in per_run]
        header = ["edit", "expression", "seed", "accuracy", "over pretrained", "over best single"]
        rows = []
        for name, edit in edits.items():
            for run, by_task in zip(runs, per_run, strict=True):
                for row in (row for row in by_task[task].rows if row.edit == name):
                    single = figure(row.over_single, signed) if row.over_single else ""
                    rows.append(
                        [
                            name,
                            f"`{_code(edit.expression)}`",
                            str(run.seed),
                            figure(row.accuracy),
                            figure(row.over_pretrained, signed),
                            single,
                        ]
                    )
        ends = ", ".join(
            f"seed {run.seed} {percent_of(run, 'pretrained', task)} and "
            f"{percent_of(run, 'finetuned', task)}"
            for run in runs
        )
        parts += [
            f"On {task}; pre-trained and fine-tuned on it: {ends}. The best single vector is "
            f"chosen on validation data ({_singles(runs, found)}). Gains in points.",
            markdown_table(header, rows, 3),
            _supported(found),
        ]
    return "\n\n".join(part for part in parts if part)


def _singles(runs: Sequence[Run], found: Sequence[Gains]) -> str:
    names = [gains.single or "none in the group" for gains in found]
    if len(set(names)) == 1:
        return names[0]
    return ", ".join(f"seed {run.seed}: {name}" for run, name in zip(runs, names, strict=True))


def _supported(found: Sequence[Gains]) -> str:
    """Return a list: for each edit of several vectors, what the intervals of all seeds support."""
    lines = []
    for name in sorted({row.edit for row in found[0].rows}):
        rows = [row for gains in found for row in gains.rows if row.edit == name]
        singles = [row.over_single for row in rows if row.over_single]
        if not singles:
            continue
        text = f"- {name}: against the pre-trained model "
        text += _count_verdicts([row.over_pretrained for row in rows])
        text += f"; against the best single vector {_count_verdicts(singles)}"
        plain = [row.plain for row in rows if row.plain]
        if plain:
            verdict = _count_verdicts([gain for _, gain in plain])
            text += f"; against {plain[0][0]}, the same without the minus term, {verdict}"
        lines.append(f"{text}.")
    return "\n".join(lines)


def _count_verdicts(estimates: Sequence[Estimate]) -> str:
    """Return ``a gain is supported in 2 of 2 seeds``, one clause a verdict."""
    verdicts = [gain_verdict(estimate) for estimate in estimates]
    if len(verdicts) == 1:
        return verdicts[0]
    kinds = sorted(set(verdicts), key=lambda kind: (-verdicts.count(kind), kind))
    return " and ".join(
        f"{kind} in {verdicts.count(kind)} of {len(verdicts)} seeds" for kind in kinds
    )


def _cosine_part(run: Run, params: Params) -> str:
    """Return the cosine matrix of one seed, and the closest tasks of the first edit of several."""
    names = [str(name) for name in run.cosines.index]
    if len(names) < 2:
        return ""
    rows = [
        [left, *(cosine_text(value) for value in values)]
        for left, values in zip(names, run.cosines.to_numpy(), strict=True)
    ]
    used = [params.parse(edit).vectors for edit in params.edits]
    several = next((found for found in used if len(found) > 1), None)
    chosen = [name for name in names if name in several] if several else names
    left, right, value = summaries.closest(run.cosines, chosen)
    others = f"the {len(chosen)} tasks of the first edit of several vectors" if several else "all"
    return "\n\n".join(
        [
            f"## Cosines between task vectors, seed {run.seed}",
            markdown_table(["", *names], rows, 1),
            f"Among {others} the closest two are {left} and {right}: {value:.3f}.",
        ]
    )


def _overrides(params: Params) -> str:
    """Return which gates may be closed, and why; empty if none is overridden."""
    lines = [f"- {gate}: {reason}" for gate, reason in params.gates.override.items()]
    return "\n\n".join(["## Overridden gates", "\n".join(lines)]) if lines else ""


def _code(expression: str) -> str:
    return " ".join(expression.split())
