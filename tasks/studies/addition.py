"""Addition: pairs of task vectors, all their subsets, and joint fine-tuning as the ceiling."""

from collections.abc import Sequence

import numpy as np

from tasks.artifacts import Artifacts
from tasks.findings import percent, spoken
from tasks.studies.reading import Swept, by, named, scores, screening, swept
from tasks.studies.study import Study, picture
from tasks.studies.words import (
    NORMALIZED,
    cell,
    coefficient,
    columns,
    figure,
    judge,
    markdown_table,
    points,
    seeds_note,
    several,
    told,
)
from taskvec.params import Params
from taskvec.spread import averaged, mean_of, resampled
from taskvec.study_pictures import Axis, Line, dots, lines
from taskvec.summaries import Estimate
from taskvec.sweeps import Subset

PAIRS, SUBSETS, JOINT, ALL = "pairs", "subsets", "joint", "all_tasks"
PAPER_PAIRS, PAPER_BEST = 0.989, 0.912  # arXiv:2212.04089, section 4


def addition(artifacts: Artifacts, params: Params) -> Study:
    """Return the page on learning several tasks at once (arXiv:2212.04089, section 4)."""
    pairs = _read(artifacts, params, PAIRS)
    kept = {pair: averaged([run.normalized(pair, pair) for run in pairs]) for pair in _all(pairs)}
    before = {pair: _floor(pairs, pair) for pair in kept}
    keeping = mean_of([item.value for item in kept.values()])
    gain = mean_of([kept[pair].value - before[pair].value for pair in kept])
    verdict = judge(
        f"the normalised accuracy of the sum of two vectors is {points(gain)} against the "
        f"pre-trained model, mean over {len(kept)} pairs, and with it the sum has {told(keeping)} "
        f"of the fine-tuned models' accuracy (paper: {percent(PAPER_PAIRS)} %)",
        gain,
    )
    subsets, figures = _subsets(artifacts, params)
    body = [_pairs(pairs, kept, before), subsets, _ceiling(artifacts, params)]
    pair_rows = [" + ".join(pair) for pair in kept]
    figures[PAIRS] = dots(
        pair_rows,
        {"pre-trained": list(before.values()), "sum of two vectors": list(kept.values())},
        NORMALIZED,
        PAIRS,
        f"Normalised test accuracy of {len(kept)} pairs, mean {percent(keeping.value)} percent",
        marks={"mean": keeping.value},
    )
    return Study("Addition: several tasks at once", verdict, "\n\n".join(body), figures)


def _read(artifacts: Artifacts, params: Params, name: str) -> list[Swept]:
    sweep = named(params.sweeps, name, "sweeps")
    return [swept(artifacts, name, sweep, seed) for seed in params.seeds_of(sweep)]


def _all(runs: Sequence[Swept]) -> list[Subset]:
    return runs[0].subsets


def _floor(runs: Sequence[Swept], tasks: Sequence[str]) -> Estimate:
    return averaged([run.scores.normalized("pretrained", tasks) for run in runs])


def _pairs(
    runs: Sequence[Swept], kept: dict[Subset, Estimate], before: dict[Subset, Estimate]
) -> str:
    rows = {
        " + ".join(pair): [
            coefficient([run.coefficient(pair) for run in runs]),
            figure(before[pair]),
            cell([run.normalized(pair, pair) for run in runs]),
        ]
        for pair in kept
    }
    after, start = (np.array([item.value for item in found.values()]) for found in (kept, before))
    by_seed = [float(np.mean([run.normalized(pair, pair).value for pair in kept])) for run in runs]
    share = resampled(
        lambda places: _recovered(after[places].mean(), start[places].mean()), len(kept)
    )
    return "\n\n".join(
        [
            "### Pairs",
            "Mean normalised accuracy on the two tasks, test data. "
            f"{seeds_note([run.seed for run in runs])} Over the pairs the mean is "
            f"{told(mean_of(list(after)))}, by seed {', '.join(map(percent, by_seed))}; "
            f"{told(share)} of what fine-tuning gains is kept (bootstrap over pairs). Other "
            "intervals of means are t intervals over pairs; pairs share tasks, so that these "
            "intervals are rather too narrow.",
            picture("Normalised accuracy of every pair", PAIRS),
            columns(rows, ["pair", "c", "pre-trained", "sum"], 1),
        ]
    )


def _recovered(value: float, floor: float) -> float:
    """Return the share of the way from the floor to the fine-tuned models, which are 1."""
    return float((value - floor) / (1 - floor)) if floor < 1 else float("nan")


