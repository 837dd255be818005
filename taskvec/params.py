"""params.yaml: read with one loader, checked completely before any work, typed afterwards.

The loader reads YAML 1.2 as DVC does (`1e-5` is a number), without anchors, tags or duplicate keys.
Every error names the line.
"""

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent, DocumentStartEvent, NodeEvent, ScalarEvent
from ruamel.yaml.reader import ReaderError

from taskvec import expressions
from taskvec.errors import InvalidExpression, InvalidParams, nearest
from taskvec.plugins import Misplaced, check_options

MAX_BYTES = 64 * 1024
MAX_DEPTH = 16
MAX_COMBINATIONS = 10_000
SHA256 = r"^[0-9a-f]{64}$"


def _name(text: str) -> str:
    if not re.fullmatch(expressions.NAME, text, flags=re.ASCII):
        raise ValueError(
            f"{text!r} is no name: expected a letter, then at most 63 letters, digits or _"
        )
    return text


def _relative(text: str) -> str:
    if (
        text.startswith("/")
        or "\\" in text
        or not all(part not in ("", ".", "..") for part in text.split("/"))
    ):
        raise ValueError(f"{text!r} is no relative path inside the package")
    return text


def _option(value: Any) -> Any:
    for item in value if isinstance(value, list) else [value]:
        finite = not isinstance(item, float) or math.isfinite(item)
        if not isinstance(item, bool | int | float | str) or not finite:
            raise ValueError(f"expected a finite number, text, true, false or a list, not {item!r}")
    return value


def _distinct(values: list[Any]) -> list[Any]:
    for place, value in enumerate(values):
        if value in values[:place]:
            raise Misplaced(f"{value!r} stands twice", place)
    return values


