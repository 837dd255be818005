"""Data-free merging methods on the same tasks with the same search budget."""

import math
from collections.abc import Mapping, Sequence

from tasks.artifacts import Artifacts
from tasks.findings import signed, spoken
from tasks.studies.reading import by_seed, chosen, group, named
from tasks.studies.study import Study, picture
from tasks.studies.words import (
    NORMALIZED,
    cell,
    coefficient,
    columns,
    judge,
    points,
    seeds_note,
    several,
)
from taskvec.params import EditParams, Params
from taskvec.spread import averaged
from taskvec.study_pictures import dots
from taskvec.summaries import Estimate, Scores

GROUP, PLAIN = "methods", "by_task_arithmetic"


def methods(artifacts: Artifacts, params: Params) -> Study:
    """Return the page that compares merging methods."""
    edits = group(params, GROUP)
    tasks = named(edits, PLAIN, "edits").evaluate
    seeds = params.seeds_of(edits[PLAIN])
    found = by_seed(artifacts, [*tasks, *edits], seeds)
    values = {name: [one.normalized(name, tasks) for one in found.values()] for name in edits}
    gains = {
        name: averaged([a - b for a, b in zip(item, values[PLAIN], strict=True)])
        for name, item in values.items()
    }
    rivals = [name for name in edits if name != PLAIN]
    best = max(rivals, key=lambda name: (_validated(found, name, tasks), name))
    verdict = judge(
        f"the mean normalised test accuracy of {_label(best)}, the best of {len(rivals)} other "
        f"methods on validation data, is {points(gains[best])} against task arithmetic",
        gains[best],
        what="an advantage over task arithmetic",
    )
    order = sorted(edits, key=lambda name: (-averaged(values[name]).value, name))
    rows = {
        _label(name): _row(artifacts, name, values[name], found, tasks, gains[name])
        for name in order
    }
    header = ["method", "accuracy", "normalised accuracy", "against task arithmetic",
              "c", "image evaluations"]  # fmt: skip
    text = [
        f"Means over {len(tasks)} tasks, test data, in percent. {seeds_note(seeds)} Every method "
        f"had a grid of {_points(edits)} values of its coefficient, whose range is wider where a "
        "method averages instead of adding. The price counts every validation image each time it "
        "is asked.",
        picture("Mean normalised accuracy of every method", "methods"),
        columns(rows, header),
        _differing(gains),
        *_alike(found, order, tasks),
    ]
    shown = {"method": [averaged(values[name]) for name in order]}
    floor = averaged([one.normalized("pretrained", tasks) for one in found.values()]).value
    marks = {"pre-trained": floor, "task arithmetic": averaged(values[PLAIN]).value}
    label = f"Mean normalised test accuracy of {len(edits)} merging methods"
    svg = dots([_label(n) for n in order], shown, NORMALIZED, "methods", label, marks=marks)
    return Study("Merging methods side by side", verdict, "\n\n".join(text), {"methods": svg})


def _label(name: str) -> str:
    return name.removeprefix("by_").replace("_", " ")


def _validated(found: Mapping[int, Scores], name: str, tasks: Sequence[str]) -> float:
    return averaged([one.normalized(name, tasks, "validation") for one in found.values()]).value


def _row(
    artifacts: Artifacts,
    name: str,
    values: Sequence[Estimate],
    found: Mapping[int, Scores],
    tasks: Sequence[str],
    gain: Estimate,
) -> list[str]:
    accuracy = [
        math.fsum(one.accuracy(name, task).value for task in tasks) / len(tasks)
        for one in found.values()
    ]
    taken = [chosen(artifacts, name, seed) for seed in found]
    coefficients = [
        float(value)
        for item in taken
        for key, value in sorted(item.items())
        if key.startswith("coefficient.")
    ]
    prices = [int(item["image_evaluations"]) for item in taken]
    return [
        several(accuracy),
        cell(values),
        "" if name == PLAIN else cell([gain], signed),
        coefficient(coefficients),
        f"{sum(prices) / len(prices):,.0f}",
    ]


def _alike(found: Mapping[int, Scores], names: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """Return a sentence for each group of methods that are equally right on every task."""
    groups: dict[tuple[float, ...], list[str]] = {}
    for name in names:
        figures = tuple(one.accuracy(name, task).value for one in found.values() for task in tasks)
        groups.setdefault(figures, []).append(_label(name))
    return [
        f"{spoken(group)} gave the same figures on every task: what tells them apart has no effect "
        "on this model. docs/method.md says which tensors each method treats in its own way."
        for group in groups.values()
        if len(group) > 1
    ]


def _points(edits: Mapping[str, EditParams]) -> str:
    numbers = {item.points for edit in edits.values() for item in edit.coefficients.values()}
    return spoken([str(number) for number in sorted(numbers)])


def _differing(gains: Mapping[str, Estimate]) -> str:
    better = [_label(name) for name, gain in gains.items() if name != PLAIN and gain.low > 0]
    worse = [_label(name) for name, gain in gains.items() if name != PLAIN and gain.high < 0]
    parts = [
        f"Significantly {word} than task arithmetic: {spoken(names) if names else 'none'}."
        for word, names in (("better", better), ("worse", worse))
    ]
    number = len(gains) - 1
    return (
        f"{' '.join(parts)} The intervals are unpaired, although all methods see the same items, "
        f"and so rather too wide; with {number} comparisons about {0.05 * number:.1f} "
        "would differ by chance."
    )
