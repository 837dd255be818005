"""Negation: every task as the target, several controls, both rules, and the paper's baselines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tasks.artifacts import Artifacts
from tasks.findings import percent, spoken
from tasks.studies.reading import by_seed, read_json
from tasks.studies.study import Study, picture
from tasks.studies.words import (
    cell,
    columns,
    judge,
    markdown_table,
    negated,
    points,
    seeds_note,
    told,
)
from taskvec.errors import InvalidParams
from taskvec.params import Constraint, EditParams, Params
from taskvec.spread import averaged, mean_of
from taskvec.study_pictures import Axis, dots
from taskvec.summaries import Estimate, Scores, mean

# label -> the model's name for a target
METHODS = {
    "pre-trained": "pretrained",
    "fine-tuned": "tuned_{}",
    "gradient ascent": "{}_ascent",
    "random vector": "random_{}",
    "negative, largest": "forget_{}_largest",
    "negative, best": "forget_{}_best",
}
NEGATIVE, RANDOM, BEFORE = "negative, largest", "random vector", "pre-trained"
# Accuracy of target and control, ViT-B/32: arXiv:2212.04089, table 1
PAPER = {
    "pre-trained": (0.483, 0.634),
    "fine-tuned": (0.902, 0.482),
    "gradient ascent": (0.0273, 0.0025),
    "random vector": (0.457, 0.615),
    "negative, largest": (0.240, 0.609),
}
SPLITS = ("test", "validation")


@dataclass(frozen=True)
class _Target:
    """What all seeds say of one target."""

    name: str
    constraint: Constraint
    seeds: Mapping[int, Scores]

    def model(self, method: str) -> str:
        return METHODS[method].format(self.name)

    def accuracy(self, method: str, split: str = "test") -> list[Estimate]:
        return [item.accuracy(self.model(method), self.name, split) for item in self.seeds.values()]

    def above_chance(self, method: str, split: str = "test") -> list[Estimate]:
        return [
            item.above_chance(self.model(method), self.name, split) for item in self.seeds.values()
        ]

    def kept(self, method: str, split: str = "test") -> list[Estimate]:
        """Return, of each seed, the mean over controls of accuracy / pre-trained accuracy."""
        return [
            mean([item.kept(self.model(method), task, split) for task in self.constraint.tasks])
            for item in self.seeds.values()
        ]

    def control(self, method: str) -> float:
        """Return the mean test accuracy over controls and seeds."""
        found = [
            item.accuracy(self.model(method), task)
            for item in self.seeds.values()
            for task in self.constraint.tasks
        ]
        return averaged(found).value


def forgetting(artifacts: Artifacts, params: Params) -> Study:
    """Return the page on forgetting by negation (arXiv:2212.04089, section 3)."""
    targets = _targets(artifacts, params)
    accuracy = {m: [averaged(t.accuracy(m)).value for t in targets] for m in METHODS}
    drop, against = (
        mean_of([new - old for old, new in zip(accuracy[m], accuracy[NEGATIVE], strict=True)])
        for m in (BEFORE, RANDOM)
    )
    kept = mean_of([averaged(target.kept(NEGATIVE)).value for target in targets])
    verdict = _verdict(drop, against, kept, targets)
    body = [
        _average(targets, accuracy),
        picture("Target accuracy above chance, test data, by method", "targets"),
        picture("Share of the controls' accuracy that is kept, test data", "controls"),
        *(_tables(targets, split) for split in SPLITS),
        _infeasible(artifacts, params, targets),
    ]
    return Study("Negation: forget one task, keep others", verdict, "\n\n".join(body),
                 _figures(targets))  # fmt: skip


def _targets(artifacts: Artifacts, params: Params) -> list[_Target]:
    """Return the tasks that are forgotten; all edits of a target have its seeds and constraint."""
    names = [name for name in params.tasks if METHODS[NEGATIVE].format(name) in params.edits]
    if not names:
        wanted = METHODS[NEGATIVE].format("TASK")
        raise InvalidParams(f"this study needs edits called {wanted} in its params.yaml")
    edits = {name: params.edits[METHODS[NEGATIVE].format(name)] for name in names}
    own = [
        pattern.format(name) for name in names for pattern in METHODS.values() if "{}" in pattern
    ]
    evaluated = [task for edit in edits.values() for task in edit.evaluate]
    seeds = params.seeds_of(edits[names[0]])
    found = by_seed(artifacts, [*evaluated, *own], seeds)
    return [_Target(name, _constraint(name, edit), found) for name, edit in edits.items()]


def _constraint(name: str, edit: EditParams) -> Constraint:
    if edit.constraint is None:
        raise InvalidParams(f"the edits that forget {name} need a constraint: what must be kept")
    return edit.constraint


def _verdict(drop: Estimate, against: Estimate, kept: Estimate, targets: Sequence[_Target]) -> str:
    statement = (
        f"the negative vector changes the target's test accuracy by {points(drop)}, mean over "
        f"{len(targets)} targets, which is {points(against)} against a random vector of the same "
        f"norms, while the controls keep {told(kept)} of their accuracy"
    )
    weakest = max(drop, against, key=lambda item: item.high)
    kind, bound = targets[0].constraint.rule
    if weakest.high < 0 and kind == "min_ratio" and kept.high < bound:
        return (
            f"Only half of the paper's phenomenon shows here: {statement}, less than the "
            f"{percent(bound)} % that were asked for."
        )
    return judge(statement, negated(weakest))


def _average(targets: Sequence[_Target], accuracy: Mapping[str, Sequence[float]]) -> str:
    rows = {}
    for method in METHODS:
        kept = mean_of([averaged(target.kept(method)).value for target in targets])
        control = sum(target.control(method) for target in targets) / len(targets)
        paper = [percent(value) for value in PAPER.get(method, ())] or ["", ""]
        keeping = percent(1.0) if method == BEFORE else cell([kept])
        rows[method] = [cell([mean_of(accuracy[method])]), percent(control), keeping, *paper]
    header = ["method", "target", "control", "control kept", "paper: target", "paper: control"]
    return "\n\n".join(
        [
            "### Averages over targets",
            f"Test accuracy in percent. {seeds_note(list(targets[0].seeds))} In brackets: t "
            f"intervals over {len(targets)} targets, which differ in what they start from. "
            '"largest" takes the largest coefficient that keeps the constraint on validation '
            'data (the paper\'s rule), "best" the one with the lowest target accuracy. The paper '
            "has ViT-B/32, eight other targets and ImageNet as control (table 1).",
            columns(rows, header),
        ]
    )


def _tables(targets: Sequence[_Target], split: str) -> str:
    edited = [method for method in METHODS if method != BEFORE]
    above = {t.name: [cell(t.above_chance(method, split)) for method in METHODS] for t in targets}
    kept = {t.name: [cell(t.kept(method, split)) for method in edited] for t in targets}
    return "\n\n".join(
        [
            f"### Targets and controls on {split} data",
            "Target accuracy above chance, in points, with 95 % intervals over items:",
            columns(above, ["target", *METHODS]),
            "Mean over the controls of accuracy / pre-trained accuracy, in percent:",
            columns(kept, ["target", *edited]),
        ]
    )


def _infeasible(artifacts: Artifacts, params: Params, targets: Sequence[_Target]) -> str:
    """Return what test data says of the constraint, edit by edit."""
    found: dict[str, list[str]] = {}
    rows = []
    for target in targets:
        for method in ("random vector", "negative, largest", "negative, best"):
            name = target.model(method)
            for seed in target.seeds:
                mark = str(read_json(artifacts.metrics(name, seed)).get("feasible.test", "unknown"))
                found.setdefault(mark, []).append(f"{name} (seed {seed})")
                rows.append([name, str(seed), spoken(target.constraint.tasks), mark])
    bad = found.get("infeasible", [])
    text = f"Infeasible on test data: {spoken(bad)}." if bad else "None is infeasible on test data."
    return "\n\n".join(
        [
            "### Does the constraint hold on test data?",
            '"infeasible": the whole interval of a control lies outside the bound; "open": the '
            f"interval does not settle it. {text}",
            markdown_table(["edit", "seed", "controls", "on test data"], rows, 3),
        ]
    )


def _figures(targets: Sequence[_Target]) -> dict[str, str]:
    names = [target.name for target in targets]
    above = {m: [averaged(t.above_chance(m)) for t in targets] for m in METHODS}
    kept = {m: [averaged(t.kept(m)) for t in targets] for m in METHODS if m != BEFORE}
    kind, bound = targets[0].constraint.rule
    marks = {f"{percent(bound)} %": bound} if kind == "min_ratio" else {}
    return {
        "targets": dots(
            names, above, Axis("target accuracy above chance, test, points", 100), "targets",
            f"Target accuracy above chance of {spoken(names)} under {spoken(list(METHODS))}",
        ),
        "controls": dots(
            names, kept, Axis("control accuracy / pre-trained accuracy, test, %", 100), "controls",
            f"Share of control accuracy that is kept for the targets {spoken(names)}",
            marks=marks,
        ),
    }  # fmt: skip