Name = Annotated[str, AfterValidator(_name)]
Names = Annotated[list[Name], Field(min_length=1), AfterValidator(_distinct)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Options = dict[str, Annotated[Any, AfterValidator(_option)]]


class Section(BaseModel):
    """A part of params.yaml: immutable, no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Source(Section):
    """Package data as a parameter: which package, which version, which bytes."""

    package: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    version: str = Field(pattern=r"^[0-9A-Za-z.+!-]{1,32}$")
    files: dict[Annotated[str, AfterValidator(_relative)], Annotated[str, Field(pattern=SHA256)]]


class Data(Section):
    """What a task learns from: an adapter of taskvec/datasets/ and how its items are split."""

    dataset: Name
    options: Options = {}
    source: Source
    train: Count
    validation: Count
    test: Count
    seed: Seed = 0

    @model_validator(mode="after")
    def _known_adapter(self) -> Self:
        check_options("datasets", self.dataset, self.options)
        return self


class Head(Section):
    """The frozen classifier of a task: prompts through the text tower, or class prototypes."""

    kind: Literal["text", "prototypes"]
    classes: Annotated[list[str], Field(min_length=2), AfterValidator(_distinct)]
    templates: list[str] = []

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind == "text" and not self.templates:
            raise ValueError("a text head needs templates, for example ['a photo of a {}.']")
        for place, text in enumerate(self.templates):
            if text.count("{}") != 1:
                message = f"{text!r} must hold {{}} once, for the class name"
                raise Misplaced(message, "templates", place)
        return self


class FineTune(Section):
    """How a task is learnt; a task may override any of it."""

    steps: Count
    batch_size: Count
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    warmup: Annotated[float, Field(ge=0, le=1)]
    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class FineTuneOverrides(Section):
    """The part of `FineTune` that differs for one task."""

    steps: Count | None = None
    batch_size: Count | None = None
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    warmup: Annotated[float, Field(ge=0, le=1)] | None = None
    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class Task(Section):
    """Something to learn: data and a head."""

    data: Data
    head: Head
    fine_tune: FineTuneOverrides


class Model(Section):
    """The pre-trained model: a family of taskvec/models/ and its options.

    Without ``image_size`` pictures get the size that the model itself takes.
    """

    family: Name
    image_size: Count | None = None
    options: Options = {}
    align_tasks: Annotated[list[Name], AfterValidator(_distinct)] = []
    shots: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, value: Any) -> Any:
        """Let options stand flat beside the family: `{family: open_clip, name: ViT-B-32}`."""
        if not isinstance(value, dict):
            return value
        own = {key: item for key, item in value.items() if key in cls.model_fields}
        flat = {key: item for key, item in value.items() if key not in cls.model_fields}
        nested = own.get("options", {})
        if not isinstance(nested, dict):
            return own
        for key in flat:
            if key in nested:
                raise Misplaced("stands twice, here and under options", key)
        return {**own, "options": {**nested, **flat}}

    @model_validator(mode="after")
    def _known_family(self) -> Self:
        check_options("models", self.family, self.options)
        if self.align_tasks and not self.shots:
            raise ValueError("align_tasks needs shots >= 1: pictures a class that the base may see")
        return self


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
    """What the search makes large or small, averaged over tasks, on validation data."""

    maximize: Literal["accuracy", "normalized_accuracy"] | None = None
    minimize: Literal["accuracy", "normalized_accuracy"] | None = None
    tasks: Names

    @model_validator(mode="after")
    def _one_direction(self) -> Self:
        if (self.maximize is None) == (self.minimize is None):
            raise ValueError("give either maximize or minimize")
        return self


class Constraint(Section):
    """What an edit must keep: accuracy on control tasks, as a share of the pre-trained model's."""

    tasks: Names
    min_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class EditParams(Section):
    """An edit: expression, ranges of its coefficients, objective, constraint, evaluation."""

    expression: str
    coefficients: Annotated[dict[Name, Range], Field(min_length=1)]
    objective: Objective
    constraint: Constraint | None = None
    select: Literal["best", "largest"] = "best"
    evaluate: Names
    group: Name | None = None

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
        if combinations > MAX_COMBINATIONS:
            message = f"{combinations} combinations of coefficients; at most {MAX_COMBINATIONS}"
            raise Misplaced(message, "coefficients")
        return self


class Params(Section):
    """The whole of params.yaml."""

    seeds: Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct)]
    model: Model
    fine_tune: FineTune
    tasks: Annotated[dict[Name, Task], Field(min_length=1)]
    edits: dict[Name, EditParams]

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        self._check_tasks(self.model.align_tasks, "model", "align_tasks")
        for name, edit in self.edits.items():
            if name in self.tasks:
                raise Misplaced("a task has this name; rename the edit", "edits", name)
            self._check_tasks(edit.evaluate, "edits", name, "evaluate")
            for coefficient in edit.coefficients:
                if coefficient in self.tasks:
                    message = f"{coefficient!r} is a task; rename the coefficient"
                    raise Misplaced(message, "edits", name, "coefficients", coefficient)
            try:
                self._check_expression(name, edit)
            except InvalidExpression as error:
                raise Misplaced(str(error), "edits", name, "expression") from None
        return self

    def _check_tasks(self, names: list[str], *place: str) -> None:
        for i, name in enumerate(names):
            if name not in self.tasks:
                raise Misplaced(f"unknown task {name!r}; {nearest(name, self.tasks)}", *place, i)

    def _check_expression(self, name: str, edit: EditParams) -> None:
        known = {*self.tasks, *edit.coefficients}
        for found in expressions.names(edit.expression):
            if found not in known:
                raise InvalidExpression(
                    f"{found!r} is neither a task nor a coefficient with a range; "
                    f"{nearest(found, known)}; a coefficient needs a range: "
                    f"edits.{name}.coefficients: {{{found}: {{low: 0, high: 1, points: 21}}}}"
                )
        parsed = expressions.parse(edit.expression, self.tasks, edit.coefficients)
        for coefficient in edit.coefficients:
            if coefficient not in parsed.coefficients:
                raise InvalidExpression(
                    f"the coefficient {coefficient!r} has a range but is not used, or it cancels"
                )
        grid = math.prod(item.points for item in edit.coefficients.values())
        options = math.prod(len(values) for values in parsed.choices.values())
        if grid * options > MAX_COMBINATIONS:
            raise InvalidExpression(
                f"{grid} combinations of coefficients times {options} of options; "
                f"at most {MAX_COMBINATIONS}"
            )

    def parse(self, name: str) -> expressions.Edit:
        """Return the normal form of the expression of the edit called ``name``."""
        edit = self.edits[name]
        return expressions.parse(edit.expression, self.tasks, edit.coefficients)

    def recipe(self, task: str) -> FineTune:
        """Return how a task is fine-tuned: the shared recipe with the task's own overrides."""
        return self.fine_tune.model_copy(
            update=self.tasks[task].fine_tune.model_dump(exclude_none=True)
        )


