"""Learning rates: do sums of vectors degrade sooner than the models they are made of?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tasks.artifacts import Artifacts
from tasks.studies.reading import by_seed, group
from tasks.studies.study import Study, picture
from tasks.studies.words import columns, judge, negated, points, seeds_note, several
from taskvec.errors import InvalidParams
from taskvec.params import Params
from taskvec.spread import mean_of, over_range
from taskvec.study_pictures import Axis, Line, lines
from taskvec.summaries import Scores

GROUP = "rates"


@dataclass(frozen=True)
class _Rate:
    """The sum and the single models of one learning rate; figures on test data, one a seed."""

    edit: str
    rate: float
    experts: Mapping[str, str]  # task -> the single model's name in the evaluation tables
    seeds: Mapping[int, Scores]

    def single(self) -> list[float]:
        """Return the mean accuracy of the single models, each on its own task."""
        return [
            math.fsum(found.accuracy(model, task).value for task, model in self.experts.items())
            / len(self.experts)
            for found in self.seeds.values()
        ]

    def summed(self) -> list[float]:
        """Return the mean accuracy of the sum."""
        return [
            math.fsum(found.accuracy(self.edit, task).value for task in self.experts)
            / len(self.experts)
            for found in self.seeds.values()
        ]

    def normalized(self) -> list[float]:
        """Return the mean over tasks of the sum's accuracy / the single model's at this rate."""
        return [
            math.fsum(
                found.accuracy(self.edit, task).value / max(1e-9, found.accuracy(model, task).value)
                for task, model in self.experts.items()
            )
            / len(self.experts)
            for found in self.seeds.values()
        ]


def learning_rate(artifacts: Artifacts, params: Params) -> Study:
    """Return the page on learning rates (arXiv:2212.04089, section 6, figure 6)."""
    rates = _rates(artifacts, params)
    doublings = np.log2([item.rate for item in rates])
    changes = [
        float(np.polyfit(doublings, values, 1)[0])
        for values in zip(*(item.normalized() for item in rates), strict=True)
    ]
    change = mean_of(changes)
    seeds = list(rates[0].seeds)
    verdict = judge(
        "with every doubling of the learning rate the accuracy of the sum, as a share of that of "
        f"the single models of the same rate, changes by {points(change)} (t interval over "
        f"{len(seeds)} seeds, least squares over {len(rates)} rates)",
        negated(change),
    )
    text = [
        f"Test data, mean over {len(rates[0].experts)} tasks. {seeds_note(seeds)} Brackets and "
        "bands: the range over seeds. The normalised accuracy of a sum is its accuracy / that of "
        "the single models of the same rate, so that it is high where these have learnt little.",
        picture("Accuracy against the learning rate", "rates"),
        _table(rates),
    ]
    return Study("Learning rates", verdict, "\n\n".join(text), {"rates": _picture(rates)})


def _rates(artifacts: Artifacts, params: Params) -> list[_Rate]:
    """Return what each learning rate gives, ascending; all edits have the same seeds."""
    edits = group(params, GROUP)
    experts = {edit: params.parse(edit).vectors for edit in edits}
    learnt = [name for names in experts.values() for name in names]
    tasks = [task for name in learnt for task in params.learnt(name)]
    seeds = params.seeds_of(next(iter(edits.values())))
    found = by_seed(artifacts, [*tasks, *learnt, *edits], seeds)
    rates = [_Rate(edit, _common(params, edit, names), _models(params, names), found)
             for edit, names in experts.items()]  # fmt: skip
    return sorted(rates, key=lambda item: item.rate)


def _common(params: Params, edit: str, experts: Sequence[str]) -> float:
    rates = sorted({params.recipe(expert).learning_rate for expert in experts})
    if len(rates) != 1:
        raise InvalidParams(
            f"edits.{edit}: its vectors were learnt with the rates {rates}; expected one rate"
        )
    return rates[0]


def _models(params: Params, experts: Sequence[str]) -> dict[str, str]:
    """Return task -> what its single model is called in the evaluation tables."""
    return {
        params.learnt(name)[0]: "finetuned" if name in params.tasks else name for name in experts
    }


def _table(rates: list[_Rate]) -> str:
    rows = {
        f"{item.rate:g}": [
            several(item.single()), several(item.summed()), several(item.normalized())
        ]
        for item in rates
    }  # fmt: skip
    header = ["learning rate", "single models, %", "sum, %", "sum, normalised, %"]
    return columns(rows, header)


def _picture(rates: list[_Rate]) -> str:
    x = [item.rate for item in rates]
    shown = {
        "single models, accuracy": Line(x, [over_range(item.single()) for item in rates]),
        "sum, accuracy": Line(x, [over_range(item.summed()) for item in rates]),
        "sum, normalised": Line(x, [over_range(item.normalized()) for item in rates]),
    }
    label = "Accuracy of single models and of their sum against the learning rate"
    across = Axis("learning rate", scale="log")
    return lines({"": shown}, across, Axis("test data, %", 100), "rates", label)
