"""Analogies: a style of some classes from three related ones, and how many labels that is worth."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tasks.artifacts import Artifacts
from tasks.findings import signed
from tasks.studies.reading import FewShots, by_seed, chosen, few_shots
from tasks.studies.study import Study, picture
from tasks.studies.words import ACCURACY, cell, columns, judge, points, seeds_note, several
from taskvec.errors import InvalidParams
from taskvec.params import FewShot, Params
from taskvec.spread import averaged, mean_of, over_range
from taskvec.study_pictures import Axis, Line, dots, lines
from taskvec.summaries import Estimate, Scores

# label -> the model's name for a sub-population D
MODELS = {
    "pre-trained": "pretrained",
    "same style": "{}_same_style",
    "same classes": "{}_same_classes",
    "sum": "{}_sum",
    "analogy": "{}_analogy",
    "free": "{}_free",
    "fine-tuned": "finetuned",
}
EDITS = ("same style", "same classes", "sum", "analogy", "free")
PAPER = 0.034  # arXiv:2212.04089, section 5


@dataclass(frozen=True)
class _Aim:
    """What all seeds say of one sub-population D."""

    name: str
    seeds: Mapping[int, Scores]

    def accuracy(self, label: str) -> list[Estimate]:
        model = MODELS[label].format(self.name)
        return [item.accuracy(model, self.name) for item in self.seeds.values()]

    def gain(self, label: str, over: str = "pre-trained") -> list[Estimate]:
        pairs = zip(self.accuracy(label), self.accuracy(over), strict=True)
        return [new - old for new, old in pairs]


def analogy(artifacts: Artifacts, params: Params) -> Study:
    """Return the page on analogies (arXiv:2212.04089, section 5)."""
    aims = _aims(artifacts, params)
    gain = _over_aims(aims, "analogy")
    plain = _over_aims(aims, "analogy", "sum")
    verdict = judge(
        f"on data without labels the accuracy of the analogy with one coefficient is "
        f"{points(gain)} against the pre-trained model, mean over {len(aims)} sub-populations "
        f"(paper: {signed(PAPER)}), and {points(plain)} against the sum without the minus term",
        gain,
    )
    shots, figures = _shots(artifacts, params)
    body = [_gains(aims), _prices(artifacts, params, aims), shots]
    names = [aim.name for aim in aims]
    figures["models"] = dots(
        names,
        {label: [averaged(aim.accuracy(label)) for aim in aims] for label in MODELS},
        ACCURACY,
        "models",
        f"Test accuracy of seven models on {', '.join(names)}",
    )
    return Study("Analogies: a sub-population without its labels", verdict,
                 "\n\n".join(filter(None, body)), figures)  # fmt: skip


def _aims(artifacts: Artifacts, params: Params) -> list[_Aim]:
    names = [name for name in params.tasks if MODELS["analogy"].format(name) in params.edits]
    if not names:
        raise InvalidParams("this study needs edits called D_analogy for tasks D in params.yaml")
    edits = [MODELS[label].format(name) for name in names for label in EDITS]
    seeds = params.seeds_of(params.edits[MODELS["analogy"].format(names[0])])
    found = by_seed(artifacts, [*names, *edits], seeds)
    return [_Aim(name, found) for name in names]


def _over_aims(aims: Sequence[_Aim], label: str, over: str = "pre-trained") -> Estimate:
    return mean_of([averaged(aim.gain(label, over)).value for aim in aims])


def _gains(aims: Sequence[_Aim]) -> str:
    header = ["D", *MODELS]
    rows = {aim.name: [cell(aim.accuracy(label)) for label in MODELS] for aim in aims}
    gains = {aim.name: [cell(aim.gain(label), signed) for label in EDITS] for aim in aims}
    gains["mean over D"] = [cell([_over_aims(aims, label)], signed) for label in EDITS]
    return "\n\n".join(
        [
            "### Accuracy on D",
            f"Test accuracy in percent. {seeds_note(list(aims[0].seeds))} None of the edits has "
            "seen training data of D; its validation data chooses the coefficients.",
            picture("Test accuracy on each sub-population", "models"),
            columns(rows, header),
            "Gains over the pre-trained model in points; the last row has t intervals over D. "
            f"By seed the mean gain of the analogy is {', '.join(map(signed, _by_seed(aims)))}.",
            columns(gains, ["D", *EDITS]),
        ]
    )


def _by_seed(aims: Sequence[_Aim]) -> list[float]:
    """Return the mean gain of the analogy over D for each seed."""
    gains = [[item.value for item in aim.gain("analogy")] for aim in aims]
    return [math.fsum(found) / len(aims) for found in zip(*gains, strict=True)]


def _prices(artifacts: Artifacts, params: Params, aims: Sequence[_Aim]) -> str:
    rows = {}
    for label in ("analogy", "free"):
        edits = [MODELS[label].format(aim.name) for aim in aims]
        prices = [
            int(chosen(artifacts, edit, seed)["image_evaluations"])
            for edit, aim in zip(edits, aims, strict=True)
            for seed in aim.seeds
        ]
        number = len(params.edits[edits[0]].coefficients)
        price = f"{sum(prices) / len(prices):,.0f}"
        rows[label] = [str(number), price, cell([_over_aims(aims, label)], signed)]
    more = _over_aims(aims, "free", "analogy")
    header = ["edit", "coefficients", "image evaluations, mean", "gain, points"]
    return "\n\n".join(
        [
            "### One coefficient or three",
            f"Three free coefficients are {points(more)} against one (t interval over D; "
            "paper: +0.7). The price of a search counts every validation image each time that "
            "it is asked.",
            columns(rows, header),
        ]
    )


def _shots(artifacts: Artifacts, params: Params) -> tuple[str, dict[str, str]]:
    """Return accuracy against labelled images, and what the analogy is worth in these."""
    panels, rows, seeds = {}, {}, params.seeds
    for name, few in params.few_shots.items():
        seeds = params.seeds_of(few)
        found = [few_shots(artifacts, name, seed) for seed in seeds]
        edit = few.edits[0]
        panels[few.task] = {
            label: Line(
                few.shots,
                [over_range([_value(f, start, n) for f in found]) for n in few.shots],
            )
            for label, start in (("from the pre-trained model", "pretrained"),
                                 ("from the analogy", edit))
        }  # fmt: skip
        rows[few.task] = _worth_row(few, found, edit)
    if not panels:
        return "", {}
    shots = next(iter(params.few_shots.values())).shots
    header = ["D", "pre-trained, no labels", "analogy, no labels", "worth, labels a class",
              "by seed", f"gain at {shots[-1]}, points"]  # fmt: skip
    label = "Test accuracy after fine-tuning on labelled images a class, from two starts"
    across = Axis("labelled images a class", 1, "even")
    text = [
        "### Worth how many labels",
        f"Test accuracy after fine-tuning on some labelled images a class. {seeds_note(seeds)} "
        "Bands and brackets: the range over seeds. The worth is the number of images a class at "
        "which the pre-trained start first reaches what the analogy has without labels, on "
        f"straight lines between {', '.join(map(str, shots))}.",
        picture("Accuracy against labelled images a class", "labels"),
        columns(rows, header),
    ]
    return "\n\n".join(text), {"labels": lines(panels, across, ACCURACY, "labels", label)}


def _value(found: FewShots, start: str, shots: int) -> float:
    return found.accuracy(start, shots).value


def _worth_row(few: FewShot, found: Sequence[FewShots], edit: str) -> list[str]:
    shots = sorted(few.shots)
    curves = [[_value(one, "pretrained", n) for n in shots] for one in found]
    wanted = [_value(one, edit, shots[0]) for one in found]
    middle = [math.fsum(values) / len(found) for values in zip(*curves, strict=True)]
    whole = worth(shots, middle, math.fsum(wanted) / len(wanted))
    single = [
        worth(shots, curve, aim) for curve, aim in zip(curves, wanted, strict=True)
    ]  # fmt: skip
    late = [_value(one, edit, shots[-1]) - _value(one, "pretrained", shots[-1]) for one in found]
    return [
        several([curve[0] for curve in curves]), several(wanted), _labels(whole, shots),
        ", ".join(_labels(value, shots) for value in single), several(late, signed),
    ]  # fmt: skip


def worth(shots: Sequence[int], accuracy: Sequence[float], wanted: float) -> float:
    """Return at how many labelled images a class a curve first reaches an accuracy.

    Args:
        shots: ascending.
        accuracy: at these; straight between them.
        wanted: what to reach.

    Returns:
        0 or the first of ``shots`` where the curve starts there, infinity where it never does.
    """
    if accuracy[0] >= wanted:
        return float(shots[0])
    for place in range(1, len(shots)):
        low, high = accuracy[place - 1], accuracy[place]
        if high >= wanted:
            share = (wanted - low) / (high - low)
            return shots[place - 1] + share * (shots[place] - shots[place - 1])
    return math.inf


def _labels(value: float, shots: Sequence[int]) -> str:
    return f"> {shots[-1]}" if math.isinf(value) else f"{round(value, 1):g}"
