"""Show what came out: a page for the first seed, a table of results over all seeds.

Both are functions of the artifacts, params.yaml and the stage graph alone: no time, host, path or
run id goes in, so that the same experiment gives the same bytes.
"""

import importlib
import math
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tasks import graph, kept, results
from tasks.artifacts import EXPERIMENTS, Artifacts
from tasks.findings import (
    FEASIBLE,
    Run,
    bound_verdict,
    bounded,
    cosine_text,
    feasible_on_test,
    forgetting,
    gain_sentences,
    gather,
    group_gains,
    groups,
    headlines,
    percent,
    read_table,
    signed,
    span,
    spoken,
    wording,
)
from tasks.stages import Emit
from tasks.studies import study
from tasks.studies.collect import collect
from taskvec import gates, pictures, summaries, tables
from taskvec import params as parameters
from taskvec.atomic import write_text
from taskvec.errors import InvalidInput, nearest
from taskvec.params import Constraint, EditParams, Params


def report(artifacts: Artifacts, *, page: str, params: Params, emit: Emit) -> None:
    """Write a page.

    ``page`` (HTML) shows the first seed, ``results`` (Markdown) all seeds, ``study`` what the
    experiment's study shows, and ``studies`` what all studies of the repository show.

    Args:
        artifacts: where files lie.
        page: which of the two.
        params: the checked parameters.
        emit: is told the progress; nothing to tell.

    Raises:
        InvalidInput: there is no such page.
        MissingArtifact: an earlier stage has not run.
    """
    del emit
    match page:
        case "page":
            write_text(artifacts.report(), render_page(artifacts, params))
        case "results":
            runs = [gather(artifacts, params, seed) for seed in params.seeds]
            write_text(artifacts.results(), results.render(runs, params))
        case "study":
            module = importlib.import_module(f"tasks.studies.{params.study}")
            study.write(artifacts, getattr(module, str(params.study))(artifacts, params))
        case "studies":
            write_text(artifacts.studies(), _studies(artifacts))
        case _:
            pages = ["page", "results", "study", "studies"]
            raise InvalidInput(f"report has no page {page!r}; {nearest(page, pages)}")


def _studies(artifacts: Artifacts) -> str:
    """Return what all studies that have run show, by the names of their experiments."""
    texts, cut = {}, []
    for path in sorted(artifacts.root.glob(f"{EXPERIMENTS}/*/{artifacts.study_text().name}")):
        name = path.parent.name
        texts[name] = path.read_text()
        cut += [f"{name}: {what}" for what in parameters.load(path.parent / "params.yaml").cut]
    return collect(texts, cut)


def render_page(artifacts: Artifacts, params: Params) -> str:
    """Return the page for the first seed as HTML."""
    run = gather(artifacts, params, params.seeds[0])
    edits = {name: edit for name, edit in params.edits.items() if name in run.chosen}
    params = params.model_copy(update={"edits": edits})
    training = {
        task: read_table(artifacts.training(task, run.seed), tables.Training)
        for task in params.tasks
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, signed=signed, span=span, cosine=cosine_text)
    template = environment.get_template("report.html.jinja")
    return template.render(
        params=params,
        run=run,
        headlines=headlines(run, params),
        rows=_result_rows(run, params),
        edits=_edit_rows(run, params),
        forgotten=_forgotten_rows(run, params),
        curves=[_search_figure(run, params, name) for name in params.edits],
        groups=_group_figures(run, params),
        cosine_figure=_cosine_figure(run),
        loss_figure=Markup(
            kept.once(
                pictures.losses, training, "losses",
                f"Fine-tuning loss by step; panels: {spoken(list(training))}",
            )
        ),
        training={task: table["loss"] for task, table in training.items()},
        graph_figure=_graph_figure(artifacts.root),
    ).strip() + "\n"  # fmt: skip


def _result_rows(run: Run, params: Params) -> list[dict[str, Any]]:
    """Return a row a model: its scores by task, and the mean normalised accuracy of an edit."""
    rows: list[dict[str, Any]] = [
        {"name": "pre-trained", "model": "pretrained", "note": "before any edit", "mean": None},
        {"name": "fine-tuned", "model": "finetuned", "note": "one expert a task", "mean": None},
    ]
    for name, variant in params.variants.items():
        note = f"fine-tuned on {spoken(variant.of)}"
        rows.append({"name": name, "model": name, "note": note, "mean": None})
    for name, edit in params.edits.items():
        several = len(edit.evaluate) > 1
        rows.append(
            {
                "name": name,
                "model": name,
                "note": run.coefficients(name),
                "mean": run.scores.normalized(name, edit.evaluate) if several else None,
                "before": run.scores.normalized("pretrained", edit.evaluate) if several else None,
            }
        )
    for row in rows:
        row["scores"] = {task: run.scores.find(row["model"], task) for task in params.tasks}
    return rows


