"""The paper's own experiment: its published figures beside ours, as far as ours are there."""

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tasks.artifacts import Artifacts
from tasks.findings import percent
from tasks.studies.forgetting import METHODS, NEGATIVE
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
UNKNOWN, MEAN, JOINT = "not stated", "mean", "joint"
SUFFIX = "-quickgelu"  # of the same architecture, as open_clip calls it
# the method's name in published.csv -> what the page on forgetting calls it
FORGETTING = {
    "pretrained": "pre-trained",
    "finetuned": "fine-tuned",
    "gradient_ascent": "gradient ascent",
    "random_vector": "random vector",
    "negative_vector": "negative, largest",
}
TOGETHER = re.compile(r"multi_task(?:_(\d+)_steps)?")


@dataclass(frozen=True)
class Published:
    """A published figure.

    Attributes:
        table: what it belongs to.
        model: the architecture, or "not stated".
        task: what was forgotten or evaluated; the control task itself, or "mean", means all.
        what: METHOD.MEASURE, where the measure is target_accuracy, control_accuracy, accuracy or
            normalized_accuracy.
        value: a fraction.
        source: where it is published.
    """

    table: str
    model: str
    task: str
    what: str
    value: float
    source: str

    @property
    def method(self) -> str:
        """What was done to the model."""
        return self.what.partition(".")[0]

    @property
    def measure(self) -> str:
        """What was measured then."""
        return self.what.partition(".")[2]


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
        InvalidData: it has other columns, or a value is no percentage.
    """
    path = artifacts.published()
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
    if not 0 <= value <= 100:
        raise InvalidData(f"{place}: the value {row['value']!r} is no percentage from 0 to 100")
    return Published(
        row["table"], row["model"], row["task"], row["what"], value / 100, row["source"]
    )


def _architecture(params: Params) -> str:
    return str(params.model.options.get("name", params.model.family)).removesuffix(SUFFIX)


def _ours(artifacts: Artifacts, params: Params, item: Published) -> list[Estimate]:
    """Return our figure for each seed that has one."""
    if item.model not in (_architecture(params), UNKNOWN):
        return []
    wanted = _forgotten(params, item) or _together(params, item)
    names = dict.fromkeys(
        [task for _, task in wanted] + [name for name, _ in wanted if name != "pretrained"]
    )
    values = []
    for seed in params.seeds:
        if wanted and all(artifacts.evaluation(name, seed).is_file() for name in names):
            found = scores(artifacts, names, seed)
            if all(found.find(*pair) for pair in wanted):
                values.append(_figure(found, item, wanted))
    return values


def _forgotten(params: Params, item: Published) -> list[tuple[str, str]]:
    """Return the models and tasks of a figure on forgetting; none if it is another one."""
    constraints = {
        task: edit.constraint.tasks
        for task in params.tasks
        if (edit := params.edits.get(METHODS[NEGATIVE].format(task))) and edit.constraint
    }
    controls = {control for tasks in constraints.values() for control in tasks}
    targets = [item.task] if item.task in constraints else list(constraints)
    if item.method not in FORGETTING or item.task not in {MEAN, *targets} | controls:
        return []
    pattern = METHODS[FORGETTING[item.method]]
    if item.measure == "target_accuracy":
        return [(pattern.format(target), target) for target in targets]
    return [(pattern.format(t), control) for t in targets for control in constraints[t]]


def _together(params: Params, item: Published) -> list[tuple[str, str]]:
    """Return the model and tasks of a figure on joint fine-tuning; none if it is another one."""
    method = TOGETHER.fullmatch(item.method)
    if not method or item.task != MEAN or JOINT not in params.variants:
        return []
    if method[1] and int(method[1]) != params.recipe(JOINT).steps:
        return []
    return [(JOINT, task) for task in params.variants[JOINT].of]


def _figure(found: Scores, item: Published, wanted: Sequence[tuple[str, str]]) -> Estimate:
    if item.measure == "normalized_accuracy":
        return found.normalized(wanted[0][0], [task for _, task in wanted])
    accuracies = [found.accuracy(*pair) for pair in wanted]
    # All models see the same items of a control.
    return averaged(accuracies) if item.measure == "control_accuracy" else mean(accuracies)


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
        method: Cloud([item.value for item, _ in pairs], [ours.value for _, ours in pairs])
        for method, pairs in by(known, lambda pair: pair[0].method).items()
    }
    return scatter(
        clouds, Axis("published, %", 100), Axis("ours, %", 100), "published",
        "Our figures against the published ones", guide="diagonal",
    )  # fmt: skip