def load(path: Path) -> Params:
    """Return the checked contents of a params.yaml.

    Raises:
        InvalidParams: it is missing, malformed or inconsistent; the message names line and key.
    """
    return validate(read(path), str(path))


def read(path: Path) -> Any:
    """Return the raw contents of a params.yaml, with line numbers attached."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InvalidParams(f"{path} does not exist; run taskvec in the project's root") from None
    if len(data) > MAX_BYTES:
        raise InvalidParams(f"{path} has {len(data)} bytes; at most {MAX_BYTES}")
    try:
        text = data.decode()
        _refuse_tricks(text, path)
        return YAML(typ="rt", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        line = mark.line + 1 if mark else 1
        raise InvalidParams(f"{path}:{line}: {error.problem or error.context}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidParams(f"{path}:{line}: not UTF-8: {error.reason}") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InvalidParams(f"{path}:{line}: {error.reason}") from None
    except ValueError as error:
        raise InvalidParams(f"{path}: {error}") from None


def validate(raw: Any, path: str = "params.yaml") -> Params:
    """Return raw contents as checked `Params`."""
    try:
        return Params.model_validate(plain(raw))
    except ValidationError as error:
        lines = [_explain(item, raw, path) for item in error.errors()]
        raise InvalidParams("\n".join(lines)) from None


def plain(value: Any) -> Any:
    """Return loader types (which carry comments and lines) as plain Python ones."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _refuse_tricks(text: str, path: Path) -> None:
    depth = 0
    for event in YAML(typ="rt", pure=True).parse(text):
        line = event.start_mark.line + 1
        if isinstance(event, AliasEvent) or (isinstance(event, NodeEvent) and event.anchor):
            raise InvalidParams(f"{path}:{line}: anchors and aliases are not allowed")
        tag = getattr(event, "tag", None)
        if tag:
            raise InvalidParams(f"{path}:{line}: tags such as {tag} are not allowed")
        if isinstance(event, DocumentStartEvent) and (event.version or event.tags):
            raise InvalidParams(f"{path}:{line}: directives such as %YAML are not allowed")
        if isinstance(event, ScalarEvent) and event.value == "<<" and event.style is None:
            raise InvalidParams(f"{path}:{line}: merge keys (<<) are not allowed")
        if isinstance(event, ScalarEvent) and re.search(r"[\ud800-\udfff]", event.value):
            raise InvalidParams(f"{path}:{line}: half of a surrogate pair is no character")
        name = type(event).__name__
        depth += name.endswith("StartEvent") - name.endswith("EndEvent")
        if depth > MAX_DEPTH + 2:
            raise InvalidParams(f"{path}:{line}: nested deeper than {MAX_DEPTH}")


def _explain(error: Any, raw: Any, path: str) -> str:
    """Return one line for one pydantic error: file, line, key, what was found."""
    place = getattr(error.get("ctx", {}).get("error"), "place", ())
    line, key = _find(raw, [*error["loc"], *place])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = "unknown key"
    elif error["type"] != "value_error" and not isinstance(error["input"], dict | list):
        message = f"{message}, found {error['input']!r}"
    return f"{path}:{line}: {key + ': ' if key else ''}{message}"


def _find(raw: Any, location: list[Any]) -> tuple[int, str]:
    """Return the 1-based line of the deepest part of a location that the file holds, and its key.

    A location also holds what the file does not: a mark for keys, and ``options`` where they stand
    flat beside the family.
    """
    line, node, keys = 1, raw, []
    for part in location:
        try:
            mark = node.lc.data[part]
            node = node[part]
        except (AttributeError, KeyError, IndexError, TypeError):
            if part not in ("options", "[key]"):
                keys.append(str(part))
            continue
        line = mark[0] + 1
        keys.append(str(part))
    return line, ".".join(keys)