def _edit_rows(run: Run, params: Params) -> list[dict[str, Any]]:
    """Return a row an edit: what was searched, what was chosen, whether the constraint holds."""
    rows = []
    for name, edit in params.edits.items():
        rows.append(
            {
                "name": name,
                "expression": " ".join(edit.expression.split()),
                "objective": _objective(edit),
                "tasks": spoken(edit.objective.tasks),
                "coefficients": run.coefficients(name),
                "value": _reached(run, name, edit),
                "points": len(run.searches[name]),
                "interval": run.intervals(name),
                "price": run.price(name),
                "constraint": _constraint_rows(run, name, edit.constraint),
                "verdict": FEASIBLE[feasible_on_test(run, name, edit.constraint)]
                if edit.constraint
                else "",
            }
        )
    return rows


def _constraint_rows(
    run: Run, name: str, constraint: Constraint | None
) -> list[dict[str, dict[str, str]]]:
    """Return a row a control task: for each split the figure, its interval and what they say."""
    if not constraint:
        return []
    words, rows = wording(constraint), []
    for task in constraint.tasks:
        row = {}
        for split in ("validation", "test"):
            figure = bounded(run, name, constraint, task, split)
            row[split] = {
                "figure": f"{words.figure} on {task}",
                "value": f"{words.show(figure.value)}{words.unit}",
                "span": words.span(figure),
                "verdict": bound_verdict(constraint, figure),
                "tone": "good" if gates.holds(constraint, figure) else "bad",
            }
        rows.append(row)
    return rows


def _objective(edit: EditParams) -> str:
    return f"{'largest' if edit.objective.maximize else 'smallest'} {_measured(edit)}"


def _measured(edit: EditParams) -> str:
    """Return what the objective makes large or small."""
    metric = str(edit.objective.maximize or edit.objective.minimize)
    mean = "mean " if len(edit.objective.tasks) > 1 else ""
    return mean + metric.replace("_", " ").replace("normalized", "normalised")


def _quantity(edit: EditParams) -> pictures.Quantity:
    losing = "loss" in (edit.objective.maximize, edit.objective.minimize)
    return pictures.NATS if losing else pictures.PERCENT


def _reached(run: Run, name: str, edit: EditParams) -> str:
    """Return the objective at the chosen coefficients, on validation data."""
    value = float(run.chosen[name]["objective"])
    return f"{percent(value)} %" if _quantity(edit) is pictures.PERCENT else f"{value:.3g} nats"


def _forgotten_rows(run: Run, params: Params) -> list[dict[str, Any]]:
    """Return a row an edit that forgets and a task: target, control, or neither."""
    rows = []
    for name, edit in forgetting(params).items():
        controls = edit.constraint.tasks if edit.constraint else []
        for task in edit.evaluate:
            target = task in edit.objective.tasks
            rows.append(
                {
                    "edit": name,
                    "task": task,
                    "role": "target" if target else "control" if task in controls else "bystander",
                    "chance": run.scores.score(name, task).chance,
                    "before": run.scores.above_chance("pretrained", task),
                    "after": run.scores.above_chance(name, task),
                    "gone": run.scores.forgotten(name, task),
                }
            )
    return rows


def _search_figure(run: Run, params: Params, name: str) -> dict[str, Any]:
    """Return the figure of an edit's search with its caption."""
    edit, table = params.edits[name], run.chosen_search(name)
    names = sorted(edit.coefficients)
    objective, quantity = _measured(edit), _quantity(edit)
    label = (
        f"Search of {name} on validation data: {len(table)} points, {_objective(edit)} of "
        f"{spoken(edit.objective.tasks)}; chosen {run.coefficients(name)} with "
        f"{_reached(run, name, edit)}"
    )
    ident = f"search-{name}"
    kind = _figure_kind(table, names)
    if kind == "curves":
        svg = kept.once(
            pictures.curves, table, names[0], objective, quantity, list(params.tasks), ident, label
        )
    elif kind == "surface":
        svg = kept.once(
            pictures.surface, table, (names[0], names[1]), objective, quantity, ident, label
        )
    else:
        largest = edit.objective.maximize is not None
        svg = kept.once(
            pictures.profiles, table, names, quantity, largest=largest, ident=ident, label=label
        )
    return {
        "name": name,
        "svg": Markup(svg),
        "coefficients": names,
        "table": table,
        "constrained": _broken(edit, table, kind),
    }


