"""The paper's own experiment: its published figures beside ours, as far as ours are there."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tasks.artifacts import Artifacts
from tasks.findings import percent
from tasks.studies.reading import by, scores
from tasks.studies.study import Study, picture
from tasks.studies.words import cell, judge, markdown_table, points
from taskvec.errors import InvalidData, MissingArtifact
from taskvec.params import Params
from taskvec.spread import averaged, mean_of
from taskvec.study_pictures import Axis, Cloud, scatter
from taskvec.summaries import Estimate, Scores, mean

COLUMNS = ["table", "model", "task", "what", "value", "source"]
MARGIN = 0.01  # a mean difference below a point is a reproduction
ALL = "mean"


@dataclass(frozen=True)
class Published:
    """A published figure.

    Attributes:
        table: of the paper, as text.
        model: the architecture, as params.yaml:model names it.
        task: what was evaluated, or "mean" for the mean normalised accuracy over all tasks of the
            edit.
        what: which of our models answers it: pretrained, finetuned, a variant or an edit.
        value: a fraction.
        source: where it is published.
    """

    table: str
    model: str
    task: str
    what: str
    value: float
    source: str


def clip8(artifacts: Artifacts, params: Params) -> Study:
    """Return the page that sets the paper's figures beside ours."""
    published = read_published(artifacts)
    found = [(item, _ours(artifacts, params, item)) for item in published]
    known = [(item, averaged(values)) for item, values in found if values]
    text = [
        f"{len(known)} of {len(published)} published figures have one of ours beside them: the "
        "others need data or weights that are not here, or another architecture than "
        f"{_architecture(params)}. In percent; brackets: 95 % intervals over our test items and "
        "ranges over seeds.",
        *([picture("Ours against published", "published")] if known else []),
        *(_table(name, rows) for name, rows in by(found, lambda pair: pair[0].table).items()),
    ]
    figures = {"published": _picture(known)} if known else {}
    title = "The paper's own experiment: CLIP on eight tasks"
    return Study(title, _verdict(known, len(published)), "\n\n".join(text), figures)


def read_published(artifacts: Artifacts) -> list[Published]:
    """Return the published figures, in the order of the file.

    Raises:
        MissingArtifact: there is no published.csv.
        InvalidData: it has other columns, or a value is no fraction.
    """
    path = artifacts.root / "published.csv"
    if not path.is_file():
        raise MissingArtifact(f"{path} does not exist; it comes with the repository")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or list(rows[0]) != COLUMNS:
        raise InvalidData(f"{path}: expected rows with the columns {', '.join(COLUMNS)}")
    return [_published(row, f"{path}:{line}") for line, row in enumerate(rows, 2)]


def _published(row: dict[str, str], place: str) -> Published:
    try:
        value = float(row["value"])
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value <= 1:
        raise InvalidData(f"{place}: {row['value']!r} is no fraction between 0 and 1")
    return Published(**{**{name: str(row[name]) for name in COLUMNS}, "value": value})  # type: ignore[arg-type]


def _architecture(params: Params) -> str:
    return str(params.model.options.get("name", params.model.family))


def _ours(artifacts: Artifacts, params: Params, item: Published) -> list[Estimate]:
    """Return our figure for each seed that has one."""
    if item.model != _architecture(params):
        return []
    tasks = [item.task]
    if item.task == ALL:
        tasks = params.edits[item.what].evaluate if item.what in params.edits else []
    if not tasks:
        return []
    own = [] if item.what in ("pretrained", "finetuned") else [item.what]
    values = []
    for seed in params.seeds:
        if all(artifacts.evaluation(name, seed).is_file() for name in [*tasks, *own]):
            found = scores(artifacts, [*tasks, *own], seed)
            values += _figure(found, item, tasks)
    return values


def _figure(found: Scores, item: Published, tasks: Sequence[str]) -> list[Estimate]:
    if any(found.find(item.what, task) is None for task in tasks):
        return []
    if item.task == ALL:
        return [found.normalized(item.what, tasks)]
    return [mean([found.accuracy(item.what, task) for task in tasks])]


def _verdict(known: Sequence[tuple[Published, Estimate]], number: int) -> str:
    if not known:
        return (
            f"Nothing is shown here: none of the {number} published figures has been computed, "
            "because the data sets and weights of this study are not here."
        )
    difference = mean_of([ours.value - item.value for item, ours in known])
    inside = sum(ours.low <= item.value <= ours.high for item, ours in known)
    statement = (
        f"our figures differ from {len(known)} of {number} published ones by {points(difference)} "
        f"on average (t interval over figures), and {inside} published ones lie inside the 95 % "
        "intervals of ours"
    )
    furthest = max(abs(difference.low), abs(difference.high))
    nearest = 0.0 if difference.low <= 0 <= difference.high else min(
        abs(difference.low), abs(difference.high)
    )  # fmt: skip
    closeness = Estimate(-abs(difference.value), -furthest, -nearest)
    what = f"agreement with the paper within {percent(MARGIN)} point on average"
    return judge(statement, closeness, -MARGIN, what=what)


def _table(name: str, rows: Sequence[tuple[Published, list[Estimate]]]) -> str:
    header = ["model", "task", "what", "published", "ours", "source"]
    cells = [
        [item.model, item.task, item.what, percent(item.value), cell(values) if values else "",
         item.source]
        for item, values in rows
    ]  # fmt: skip
    return f"### {name}\n\n{markdown_table(header, cells, 3)}"


def _picture(known: Sequence[tuple[Published, Estimate]]) -> str:
    clouds = {
        what: Cloud([item.value for item, _ in pairs], [ours.value for _, ours in pairs])
        for what, pairs in by(known, lambda pair: pair[0].what).items()
    }
    return scatter(
        clouds, Axis("published, %", 100), Axis("ours, %", 100), "published",
        "Our figures against the published ones", guide="diagonal",
    )  # fmt: skip
