"""How alike task vectors are, and what one vector does for the tasks of the others."""

from collections.abc import Mapping, Sequence
from itertools import combinations, permutations

import numpy as np
import pandas as pd

from tasks.artifacts import Artifacts
from tasks.findings import cosine_text, percent, signed
from tasks.studies.reading import Swept, named, swept, vectors
from tasks.studies.study import Study, picture
from tasks.studies.words import columns, correlation, judge, seeds_note, several
from taskvec import similarity as likeness
from taskvec.conflict import LARGEST, norms, sign_conflicts
from taskvec.params import Params
from taskvec.pictures import heat_map, layer_map
from taskvec.spread import Floats, mantel, resampled, spearman
from taskvec.study_pictures import Axis, Cloud, matrix, scatter
from taskvec.summaries import Estimate, closest

TRANSFER = "transfer"
LABELLED = 3  # pairs that carry their names in the scatter plot
LEVEL = 0.05


def similarity(artifacts: Artifacts, params: Params) -> Study:
    """Return the page on the similarity of task vectors (arXiv:2212.04089, section 6)."""
    sweep = named(params.sweeps, TRANSFER, "sweeps")
    names, seeds = sweep.vectors, params.seeds_of(sweep)
    loaded = [vectors(artifacts, names, seed) for seed in seeds]
    cosines = _mean([likeness.cosines(found) for found in loaded])
    layers = _mean([likeness.cosines_by_layer(found) for found in loaded])
    conflicts = _mean([sign_conflicts(found) for found in loaded])
    lengths = [norms(found) for found in loaded]
    runs = [swept(artifacts, TRANSFER, sweep, seed) for seed in seeds]
    transfer = _mean([_transfer(run, names) for run in runs])
    pairs = list(combinations(range(len(names)), 2))
    rank = _rank(cosines, transfer, pairs)
    chance = mantel(cosines.to_numpy(), _both_ways(transfer))
    left, right, most = closest(cosines, names)
    median = float(np.median([cosines.to_numpy()[pair] for pair in pairs]))
    statement = (
        "the rank correlation between the cosine of two vectors and what one does for the other's "
        f"task is {correlation(rank)} over {len(pairs)} pairs "
        f"(p = {chance:.3f} if the tasks of one matrix are permuted); the closest are {left} and "
        f"{right} with a cosine of {cosine_text(most)}, and the median is {cosine_text(median)}"
    )
    verdict = judge(statement, rank)
    if rank.low > 0 and not chance < LEVEL:
        verdict = f"Nothing is shown here, for the permutations do not settle it: {statement}."
    body = [
        _whole(cosines, layers, conflicts, lengths, seeds),
        _helping(transfer, runs, names),
    ]
    figures = _pictures(cosines, layers, conflicts, transfer, pairs)
    return Study("Similarity of task vectors, and transfer", verdict, "\n\n".join(body), figures)


def _mean(found: Sequence[pd.DataFrame]) -> pd.DataFrame:
    values = np.mean([table.to_numpy(dtype=float) for table in found], axis=0)
    return pd.DataFrame(values, index=found[0].index, columns=found[0].columns)


def _transfer(run: Swept, names: Sequence[str]) -> pd.DataFrame:
    """Return the accuracy of each task (column) under each vector (row) minus pre-trained."""
    rows = [
        [
            run.accuracy((vector,), task).value - run.scores.accuracy("pretrained", task).value
            for task in names
        ]
        for vector in names
    ]
    return pd.DataFrame(rows, index=list(names), columns=list(names))


def _both_ways(transfer: pd.DataFrame) -> Floats:
    values = transfer.to_numpy(dtype=float)
    return (values + values.T) / 2


def _rank(
    cosines: pd.DataFrame, transfer: pd.DataFrame, pairs: Sequence[tuple[int, int]]
) -> Estimate:
    alike = np.array([cosines.to_numpy()[pair] for pair in pairs])
    helping = np.array([_both_ways(transfer)[pair] for pair in pairs])
    return resampled(lambda places: spearman(alike[places], helping[places]), len(pairs))