def _figure_kind(table: pd.DataFrame, names: list[str]) -> Literal["curves", "surface", "profiles"]:
    """Return what shows a search: a map needs two coefficients, and a whole grid of them."""
    if len(names) == 1:
        return "curves"
    columns = [f"coefficient.{name}" for name in names]
    cells = math.prod(table[column].nunique() for column in columns)
    whole = len(table) == cells and not table.duplicated(columns).any()
    return "surface" if len(names) == 2 and whole else "profiles"


def _broken(edit: EditParams, table: pd.DataFrame, kind: str) -> str:
    """Return where a search breaks its constraint, as a caption; empty without a constraint.

    Args:
        edit: whose search.
        table: what the figure shows.
        kind: "curves", "surface" or "profiles".
    """
    if not edit.constraint:
        return ""
    words = wording(edit.constraint)
    rule = f"{words.figure} on {spoken(edit.constraint.tasks)}, {words.asked}"
    if table["feasible"].all():
        return f"Constraint: {rule}; no point breaks it."
    if kind == "profiles":
        return f"Constraint: {rule}; only points that keep it."
    mark = "Shaded" if kind == "curves" else "Hatched"
    return f"{mark}: points that break the constraint ({rule})."


def _group_figures(run: Run, params: Params) -> list[dict[str, Any]]:
    """Return, for each group and task, the bars and the table of gains."""
    found = []
    for group, edits in groups(params).items():
        for gains in group_gains(run.scores, params, edits):
            ends = {"pretrained": "pre-trained", "finetuned": "fine-tuned on it"}
            rows = [
                *(pictures.Bar(row.edit, row.accuracy) for row in gains.rows),
                *(
                    pictures.Bar(label, run.scores.accuracy(model, gains.task), reference=True)
                    for model, label in ends.items()
                ),
            ]
            rows.sort(key=lambda bar: -bar.estimate.value)
            label = f"Test accuracy on {gains.task} in percent: " + ", ".join(
                f"{bar.label} {percent(bar.estimate.value)}" for bar in rows
            )
            found.append(
                {
                    "name": group,
                    "task": gains.task,
                    "scored": run.scores.score("pretrained", gains.task).items,
                    "svg": Markup(
                        kept.once(pictures.bars, rows, f"group-{group}-{gains.task}", label)
                    ),
                    "gains": gains,
                    "expressions": {n: " ".join(e.expression.split()) for n, e in edits.items()},
                    "sentences": gain_sentences(gains),
                }
            )
    return found


def _cosine_figure(run: Run) -> dict[str, Any] | None:
    """Return the heat map and its caption; None where there is only one task."""
    names = list(run.cosines.index)
    if len(names) < 2:
        return None
    left, right, value = summaries.closest(run.cosines, names)
    caption = f"The closest two are {left} and {right}: {value:.2f}."
    label = f"Cosine similarity of the task vectors of {spoken(names)}. {caption}"
    svg = kept.once(pictures.heat_map, run.cosines, "cosines", label)
    return {"svg": Markup(svg), "caption": caption}


def _graph_figure(root: Path) -> dict[str, Any]:
    """Return the picture of all stages that the page depends on."""
    stages = graph.ancestors(graph.stage_graph(root), "report")
    stacks = graph.columns(stages)
    items = [stage.item for stage in stages if stage.item]
    suffix = items[-1][items[-1].rfind("-") :] if items and "-" in items[-1] else ""
    nodes = [
        pictures.Node(stage.name, stage.item.removesuffix(suffix) or stage.kind, column)
        for column, stack in enumerate(stacks)
        for stage in stack
    ]
    headings = [stack[0].kind for stack in stacks]
    label = f"Stage graph: {len(stages)} stages in the order {', then '.join(headings)}"
    svg = kept.once(pictures.graph, headings, nodes, graph.edges(stages), "graph", label)
    return {"svg": Markup(svg), "stages": len(stages), "kinds": headings}
