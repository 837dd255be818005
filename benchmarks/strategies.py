"""Every strategy of the search beside the grid, on edits of studies that have been run.

Whatever an edit's grid asked lies in the memory of answers, so that a strategy that stays on the
grid computes nothing anew; what the others ask between its points is remembered too, and the
benchmark is quick the second time. Prices are nominal: what the search would have cost with an
empty memory.
"""

import math
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import drawn
from benchmarks.measuring import ROOT, conditions, table, verdict
from tasks.artifacts import EXPERIMENTS, Artifacts
from tasks.findings import read_json
from tasks.search import posed
from taskvec import params as parameters
from taskvec import plugins
from taskvec.numeric import make_deterministic
from taskvec.params import EditParams, SearchParams
from taskvec.search import ROUNDING, SLOPE_PRICE, Candidate, Problem, feasible, solve

DEFAULT = "default"  # the experiment of the repository's own params.yaml
STUDIES = ("addition", "analogy", "forgetting", "intermediate", "learning_rate", "methods",
           "new_category")  # fmt: skip
PROCESSES = 2
GRID = "grid"
QUARTER = 0.25
TARGET_POINTS, TARGET_PRICE = 0.2, 0.25
PACKAGES = ("torch", "optuna", "cmaes")

# The edits, with all their seeds, on which strategies are measured that leave the grid.
SUBSET: Mapping[str, Sequence[str]] = {
    DEFAULT: ("addition", "forget_digits", "analogy_two"),
    "addition": ("all_tasks",),
    "analogy": ("sketch_a_analogy", "sketch_a_free", "photo_b_analogy", "photo_b_free"),
    "forgetting": ("forget_mnist_best", "forget_gtsrb_largest"),
    "intermediate": ("sum_at30",),
    "learning_rate": ("sum_lr4",),
    "methods": ("by_ties_mean", "by_tsv_m"),
    "new_category": ("to_photo_dog",),
}


@dataclass(frozen=True)
class Way:
    """A strategy, its options beside the defaults, and its budget.

    Attributes:
        strategy: a module of taskvec/strategies/.
        options: the options that are not at their defaults.
        share: the budget as a share of the price of the grid.
        everywhere: whether all edits are searched, not only `SUBSET`.
    """

    strategy: str
    options: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    everywhere: bool = False


WAYS: Mapping[str, Way] = {
    GRID: Way("grid", everywhere=True),
    "guided": Way("guided", everywhere=True),
    "halving": Way("halving", everywhere=True),
    "golden, by loss": Way("golden", everywhere=True),
    "golden, by objective": Way("golden", {"guide": "objective"}),
    "tpe, a quarter": Way("tpe", share=QUARTER),
    "cma_es, a quarter": Way("cma_es", share=QUARTER),
    "gradient, a quarter": Way("gradient", share=QUARTER),
}


@dataclass(frozen=True)
class Run:
    """An edit of an experiment for one seed: a search to repeat."""

    root: Path
    study: str
    edit: str
    seed: int

    @property
    def in_subset(self) -> bool:
        """Whether all strategies are measured on it."""
        return self.edit in SUBSET.get(self.study, ())


@dataclass(frozen=True)
class Found:
    """What a strategy found.

    Attributes:
        run: where.
        way: the strategy, a key of `WAYS`.
        distance: how far its choice is behind that of the grid, in points of the objective on
            validation data; negative if it is better.
        price: its price as a share of that of the grid.
        breaks: whether its choice breaks the constraint although that of the grid keeps it.
    """

    run: Run
    way: str
    distance: float
    price: float
    breaks: bool


def measure(*, quick: bool) -> str:
    """Return the section of docs/benchmarks.md; ``quick`` takes an experiment of drawn weights."""
    load = os.getloadavg()[0]
    if quick:
        with tempfile.TemporaryDirectory() as directory:
            drawn.experiment(Path(directory))
            runs = _runs(Path(directory), DEFAULT)
            found = [item for run in runs for item in compared(run)]
        return section(found, load)
    roots = {DEFAULT: ROOT, **{name: ROOT / EXPERIMENTS / name for name in STUDIES}}
    runs = [run for study, root in roots.items() for run in _runs(root, study)]
    if not runs:
        sys.exit("no edit has been searched yet: `taskvec run`, `make studies`")
    return section(_measured(runs), load)


