"""params.yaml: checked completely before any work, typed afterwards. Every error names the line."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from taskvec import expressions
from taskvec.errors import InvalidExpression, InvalidParams, nearest
from taskvec.plugins import Misplaced, check_options, constant
from taskvec.sections import (
    Count,
    FineTune,
    FineTuneOverrides,
    Finite,
    Model,
    Name,
    Names,
    Options,
    Section,
    Seed,
    Task,
    Variant,
    distinct,
)
from taskvec.yaml_file import explain, plain, read

MAX_COMBINATIONS = 10_000
MAX_SUBSETS = 1024

Metric = Literal["accuracy", "normalized_accuracy", "loss"]


# sections whose keys are names of files
NAMED = {
    "tasks": "a task", "variants": "a variant", "edits": "an edit", "sweeps": "a sweep",
    "few_shots": "a few-shot study",
}  # fmt: skip
BOUNDS = ("min_ratio", "max_ratio", "min", "max", "max_drop", "max_rise")
Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(distinct)]


class Range(Section):
    """The values of one coefficient that the search tries: `points` from low to high."""

    low: Finite
    high: Finite
    points: Annotated[int, Field(ge=1, le=1001)]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high or (self.low == self.high and self.points > 1):
            raise ValueError(f"low {self.low} must be below high {self.high}")
        if self.points == 1 and self.low != self.high:
            raise ValueError("one point needs low = high")
        return self

    def values(self) -> list[float]:
        """Return the values, ascending; both ends are hit exactly."""
        if self.points == 1:
            return [self.low]
        step = (self.high - self.low) / (self.points - 1)
        inner = [round(self.low + i * step, 12) for i in range(1, self.points - 1)]
        return [self.low, *inner, self.high]


class Objective(Section):
    """What the search makes large or small, averaged over tasks, on validation data.

    ``normalized_accuracy`` is accuracy / fine-tuned accuracy, ``loss`` the cross-entropy in nats.
    """

    maximize: Metric | None = None
    minimize: Metric | None = None
    tasks: Names

    @model_validator(mode="after")
    def _one_direction(self) -> Self:
        if (self.maximize is None) == (self.minimize is None):
            raise ValueError("give either maximize or minimize")
        return self


class Constraint(Section):
    """What an edit must keep on each control task: one bound on one metric.

    ``min_ratio`` and ``max_ratio`` are shares of the pre-trained model's value, ``min`` and ``max``
    are absolute, ``max_drop`` and ``max_rise`` differences from the pre-trained model's value. The
    perplexity is exp(loss). The paper has accuracy min_ratio 0.95 for pictures and perplexity
    max_rise 0.5 for text (arXiv:2212.04089, section 3).
    """

    tasks: Names
    metric: Literal["accuracy", "loss", "perplexity"] = "accuracy"
    min_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    min: Finite | None = None
    max: Finite | None = None
    max_drop: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    max_rise: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if len(self._given()) != 1:
            raise ValueError(f"give exactly one of {', '.join(BOUNDS)}")
        return self

    @property
    def rule(self) -> tuple[str, float]:
        """The kind of bound and its value: ``("min_ratio", 0.95)``."""
        return self._given()[0]

    def _given(self) -> list[tuple[str, float]]:
        found = [(kind, getattr(self, kind)) for kind in BOUNDS]
        return [(kind, value) for kind, value in found if value is not None]


class SearchParams(Section):
    """How the coefficients are found: a strategy of taskvec/strategies/ and its options.

    The budget counts evaluations of validation images; it is the price of the whole grid unless it
    is set. The seed is for strategies that draw.
    """

    strategy: Name = "grid"
    options: Options = {}
    budget: Count | None = None
    seed: Seed = 0

    @property
    def continuous(self) -> bool:
        """Whether the strategy goes anywhere within the ranges, whatever their points are."""
        return bool(constant("strategies", self.strategy, "CONTINUOUS", False))

    @model_validator(mode="after")
    def _known_strategy(self) -> Self:
        check_options("strategies", self.strategy, self.options)
        return self


class EditParams(Section):
    """An edit: expression, ranges of its coefficients, objective, constraint, evaluation.

    It is made for all seeds of the experiment unless ``seeds`` names some of them.
    """

    expression: str
    coefficients: Annotated[dict[Name, Range], Field(min_length=1)]
    objective: Objective
    constraint: Constraint | None = None
    select: Literal["best", "largest"] = "best"
    search: SearchParams = SearchParams()
    evaluate: Names
    group: Name | None = None
    seeds: Seeds | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.select == "largest" and (not self.constraint or len(self.coefficients) != 1):
            raise Misplaced("largest needs a constraint and exactly one coefficient", "select")
        needed = {"objective": self.objective.tasks}
        if self.constraint:
            needed["constraint"] = self.constraint.tasks
        for section, tasks in needed.items():
            for place, task in enumerate(tasks):
                if task not in self.evaluate:
                    message = f"{task!r} is not evaluated; add it to evaluate"
                    raise Misplaced(message, section, "tasks", place)
        combinations = math.prod(item.points for item in self.coefficients.values())
        if combinations > MAX_COMBINATIONS and not self.search.continuous:
            message = f"{combinations} combinations of coefficients; at most {MAX_COMBINATIONS}"
            raise Misplaced(message, "coefficients")
        if combinations > MAX_COMBINATIONS and not self.search.budget:
            message = f"{combinations} combinations of coefficients are no budget; set one"
            raise Misplaced(message, "search")
        return self


class Sweep(Section):
    """Many edits ``c * (sum of some vectors)`` as rows of one table; no file is written for each.

    Attributes:
        vectors: of which tasks.
        sizes: how many vectors an edit sums: [2] for all pairs.
        coefficient: what is tried for c.
        evaluate: the tasks of the edit's own vectors, or all of ``vectors``.
        screen: if set, the edits are first compared on so many stratified validation images a task,
            with coefficients from coarse to fine, and only the best go on.
        keep: how many go on from the screening, beside the largest sum.
        ensembles: also evaluate the mean of the logits of the models that are summed (appendix F).
        seeds: all of the experiment's unless set.
    """

    vectors: Names
    sizes: Annotated[list[Count], Field(min_length=1), AfterValidator(distinct)]
    coefficient: Range
    evaluate: Literal["own", "all"] = "own"
    screen: Count | None = None
    keep: Count = 20
    ensembles: bool = False
    seeds: Seeds | None = None

    @model_validator(mode="after")
    def _countable(self) -> Self:
        for place, size in enumerate(self.sizes):
            if size > len(self.vectors):
                message = f"{size} vectors at once, but there are {len(self.vectors)}"
                raise Misplaced(message, "sizes", place)
        number = sum(math.comb(len(self.vectors), size) for size in self.sizes)
        if number > MAX_SUBSETS:
            raise Misplaced(f"{number} subsets; at most {MAX_SUBSETS}", "sizes")
        return self


class FewShot(Section):
    """How far some labelled images a class take an edited model and the pre-trained one.

    Attributes:
        task: whose images are used and who is evaluated.
        edits: the starts beside the pre-trained model.
        shots: labelled training images a class.
        fine_tune: what differs from the experiment's recipe.
        seeds: all of the experiment's unless set.
    """

    task: Name
    edits: Names
    shots: Annotated[
        list[Annotated[int, Field(ge=0, le=10_000)]], Field(min_length=1), AfterValidator(distinct)
    ]
    fine_tune: FineTuneOverrides = FineTuneOverrides()
    seeds: Seeds | None = None


class Gates(Section):
    """When a run stops by itself, and which gates are overridden with which reason.

    Attributes:
        expert_tolerance: how far the accuracy of a fine-tuned checkpoint, evaluated from its file,
            may be from the one recorded in it; a fraction.
        leak_margin: how far test accuracy may exceed validation accuracy before the two-sample test
            is asked, and
        leak_level: its level over all checks of the experiment.
        override: "expert NAME" or "leak NAME" -> why; recorded with every result.
    """

    expert_tolerance: Annotated[float, Field(ge=0, le=1)] = 0.005
    leak_margin: Annotated[float, Field(ge=0, le=1)] = 0.05
    leak_level: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    override: dict[
        Annotated[str, Field(pattern=r"^(expert|leak) [A-Za-z][A-Za-z0-9_]{0,63}$")],
        Annotated[str, Field(min_length=3, max_length=500)],
    ] = {}


class Params(Section):
    """The whole of params.yaml.

    Names of tasks, variants, edits, sweeps and few_shots are names of files: all differ. A
    ``study`` names the page of tasks/studies/ that is made of it; ``budget_minutes`` is what its
    run may take on two cores, for whoever waits, and ``cut`` what was left out to fit in.
    """

    study: Name | None = None
    budget_minutes: Count | None = None
    cut: list[str] = []
    seeds: Seeds
    model: Model
    fine_tune: FineTune
    gates: Gates = Gates()
    tasks: Annotated[dict[Name, Task], Field(min_length=1)]
    variants: dict[Name, Variant] = {}
    edits: dict[Name, EditParams]
    sweeps: dict[Name, Sweep] = {}
    few_shots: dict[Name, FewShot] = {}

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        self._check_distinct()
        self._check_tasks(self.model.align_tasks, "model", "align_tasks")
        for name, variant in self.variants.items():
            self._check_tasks(variant.of, "variants", name, "of")
            self._check_tasks(variant.evaluate, "variants", name, "evaluate")
            self._check_recipe(self.recipe(name), "variants", name)
        for name in self.tasks:
            self._check_recipe(self.recipe(name), "tasks", name)
        for name, edit in self.edits.items():
            self._check_edit(name, edit)
        for name, sweep in self.sweeps.items():
            self._check_tasks(sweep.vectors, "sweeps", name, "vectors")
        for name, few in self.few_shots.items():
            self._check_tasks([few.task], "few_shots", name, "task")
            self._check_recipe(self.overridden(few.fine_tune), "few_shots", name)
            for place, edit_name in enumerate(few.edits):
                if edit_name not in self.edits:
                    message = f"unknown edit {edit_name!r}; {nearest(edit_name, self.edits)}"
                    raise Misplaced(message, "few_shots", name, "edits", place)
        known = [*self.experts, *self.edits]
        for key in self.gates.override:
            name = key.split()[1]
            if name not in known:
                message = f"no task, variant or edit {name!r}; {nearest(name, known)}"
                raise Misplaced(message, "gates", "override", key)
        for section in ("edits", "sweeps", "few_shots"):
            for name, item in getattr(self, section).items():
                for place, seed in enumerate(item.seeds or ()):
                    if seed not in self.seeds:
                        message = f"the experiment has no seed {seed}, only {self.seeds}"
                        raise Misplaced(message, section, name, "seeds", place)
        return self

    @property
    def experts(self) -> list[str]:
        """The names of all fine-tuned models, and so of all task vectors: tasks, then variants."""
        return [*self.tasks, *self.variants]

    def learnt(self, expert: str) -> list[str]:
        """Return the tasks that an expert is fine-tuned on: itself, or what its variant is of."""
        return [expert] if expert in self.tasks else self.variants[expert].of

    def evaluated(self, variant: str) -> list[str]:
        """Return the tasks that a variant is evaluated on."""
        return self.variants[variant].evaluate or self.variants[variant].of

    @property
    def checks(self) -> int:
        """How often a test accuracy is compared with a validation accuracy, over all seeds."""
        ours = len(self.tasks) + sum(len(self.evaluated(name)) for name in self.variants)
        return ours * len(self.seeds) + sum(
            len(edit.evaluate) * len(self.seeds_of(edit)) for edit in self.edits.values()
        )

    def seeds_of(self, item: "EditParams | Sweep | FewShot") -> list[int]:
        """Return the seeds for which an edit, a sweep or a few-shot study is made."""
        return item.seeds or self.seeds

    def _check_distinct(self) -> None:
        seen: dict[str, str] = {}
        for section, what in NAMED.items():
            for name in getattr(self, section):
                if name in seen:
                    message = f"{seen[name]} has this name; names are names of files, so rename one"
                    raise Misplaced(message, section, name)
                seen[name] = what

    def _check_recipe(self, recipe: FineTune, section: str, name: str) -> None:
        try:
            FineTune.model_validate(recipe.model_dump())
        except ValidationError as error:
            text = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise Misplaced(text, section, name, "fine_tune") from None

    def _check_edit(self, name: str, edit: EditParams) -> None:
        self._check_tasks(edit.evaluate, "edits", name, "evaluate")
        for coefficient in edit.coefficients:
            if coefficient in self.experts:
                message = f"{coefficient!r} is a task or a variant; rename the coefficient"
                raise Misplaced(message, "edits", name, "coefficients", coefficient)
        try:
            self._check_expression(name, edit)
        except InvalidExpression as error:
            raise Misplaced(str(error), "edits", name, "expression") from None

    def _check_tasks(self, names: list[str], *place: str) -> None:
        for i, name in enumerate(names):
            if name not in self.tasks:
                raise Misplaced(f"unknown task {name!r}; {nearest(name, self.tasks)}", *place, i)

    def _check_expression(self, name: str, edit: EditParams) -> None:
        known = {*self.experts, *edit.coefficients}
        for found in expressions.names(edit.expression):
            if found not in known:
                raise InvalidExpression(
                    f"{found!r} is neither a task nor a coefficient with a range; "
                    f"{nearest(found, known)}; a coefficient needs a range: "
                    f"edits.{name}.coefficients: {{{found}: {{low: 0, high: 1, points: 21}}}}"
                )
        parsed = expressions.parse(edit.expression, self.experts, edit.coefficients)
        for coefficient in edit.coefficients:
            if coefficient not in parsed.coefficients:
                raise InvalidExpression(
                    f"the coefficient {coefficient!r} has a range but is not used, or it cancels"
                )
        grid = math.prod(item.points for item in edit.coefficients.values())
        options = math.prod(len(values) for values in parsed.choices.values())
        if grid * options > MAX_COMBINATIONS and not edit.search.continuous:
            raise InvalidExpression(
                f"{grid} combinations of coefficients times {options} of options; "
                f"at most {MAX_COMBINATIONS}"
            )

    def parse(self, name: str) -> expressions.Edit:
        """Return the normal form of the expression of the edit called ``name``."""
        edit = self.edits[name]
        return expressions.parse(edit.expression, self.experts, edit.coefficients)

    def recipe(self, expert: str) -> FineTune:
        """Return how an expert is fine-tuned: the shared recipe with its own overrides."""
        own = self.tasks[expert] if expert in self.tasks else self.variants[expert]
        return self.overridden(own.fine_tune)

    def overridden(self, overrides: FineTuneOverrides) -> FineTune:
        """Return the shared recipe with overrides."""
        return self.fine_tune.model_copy(update=overrides.model_dump(exclude_none=True))


def load(path: Path) -> Params:
    """Return the checked contents of a params.yaml.

    Raises:
        InvalidParams: it is missing, malformed or inconsistent; the message names line and key.
    """
    return validate(read(path), str(path))


def validate(raw: Any, path: str = "params.yaml") -> Params:
    """Return raw contents as checked `Params`."""
    try:
        return Params.model_validate(plain(raw))
    except ValidationError as error:
        lines = [explain(item, raw, path) for item in error.errors()]
        raise InvalidParams("\n".join(lines)) from None
