"""Merged models against ensembles of what was merged, and how far seeds spread."""

import math
from collections.abc import Sequence

import numpy as np

from tasks.artifacts import Artifacts
from tasks.findings import percent
from tasks.studies.reading import Swept, named, swept
from tasks.studies.study import Study, picture
from tasks.studies.words import columns, correlation, judge, points, seeds_note, several
from taskvec.params import Params
from taskvec.spread import Floats, mean_of, pearson, resampled
from taskvec.study_pictures import Axis, Cloud, scatter
from taskvec.summaries import Estimate
from taskvec.sweeps import Subset

PAIRS = "pairs"
KINDS = {
    "ensemble_finetuned": "ensemble of fine-tuned models",
    "ensemble": "ensemble of single edits at c",
}


def ensembles(artifacts: Artifacts, params: Params) -> Study:
    """Return the page on ensembles (arXiv:2212.04089, appendix)."""
    sweep = named(params.sweeps, PAIRS, "sweeps")
    seeds = params.seeds_of(sweep)
    runs = [swept(artifacts, PAIRS, sweep, seed) for seed in seeds]
    pairs = runs[0].subsets
    values = {kind: _values(runs, pairs, kind) for kind in ("merged", *KINDS)}
    found = {kind: _correlation(values["merged"], values[kind]) for kind in KINDS}
    main, other = found.values()
    verdict = judge(
        "the accuracies of merged models and of ensembles of the same fine-tuned models are "
        f"correlated with {correlation(main)} (bootstrap over {len(pairs)} pairs, each with its "
        f"{len(seeds)} seeds)",
        main,
    )
    rows = {
        " + ".join(pair): [several(list(values[kind][place])) for kind in values]
        for place, pair in enumerate(pairs)
    }
    spreads = [
        f"{kind.replace('_', ', ')} {percent(_spread(table))}" for kind, table in values.items()
    ]
    behind = _difference(values["merged"], values["ensemble_finetuned"])
    text = [
        f"Mean normalised accuracy on the tasks of each pair, test data. {seeds_note(seeds)} An "
        "ensemble averages logits and costs one forward pass a model. With ensembles of the "
        f"single edits at the merged model's c the correlation is {correlation(other)}. The merged "
        f"model is {points(behind)} against the ensemble of fine-tuned models (t interval over "
        "pairs).",
        picture("Merged against ensembled accuracy", "ensembles"),
        columns(rows, ["pair", "merged", *KINDS.values()]),
        "Spread over seeds, standard deviation in points, root mean square over pairs: "
        f"{'; '.join(spreads)}.",
    ]
    clouds = {
        label: Cloud(list(values[kind].ravel()), list(values["merged"].ravel()))
        for kind, label in KINDS.items()
    }
    svg = scatter(
        clouds, Axis("ensemble, normalised test accuracy, %", 100),
        Axis("merged, normalised test accuracy, %", 100), "ensembles",
        "Accuracy of merged models against ensembles, one point a pair and seed", guide="diagonal",
    )  # fmt: skip
    return Study("Merged models and ensembles", verdict, "\n\n".join(text), {"ensembles": svg})


def _values(runs: Sequence[Swept], pairs: Sequence[Subset], kind: str) -> Floats:
    """Return normalised accuracies, (pairs, seeds)."""
    rows = [[run.normalized(pair, pair, kind=kind).value for run in runs] for pair in pairs]
    return np.array(rows)


def _correlation(merged: Floats, other: Floats) -> Estimate:
    return resampled(lambda places: pearson(merged[places], other[places]), len(merged))


def _difference(merged: Floats, other: Floats) -> Estimate:
    return mean_of(list((merged - other).mean(axis=1)))


def _spread(table: Floats) -> float:
    return math.sqrt(table.var(axis=1, ddof=1).mean()) if table.shape[1] > 1 else math.nan