def _measured(runs: Sequence[Run]) -> list[Found]:
    """Return what all strategies found, the runs in several processes."""
    found = []
    with get_context("spawn").Pool(PROCESSES) as pool:
        for number, part in enumerate(pool.imap(compared, runs), start=1):
            run = part[0].run
            place = f"{number} of {len(runs)}"
            print(f"{place}  {run.study} {run.edit} {run.seed}", file=sys.stderr, flush=True)
            found += part
    return found


def _runs(root: Path, study: str) -> list[Run]:
    """Return the edits of an experiment that have a grid of several points and were searched."""
    if not (root / "params.yaml").is_file():
        return []
    params, artifacts = parameters.load(root / "params.yaml"), Artifacts(root)
    return [
        Run(root, study, name, seed)
        for name, edit in params.edits.items()
        for seed in params.seeds_of(edit)
        if _has_grid(edit)
        and artifacts.basis(name, seed).is_file()
        and artifacts.coefficients(name, seed).is_file()
    ]


def _has_grid(edit: EditParams) -> bool:
    points = math.prod(item.points for item in edit.coefficients.values())
    return edit.search.strategy == GRID and edit.search.budget is None and points > 1


def compared(run: Run) -> list[Found]:
    """Return what the strategies find on one edit, the grid first."""
    make_deterministic()
    params, artifacts = parameters.load(run.root / "params.yaml"), Artifacts(run.root)
    edit = params.edits[run.edit]
    settings = SearchParams(seed=run.seed)
    with posed(
        artifacts, run.edit, run.seed, params.model, edit.coefficients, edit.objective,
        edit.constraint, edit.select, settings,
    ) as problem:  # fmt: skip
        best, price = _searched(problem, WAYS[GRID])
        _check(run, best, read_json(artifacts.coefficients(run.edit, run.seed)))
        found = [Found(run, GRID, 0.0, price, breaks=False)]
        for name, way in WAYS.items():
            if way.strategy != GRID and _applies(way, run, problem):
                chosen, price = _searched(problem, way)
                distance = 100 * (problem.gain(best) - problem.gain(chosen))
                breaks = _keeps(problem, best) and not _keeps(problem, chosen)
                found.append(Found(run, name, distance, price, breaks))
    return found


def _searched(problem: Problem, way: Way) -> tuple[Candidate, float]:
    """Return the choice of a strategy, and its price as a share of the grid's."""
    fresh = replace(problem, budget=int(way.share * problem.grid_price))
    strategy = getattr(plugins.load("strategies", way.strategy), way.strategy)
    chosen = solve(fresh, strategy, plugins.complete("strategies", way.strategy, way.options))
    return chosen, fresh.price / fresh.grid_price


def _applies(way: Way, run: Run, problem: Problem) -> bool:
    single = way.strategy == "golden"
    return (way.everywhere or run.in_subset) and not (single and len(problem.ranges) > 1)


def _keeps(problem: Problem, candidate: Candidate) -> bool:
    return feasible(candidate, problem.goal.constraint, problem.goal.references)


def _check(run: Run, best: Candidate, written: Mapping[str, Any]) -> None:
    """Stop unless the grid chooses what the stage search chose."""
    again = {
        **{f"coefficient.{name}": value for name, value in best.coefficients.items()},
        **{f"option.{name}": value for name, value in best.choice.items()},
    }
    before = {key: written.get(key) for key in again}
    assert again == before, (
        f"{run.study} {run.edit} {run.seed}: the grid chooses {again}, the stage search chose "
        f"{before}; run the experiment again"
    )


