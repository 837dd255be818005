"""Analogies to a category that was never trained on (king = queen + man - woman)."""

from collections.abc import Mapping, Sequence

from tasks.artifacts import Artifacts
from tasks.findings import percent, signed, spoken
from tasks.studies.reading import by_seed, chosen, group
from tasks.studies.study import Study, picture
from tasks.studies.words import ACCURACY, cell, coefficient, columns, judge, points, seeds_note
from taskvec.params import EditParams, Params
from taskvec.spread import averaged, mean_of
from taskvec.study_pictures import dots
from taskvec.summaries import Estimate, Scores

GROUP = "new_category"


def new_category(artifacts: Artifacts, params: Params) -> Study:
    """Return the page on categories without any data (arXiv:2212.04089, section 5, table 4)."""
    edits = group(params, GROUP)
    found = {
        name: list(by_seed(artifacts, [*edit.evaluate, name], params.seeds_of(edit)).values())
        for name, edit in edits.items()
    }
    gains = {name: _gain(found[name], name, _target(edit)) for name, edit in edits.items()}
    gain = mean_of([averaged(item).value for item in gains.values()])
    kept = [
        averaged([one.kept(name, task) for one in found[name]]).value
        for name, edit in edits.items()
        for task in _controls(edit)
    ]
    keeping = f", while the controls keep {percent(mean_of(kept).value)} %" if kept else ""
    verdict = judge(
        f"the analogy changes the accuracy on a category without training data by {points(gain)}, "
        f"mean over {len(edits)} categories{keeping}",
        gain,
    )
    rows = {name: _row(artifacts, params, name, edit, found[name]) for name, edit in edits.items()}
    header = ["edit", "category", "c", "pre-trained", "edited", "gain", "controls kept"]
    first = next(iter(edits.values()))
    text = [
        f"Test accuracy in percent. {seeds_note(params.seeds_of(first))} No image of the category "
        "was trained on; its validation images choose the coefficient. In the paper the "
        "pre-trained model has 0 % on its four categories and the edited ones 30 to 100 %.",
        picture("Accuracy on each category", "categories"),
        columns(rows, header, 2),
    ]
    shown = {
        "pre-trained": _averages(found, edits, pretrained=True),
        "edited": _averages(found, edits, pretrained=False),
    }
    labels = [_target(edit) for edit in edits.values()]
    label = f"Test accuracy on {spoken(labels)}, before and after the edit"
    svg = dots(labels, shown, ACCURACY, "categories", label)
    return Study("Analogies: a new category", verdict, "\n\n".join(text), {"categories": svg})


def _target(edit: EditParams) -> str:
    return edit.objective.tasks[0]


def _controls(edit: EditParams) -> list[str]:
    return [task for task in edit.evaluate if task not in edit.objective.tasks]


def _gain(found: Sequence[Scores], name: str, task: str) -> list[Estimate]:
    return [one.accuracy(name, task) - one.accuracy("pretrained", task) for one in found]


def _averages(
    found: Mapping[str, Sequence[Scores]], edits: Mapping[str, EditParams], *, pretrained: bool
) -> list[Estimate]:
    return [
        averaged(
            [one.accuracy("pretrained" if pretrained else name, _target(edit))
             for one in found[name]]
        )
        for name, edit in edits.items()
    ]  # fmt: skip


def _row(
    artifacts: Artifacts, params: Params, name: str, edit: EditParams, found: Sequence[Scores]
) -> list[str]:
    taken = [chosen(artifacts, name, seed) for seed in params.seeds_of(edit)]
    target = _target(edit)
    kept = [f"{task} {cell([one.kept(name, task) for one in found])}" for task in _controls(edit)]
    return [
        target,
        coefficient([float(item[f"coefficient.{key}"]) for item in taken
                     for key in sorted(edit.coefficients)]),
        cell([one.accuracy("pretrained", target) for one in found]),
        cell([one.accuracy(name, target) for one in found]),
        cell(_gain(found, name, target), signed),
        "; ".join(kept),
    ]  # fmt: skip
