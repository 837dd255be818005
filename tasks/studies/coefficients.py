"""One coefficient against one for each task and each layer, found by gradient descent."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.artifacts import Artifacts
from tasks.findings import signed, spoken
from tasks.studies.reading import by_seed, chosen, group, named
from tasks.studies.study import Study, picture
from tasks.studies.words import cell, columns, decimal, judge, points, seeds_note, several
from taskvec import layered
from taskvec.errors import InvalidParams
from taskvec.params import Params
from taskvec.search import SLOPE_PRICE
from taskvec.spread import mean_of
from taskvec.study_pictures import Axis, Line, dots, lines
from taskvec.summaries import Estimate, Scores

GROUP, SINGLE, TASKS, LAYERS = "coefficients", "single", "per_task", "per_layer"
WHAT = "an advantage of per-task coefficients over a single one"
SPLITS = ("validation", "test")
MARK = "coefficient."


@dataclass(frozen=True)
class _Way:
    """What the search of one edit chose, cost and reached; figures one a seed.

    Attributes:
        chosen: coefficients.json of each seed.
        normalized: split -> mean over tasks of accuracy / fine-tuned accuracy.
    """

    chosen: Sequence[Mapping[str, Any]]
    normalized: Mapping[str, Sequence[Estimate]]

    def values(self, split: str) -> list[float]:
        """Return the normalised accuracies without their intervals."""
        return [item.value for item in self.normalized[split]]

    def gain(self, other: "_Way", split: str) -> Estimate:
        """Return the mean of the differences to another way, seed by seed."""
        return mean_of(_differences(self.values(split), other.values(split)))

    def coefficients(self) -> list[dict[str, float]]:
        """Return ``NAME`` or ``NAME@LAYER`` -> value for each seed."""
        return [
            {
                key.removeprefix(MARK): float(value)
                for key, value in sorted(item.items())
                if key.startswith(MARK)
            }
            for item in self.chosen
        ]


def coefficients(artifacts: Artifacts, params: Params) -> Study:
    """Return the page that compares one coefficient with one for each task and layer.

    The paper has one for all (arXiv:2212.04089, section 4).
    """
    edits = group(params, GROUP)
    tasks = named(edits, SINGLE, "edits").evaluate
    seeds = params.seeds_of(edits[SINGLE])
    found = by_seed(artifacts, [*tasks, *edits], seeds)
    ways = {name: _way(artifacts, name, tasks, found) for name in edits}
    for name in (TASKS, LAYERS):
        named(ways, name, "edits")
    layers = points(ways[LAYERS].gain(ways[SINGLE], "test"))
    text = [
        f"With a coefficient for each layer instead of each task the change on test data is "
        f"{layers}.",
        f"Mean normalised accuracy over {len(tasks)} tasks, in percent. {seeds_note(seeds)} The "
        "gap is validation minus test, in points: validation data chooses. *Test against single* "
        "has Student's t interval of the differences of the same seed. The price counts every "
        f"validation image each time it is asked, {SLOPE_PRICE} times where it is differentiated.",
        columns(
            {_label(name): _row(way, ways[SINGLE], name == SINGLE) for name, way in ways.items()},
            ["coefficients", "number", "validation", "test", "gap", "test against single",
             "image evaluations"],
        ),
        _learnt(ways, seeds),
        picture("Coefficient of each task", "tasks"),
        picture("Coefficient of each layer", "layers"),
    ]  # fmt: skip
    figures = {
        "tasks": _tasks_picture(params, ways, seeds),
        "layers": _layers_picture(ways, seeds),
    }
    validation, test = (ways[TASKS].gain(ways[SINGLE], split) for split in SPLITS)
    verdict = _verdict(validation, test, len(seeds))
    title = "One coefficient, or one for each task and layer"
    return Study(title, verdict, "\n\n".join(text), figures)


def _way(
    artifacts: Artifacts, name: str, tasks: Sequence[str], found: Mapping[int, Scores]
) -> _Way:
    return _Way(
        [chosen(artifacts, name, seed) for seed in found],
        {split: [one.normalized(name, tasks, split) for one in found.values()] for split in SPLITS},
    )


def _differences(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(left, right, strict=True)]


def _verdict(validation: Estimate, test: Estimate, seeds: int) -> str:
    statement = (
        "coefficients for each task, by gradient descent on validation data, change the mean "
        f"normalised accuracy by {points(validation)} on validation data and by {points(test)} on "
        f"test data against the best single coefficient of a grid (t intervals over {seeds} seeds)"
    )
    if (validation.low > 0) != (test.low > 0):
        where, other = SPLITS if validation.low > 0 else reversed(SPLITS)
        return f"Only half of {WHAT} shows here, on {where} but not on {other} data: {statement}."
    whole = Estimate(
        min(validation.value, test.value),
        min(validation.low, test.low),
        max(validation.high, test.high),
    )
    return judge(statement, whole, what=WHAT)


def _row(way: _Way, single: _Way, is_single: bool) -> list[str]:
    prices = [int(item["image_evaluations"]) for item in way.chosen]
    return [
        str(len(way.coefficients()[0])),
        *(cell(way.normalized[split]) for split in SPLITS),
        several(_differences(way.values("validation"), way.values("test")), signed),
        "" if is_single else cell([way.gain(single, "test")], signed),
        f"{sum(prices) / len(prices):,.0f}",
    ]


def _learnt(ways: Mapping[str, _Way], seeds: Sequence[int]) -> str:
    """Return a sentence about the coefficients that the pictures do not show."""
    rest = [
        decimal(found[name])
        for found in ways[LAYERS].coefficients()
        for name in found
        if name.endswith(f"{layered.MARK}{layered.REST}")
    ]
    outside = f" What is in no block has {spoken(rest)}." if rest else ""
    return (
        f"The pictures show `{TASKS}` and `{LAYERS}` for the seeds "
        f"{spoken([str(seed) for seed in seeds])}; the broken line is the single coefficient, "
        f"mean over seeds.{outside}"
    )


def _tasks_picture(params: Params, ways: Mapping[str, _Way], seeds: Sequence[int]) -> str:
    found = ways[TASKS].coefficients()
    scaled = params.parse(TASKS).basis
    names = sorted(scaled, key=lambda name: str(scaled[name]))
    shown = {
        f"seed {seed}": [_exact(values[name]) for name in names]
        for seed, values in zip(seeds, found, strict=True)
    }
    label = f"Coefficients of {len(names)} task vectors"
    axis = Axis("coefficient")
    return dots([str(scaled[n]) for n in names], shown, axis, "tasks", label, marks=_mark(ways))


def _layers_picture(ways: Mapping[str, _Way], seeds: Sequence[int]) -> str:
    shown = {}
    for seed, values in zip(seeds, ways[LAYERS].coefficients(), strict=True):
        blocks = _blocks(values)
        x = sorted(blocks)
        shown[f"seed {seed}"] = Line(x, [_exact(blocks[place]) for place in x])
    label = "Coefficient of each block of the network against its depth"
    across, up = Axis("block of the network", scale="even"), Axis("coefficient")
    return lines({"": shown}, across, up, "layers", label, marks=_mark(ways))


def _blocks(values: Mapping[str, float]) -> dict[float, float]:
    """Return depth -> coefficient of the only vector.

    Raises:
        InvalidParams: there are several vectors, or one coefficient for all layers.
    """
    own, *others = layered.grouped(values).values()
    if others or not isinstance(own, dict):
        raise InvalidParams(
            f"edits.{LAYERS} has the coefficients {spoken(sorted(values))}; this study needs one "
            "coefficient there, with search.options.layerwise: true"
        )
    return {float(name): value for name, value in own.items() if name != layered.REST}


def _exact(value: float) -> Estimate:
    return Estimate(value, -math.inf, math.inf)  # a choice has no interval, and none is drawn


def _mark(ways: Mapping[str, _Way]) -> dict[str, float]:
    values = [value for found in ways[SINGLE].coefficients() for value in found.values()]
    return {"single": math.fsum(values) / len(values)}


def _label(name: str) -> str:
    return name.replace("_", " ")