def section(found: Sequence[Found], load: float) -> str:
    """Return the section of docs/benchmarks.md.

    Args:
        found: what the strategies found, the grid among them.
        load: the load average when the measurement began.
    """
    studies = list(dict.fromkeys(item.run.study for item in found))
    everywhere = [name for name, way in WAYS.items() if way.everywhere]
    header = ["strategy", "searches", "points behind the grid, mean", "worst", "at most 0.2",
              "price, mean", "most", "constraint broken", "target"]  # fmt: skip
    subset = [item for item in found if item.run.in_subset]
    return "\n\n".join(
        [
            "## Strategies of the search",
            conditions(load, PACKAGES),
            f"Every edit of these experiments that was searched by a grid, with all its seeds: "
            f"{_counted(found, studies)}. {_missing(studies)}",
            table(header, [_row(name, found) for name in everywhere]),
            "*Points behind the grid* is the objective on validation data at the grid's choice "
            "minus that at the strategy's, in percentage points, with the sign that makes positive "
            "worse; a strategy that leaves the grid may be ahead of it. *At most 0.2* is the share "
            "of searches that end no farther behind. *Price* is the number of image evaluations as "
            "a share of the grid's; it is nominal, as with an empty memory, and a slope costs "
            f"{SLOPE_PRICE}. *Constraint broken* counts choices that break the constraint where "
            "the grid's keeps it. The targets are those of the means: 0.2 points, a quarter of the "
            "price. "
            "Options are the defaults; *golden* takes one coefficient only.",
            "### All strategies on some edits",
            "Strategies that leave the grid have to compute anew. All but *golden, by loss* are "
            f"measured on a part: {_named(subset)}; the lines of the others are repeated for "
            "the same part. *A quarter* is the budget as a share of the grid's price. Strategies "
            "that draw have the seed of the fine-tuned models.",
            table(header, [_row(name, subset) for name in WAYS]),
            "### By experiment",
            "Mean (worst) points behind the grid, and the mean price.",
            table(
                ["experiment", "searches", *[name for name in WAYS if name != GRID]],
                [_line(study, found) for study in studies],
            ),
        ]
    )


def _row(way: str, found: Iterable[Found]) -> list[str]:
    own = [item for item in found if item.way == way]
    if not own:
        return [way, "0", *[""] * 7]
    distances, prices = _figures(own)
    near = sum(value <= TARGET_POINTS + ROUNDING for value in distances) / len(own)
    targets = (
        f"points {verdict(fmean(distances), TARGET_POINTS)}; "
        f"price {verdict(fmean(prices), TARGET_PRICE)}"
    )
    return [
        way,
        str(len(own)),
        _points(fmean(distances)),
        _points(max(distances)),
        f"{100 * near:.0f} %",
        f"{100 * fmean(prices):.1f} %",
        f"{100 * max(prices):.1f} %",
        str(sum(item.breaks for item in own)),
        "" if way == GRID else targets,
    ]


def _line(study: str, found: Iterable[Found]) -> list[str]:
    own = [item for item in found if item.run.study == study]
    cells = [_cell([item for item in own if item.way == way]) for way in WAYS if way != GRID]
    return [study, str(len({item.run for item in own})), *cells]


def _cell(own: Sequence[Found]) -> str:
    if not own:
        return ""
    distances, prices = _figures(own)
    worst = _points(max(distances))
    return f"{_points(fmean(distances))} ({worst}), {100 * fmean(prices):.0f} %"


def _figures(found: Iterable[Found]) -> tuple[list[float], list[float]]:
    """Return the distances and the prices."""
    distances, prices = zip(*((item.distance, item.price) for item in found), strict=True)
    return list(distances), list(prices)


def _counted(found: Sequence[Found], studies: Sequence[str]) -> str:
    parts = []
    for study in studies:
        runs = {item.run for item in found if item.run.study == study}
        edits, seeds = len({run.edit for run in runs}), sorted({run.seed for run in runs})
        parts.append(f"{study} (edits: {edits}, seeds: {', '.join(map(str, seeds))})")
    return ", ".join(parts)


def _missing(studies: Sequence[str]) -> str:
    absent = [name for name in (DEFAULT, *STUDIES) if name not in studies]
    return f"Not measured, for they have not been run: {', '.join(absent)}." if absent else ""


def _named(found: Iterable[Found]) -> str:
    edits: dict[str, list[str]] = {}
    for run in dict.fromkeys(item.run for item in found):
        own = edits.setdefault(run.study, [])
        if run.edit not in own:
            own.append(run.edit)
    return "; ".join(f"{study} ({', '.join(own)})" for study, own in edits.items())


def _points(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"