def _subsets(artifacts: Artifacts, params: Params) -> tuple[str, dict[str, str]]:
    """Return the part on all subsets, with its picture."""
    sweep = named(params.sweeps, SUBSETS, "sweeps")
    runs = _read(artifacts, params, SUBSETS)
    tasks = sweep.vectors
    screened = [screening(artifacts, SUBSETS, sweep, run.seed) for run in runs]
    values = {s: float(np.mean([found[s] for found in screened])) for s in _all(runs)}
    sizes = by(values, len)
    curve = [mean_of([values[subset] for subset in found]) for found in sizes.values()]
    run = runs[0]
    tested = {subset: run.normalized(subset, tasks) for subset in run.kept()}
    top = max(tested, key=lambda s: (run.normalized(s, tasks, "validation").value, -len(s), s))
    largest = max(tested, key=lambda subset: (len(subset), tested[subset].value))
    shown = {
        "mean of all subsets, validation": Line(list(sizes), curve),
        "one subset, validation": _cloud(values),
        "went on, test": _cloud({subset: item.value for subset, item in tested.items()}),
        "best on validation, test": Line([len(top)], [tested[top]], joined=False),
    }
    floor = _floor(runs, tasks)
    label = f"Normalised accuracy of {len(values)} sums by the number of vectors"
    across, up = Axis("vectors in the sum"), Axis("normalised accuracy, %", 100)
    images = f"{sweep.screen} validation images a task" if sweep.screen else "all validation images"
    rows = {
        str(size): [str(len(found)), _wide(item), percent(max(values[subset] for subset in found))]
        for (size, found), item in zip(sizes.items(), curve, strict=True)
    }  # fmt: skip
    same = "is the sum of all" if top == largest else "is not the sum of all"
    text = [
        "### All subsets",
        f"Mean normalised accuracy on all {len(tasks)} tasks of {len(values)} sums. "
        f"{seeds_note([run.seed for run in runs])} The curve is validation data ({images}, at the "
        "best c; the band is a t interval over subsets); "
        f"{len(tested)} sums went on to all validation images and to test data, so that these "
        "are a selection.",
        picture("Normalised accuracy against the number of vectors", SUBSETS),
        f"The best subset on validation data, {spoken(top)}, {same}: on test data it reaches "
        f"{told(tested[top])} at c = {run.coefficient(top):g}, the sum of all {len(largest)} has "
        f"{told(tested[largest])} at c = {run.coefficient(largest):g}: a difference of "
        f"{points(tested[top] - tested[largest])}. The paper's best subset reaches "
        f"{percent(PAPER_BEST)} %. The pre-trained model has {told(floor)} on test data.",
        columns(rows, ["vectors", "sums", "mean", "best"], 1),
    ]
    return "\n\n".join(text), {
        SUBSETS: lines({"": shown}, across, up, SUBSETS, label, marks={"pre-trained": floor.value})
    }


def _wide(estimate: Estimate) -> str:
    """Return a mean over subsets; a single subset has no interval."""
    return figure(estimate) if np.isfinite(estimate.low) else percent(estimate.value)


def _cloud(values: dict[Subset, float]) -> Line:
    ends = [Estimate(value, value, value) for value in values.values()]
    return Line([len(subset) for subset in values], ends, joined=False)


def _ceiling(artifacts: Artifacts, params: Params) -> str:
    """Return all tasks at once: the pre-trained model, the sum, joint fine-tuning."""
    edit, joint = named(params.edits, ALL, "edits"), named(params.variants, JOINT, "variants")
    tasks = edit.evaluate
    seeds = params.seeds_of(edit)
    found = [scores(artifacts, [*tasks, ALL, JOINT], seed) for seed in seeds]
    rows, gains = [], {}
    for name, label in (("pretrained", "pre-trained"), (ALL, "sum of all"), (JOINT, "joint")):
        values = [item.normalized(name, tasks) for item in found]
        share = [
            _recovered(value.value, item.normalized("pretrained", tasks).value)
            for value, item in zip(values, found, strict=True)
        ]
        gains[name] = averaged(values)
        rows.append([label, cell(values), several(share)])
    difference = gains[JOINT] - gains[ALL]
    steps = params.recipe(JOINT).steps
    return "\n\n".join(
        [
            "### All tasks, and joint fine-tuning",
            f"Mean normalised accuracy over {len(tasks)} tasks, test data, and the share of the "
            f"fine-tuning gain that is kept. {seeds_note(seeds)} Joint fine-tuning on "
            f"{len(joint.of)} tasks at once, {steps} steps, needs all their data; it is "
            f"{points(difference)} above the sum.",
            markdown_table(["model", "normalised accuracy", "share of the gain"], rows, 1),
        ]
    )