def _whole(
    cosines: pd.DataFrame,
    layers: pd.DataFrame,
    conflicts: pd.DataFrame,
    lengths: Sequence[Mapping[str, float]],
    seeds: Sequence[int],
) -> str:
    off = conflicts.to_numpy()[np.triu_indices(len(conflicts), 1)]
    rows = {
        name: [several([found[name] for found in lengths], lambda value: f"{value:.3f}")]
        for name in cosines.index
    }
    widest = layers.mean(axis=1)
    return "\n\n".join(
        [
            "### The vectors",
            f"{seeds_note(seeds)} The paper finds cosines of 0.01 to 0.06 between most of its "
            "vectors, and 0.18 between MNIST and SVHN (figure 5).",
            picture("Cosine of every two task vectors", "cosines"),
            f"Layer by layer the mean cosine of all pairs goes from {cosine_text(widest.min())} "
            f"({widest.idxmin()}) to {cosine_text(widest.max())} ({widest.idxmax()}).",
            picture("Cosine of every pair in every layer", "layers"),
            f"Sign conflict: of the elements that are among the {percent(LARGEST)} % largest of "
            f"both vectors, {percent(off.min())} to {percent(off.max())} % have opposite signs; "
            "50 % would be chance.",
            picture("Share of common large elements with opposite signs", "conflicts"),
            "Euclidean norms, mean and range over seeds:",
            columns(rows, ["vector", "norm"]),
        ]
    )


def _helping(transfer: pd.DataFrame, runs: Sequence[Swept], names: Sequence[str]) -> str:
    values = transfer.to_numpy(dtype=float)
    others = {
        (names[i], names[j]): float(values[i, j]) for i, j in permutations(range(len(names)), 2)
    }
    best, worst = (pick(others, key=lambda pair: others[pair]) for pick in (max, min))
    own = {
        name: [several([run.scores.accuracy("pretrained", name).value for run in runs[:1]]),
               several([run.accuracy((name,), name).value for run in runs])]
        for name in names
    }  # fmt: skip
    return "\n\n".join(
        [
            "### What a vector does for other tasks",
            "Test accuracy of every task under every single vector minus the pre-trained model's, "
            "in points; the diagonal is fine-tuning itself. The highest figure beside it: the "
            f"vector of {best[0]} on {best[1]}, {signed(others[best])}; the lowest: {worst[0]} on "
            f"{worst[1]}, {signed(others[worst])}.",
            picture("Accuracy under every vector minus pre-trained", "transfer"),
            "Transfer is averaged over both directions of a pair. The bootstrap draws pairs, "
            "which share tasks; the permutation of tasks does not suffer from that.",
            picture("Cosine against transfer", "cosine_transfer"),
            columns(own, ["task", "pre-trained, %", "own vector, %"]),
        ]
    )


def _pictures(
    cosines: pd.DataFrame,
    layers: pd.DataFrame,
    conflicts: pd.DataFrame,
    transfer: pd.DataFrame,
    pairs: Sequence[tuple[int, int]],
) -> dict[str, str]:
    names = list(cosines.index)
    values, both = cosines.to_numpy(), _both_ways(transfer)
    ordered = sorted(pairs, key=lambda pair: -values[pair])
    cloud = Cloud(
        [float(values[pair]) for pair in ordered],
        [float(both[pair]) for pair in ordered],
        [f"{names[i]}, {names[j]}" for i, j in ordered[:LABELLED]],
    )
    up = Axis("accuracy minus pre-trained, both ways, points", 100)
    gain = Axis("task (figures: test accuracy minus pre-trained, points)", 100)
    return {
        "cosines": heat_map(cosines, "cosines", "Cosines of the task vectors"),
        "layers": layer_map(layers, "layers", "Cosines of the task vectors by layer"),
        "conflicts": matrix(
            conflicts.mask(np.eye(len(names), dtype=bool)), "vector",
            Axis("vector (figures: opposite signs, %)", 100), "conflicts",
            "Share of common large elements with opposite signs", middle=0.5,
        ),
        "transfer": matrix(transfer, "vector", gain, "transfer", "Transfer between tasks"),
        "cosine_transfer": scatter(
            {"pairs": cloud}, Axis("cosine of the vectors"), up, "cosine_transfer",
            "Cosine of two vectors against what one does for the other's task",
        ),
    }  # fmt: skip
