"""Vectors along fine-tuning: when their direction and the edits made of them are settled."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tasks.artifacts import Artifacts
from tasks.findings import percent
from tasks.studies.reading import by_seed, group, vectors
from tasks.studies.study import Study, picture
from tasks.studies.words import columns, decimal, judge, points, seeds_note, several
from taskvec import similarity
from taskvec.errors import InvalidParams
from taskvec.params import Params
from taskvec.spread import mean_of, over_range
from taskvec.study_pictures import Axis, Line, lines
from taskvec.summaries import Estimate, Scores

GROUP = "steps"
MARGIN = 0.01  # of normalised accuracy: what counts as the same
EARLY = 0.5  # of the steps: where the claim is made


@dataclass(frozen=True)
class _Stop:
    """What a checkpoint after some share of the steps gives, one figure a seed."""

    share: float
    cosines: Sequence[float]  # mean over tasks of the cosine to the final vector
    normalized: Sequence[float]  # of the sum, on test data


def intermediate(artifacts: Artifacts, params: Params) -> Study:
    """Return the page on vectors of intermediate checkpoints (arXiv:2212.04089, figure 7)."""
    edits = group(params, GROUP)
    seeds = params.seeds_of(next(iter(edits.values())))
    evaluated = [task for edit in edits.values() for task in edit.evaluate]
    found = by_seed(artifacts, [*evaluated, *edits], seeds)
    stops = sorted(
        (_stop(artifacts, params, edit, found) for edit in edits), key=lambda item: item.share
    )
    end = stops[-1]
    early = [stop for stop in stops if stop.share <= EARLY]
    if not early or end.share < 1:
        raise InvalidParams(f"group {GROUP} needs an edit of at most half of the steps, one of all")
    differences = {stop.share: _minus(stop, end) for stop in stops}
    claimed = early[-1].share
    settled = next(
        share for share, item in differences.items()
        if all(other.value >= -MARGIN for at, other in differences.items() if at >= share)
    )  # fmt: skip
    verdict = judge(
        f"after {percent(claimed)} % of the steps the sum is {points(differences[claimed])} of "
        f"normalised accuracy from the sum of the final vectors (t interval over "
        f"{len(end.cosines)} seeds; the bound is {percent(MARGIN)} point below), and the cosine "
        f"to the final vectors is {decimal(_average(early[-1].cosines))}",
        differences[claimed],
        -MARGIN,
    )
    rows = {
        percent(stop.share): [
            several(stop.cosines, decimal), several(stop.normalized),
            points(differences[stop.share]) if stop is not end else "",
        ]
        for stop in stops
    }  # fmt: skip
    header = ["share of the steps, %", "cosine", "sum, normalised, %", "against the end"]
    text = [
        f"{seeds_note(seeds)} Test data. Brackets and bands: "
        "the range over seeds. From "
        f"{percent(settled)} % of the steps on, the mean of the sums stays within "
        f"{percent(MARGIN)} point of the end.",
        picture("Cosine to the final vector against the share of steps", "cosines"),
        picture("Accuracy of the sum against the share of steps", "sums"),
        columns(rows, header),
    ]
    figures = {
        "cosines": _picture(stops, "cosines", Axis("cosine to the final vector")),
        "sums": _picture(stops, "sums", Axis("sum, normalised test accuracy, %", 100)),
    }
    return Study("Intermediate vectors", verdict, "\n\n".join(text), figures)


def _picture(stops: Sequence[_Stop], what: str, up: Axis) -> str:
    """Return the mean and range over seeds of one figure against the share of the steps."""
    y = [over_range(stop.cosines if what == "cosines" else stop.normalized) for stop in stops]
    panel = {what: Line([stop.share for stop in stops], y)}
    across = Axis("share of the fine-tuning steps, %", 100)
    return lines({"": panel}, across, up, what, f"{up.title} against the {across.title}")


def _stop(artifacts: Artifacts, params: Params, edit: str, found: Mapping[int, Scores]) -> _Stop:
    experts, evaluated = params.parse(edit).vectors, params.edits[edit].evaluate
    shares = sorted({_share(params, expert) for expert in experts})
    if len(shares) != 1:
        raise InvalidParams(
            f"edits.{edit}: its vectors stop after the shares {shares} of the steps; expected one"
        )
    return _Stop(
        shares[0],
        [_cosine(artifacts, params, experts, seed) for seed in found],
        [seen.normalized(edit, evaluated).value for seen in found.values()],
    )


def _cosine(artifacts: Artifacts, params: Params, experts: Sequence[str], seed: int) -> float:
    """Return the mean cosine of vectors to the vectors of the whole fine-tuning."""
    tasks = [params.learnt(expert)[0] for expert in experts]
    now, final = (vectors(artifacts, names, seed).values() for names in (experts, tasks))
    found = [
        similarity.cosines({"at": at, "end": end}).to_numpy()[0, 1]
        for at, end in zip(now, final, strict=True)
    ]
    return _average([float(value) for value in found])


def _share(params: Params, expert: str) -> float:
    recipe = params.recipe(expert)
    return (recipe.stop_after or recipe.steps) / recipe.steps


def _minus(stop: _Stop, end: _Stop) -> Estimate:
    return mean_of([at - last for at, last in zip(stop.normalized, end.normalized, strict=True)])


def _average(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
