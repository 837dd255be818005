"""The parts of params.yaml that say what is learnt from what: data, heads, recipes, the model."""

import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from taskvec import expressions
from taskvec.plugins import Misplaced, check_options

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


def distinct(values: list[Any]) -> list[Any]:
    """Return a list in which nothing stands twice."""
    for place, value in enumerate(values):
        if value in values[:place]:
            raise Misplaced(f"{value!r} stands twice", place)
    return values


Name = Annotated[str, AfterValidator(_name)]
Names = Annotated[list[Name], Field(min_length=1), AfterValidator(distinct)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Options = dict[str, Annotated[Any, AfterValidator(_option)]]


class Section(BaseModel):
    """A part of params.yaml: immutable, no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Source(Section):
    """Where data files come from, and which bytes they must hold.

    Either an installed package of one version, whose files they are, or an ``external`` set, whose
    files lie below the data root (TASKVEC_DATA or ``--data-root``); only its name is recorded.
    """

    package: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    version: Annotated[str, Field(pattern=r"^[0-9A-Za-z.+!-]{1,32}$")] | None = None
    external: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    files: dict[Annotated[str, AfterValidator(_relative)], Annotated[str, Field(pattern=SHA256)]]

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.package is None) == (self.external is None):
            raise ValueError("name either a package (with its version) or an external set")
        if (self.package is None) != (self.version is None):
            raise ValueError("a package needs a version, and an external set has none")
        return self


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
    classes: Annotated[list[str], Field(min_length=2), AfterValidator(distinct)]
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
    """How a task is learnt; a task may override any of it.

    ``direction: ascend`` maximises the loss instead (the baseline gradient ascent of
    arXiv:2212.04089, section 3); ``stop_after`` ends after some of the steps, with the schedule of
    all of them: a checkpoint along the way.

    The last three say how it is computed (docs/training.md): ``bf16`` keeps weights and results in
    float32, ``compile`` has torch.compile translate the tower, and a batch goes through the tower
    in pieces of ``micro_batch`` items.
    """

    steps: Count
    batch_size: Count
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    warmup: Annotated[float, Field(ge=0, le=1)]
    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    direction: Literal["descend", "ascend"] = "descend"
    stop_after: Count | None = None
    precision: Literal["float32", "bf16"] = "float32"
    compile: bool = False
    micro_batch: Count | None = None

    @model_validator(mode="after")
    def _stops_within(self) -> Self:
        if self.stop_after and self.stop_after > self.steps:
            raise Misplaced(f"stops after {self.stop_after} of {self.steps} steps", "stop_after")
        return self

    @model_validator(mode="after")
    def _pieces_of_a_batch(self) -> Self:
        if self.micro_batch and self.micro_batch > self.batch_size:
            message = f"pieces of {self.micro_batch} items of a batch of {self.batch_size}"
            raise Misplaced(message, "micro_batch")
        return self


class FineTuneOverrides(Section):
    """The part of `FineTune` that differs for one task."""

    steps: Count | None = None
    batch_size: Count | None = None
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    warmup: Annotated[float, Field(ge=0, le=1)] | None = None
    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    direction: Literal["descend", "ascend"] | None = None
    stop_after: Count | None = None
    precision: Literal["float32", "bf16"] | None = None
    compile: bool | None = None
    micro_batch: Count | None = None


class Task(Section):
    """Something to learn: data and a head."""

    data: Data
    head: Head
    fine_tune: FineTuneOverrides


class Variant(Section):
    """Another way to learn one task, or several at once (joint fine-tuning).

    It shares data and heads with the tasks it is ``of`` and gives a vector of its own.
    """

    of: Names
    fine_tune: FineTuneOverrides
    evaluate: Annotated[list[Name], AfterValidator(distinct)] = []


class Model(Section):
    """The pre-trained model: a family of taskvec/models/ and its options.

    Without ``image_size`` pictures get the size that the model itself takes.
    """

    family: Name
    image_size: Count | None = None
    options: Options = {}
    align_tasks: Annotated[list[Name], AfterValidator(distinct)] = []
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
