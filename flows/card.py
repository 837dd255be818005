"""The model card of an export: README.md with the metadata of the Hugging Face hub."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from taskvec.sections import Source
from taskvec.summaries import Estimate

TEMPLATE = Path(__file__).parent / "card.md.jinja"
TAGS = ("task-arithmetic", "task-vectors", "model-merging")
LICENCE = "unknown"


@dataclass(frozen=True)
class Result:
    """How three models do on the test data of a task.

    Attributes:
        task: its name.
        items: how many test items.
        edited: the accuracy of the exported model, a fraction with its 95 % interval.
        base: that of the pre-trained model, if it was measured.
        finetuned: that of the task's own model, if it was measured.
    """

    task: str
    items: int
    edited: Estimate
    base: Estimate | None = None
    finetuned: Estimate | None = None


@dataclass(frozen=True)
class Facts:
    """What a card says.

    Attributes:
        title: name of the edit.
        expression: what is added to the base weights.
        coefficients: coefficient -> value.
        choice: option of a method -> value, where several were tried.
        seed: of the vectors, if there is one.
        origin: fingerprint of the base weights.
        fingerprint: of the edited tower.
        base: name of the base model.
        library: who loads it.
        pipeline: the hub's word for its task.
        usage: Python that loads it.
        intervals: coefficient -> the ends of what is not significantly worse.
        chosen: (what, how) of the search, in words.
        results: by task.
        vectors: (name, fingerprint, tasks) of each vector.
        data: task -> (source, items of each split).
        limitations: sentences.
        licence: as the hub calls it.
    """

    title: str
    expression: str
    coefficients: Mapping[str, float]
    choice: Mapping[str, Any]
    seed: int | None
    origin: str
    fingerprint: str
    base: str
    library: str
    pipeline: str
    usage: str
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    chosen: Sequence[tuple[str, str]] = ()
    results: Sequence[Result] = ()
    vectors: Sequence[tuple[str, str, str]] = ()
    data: Mapping[str, tuple[Source, Mapping[str, int]]] = field(default_factory=dict)
    limitations: Sequence[str] = ()
    licence: str = LICENCE


def render(facts: Facts) -> str:
    """Return the card, Markdown with YAML in front; the same text for equal facts."""
    shown = {item.name: getattr(facts, item.name) for item in fields(facts)}
    shown["limitations"] = [" ".join(line.split()) for line in facts.limitations]
    text = _template().render(
        **shown,
        metadata=f"---\n{metadata(facts).to_yaml()}\n---",
        datasets={task: _data(*item) for task, item in facts.data.items()},
    )
    lines = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).rstrip("\n") + "\n"


def metadata(facts: Facts) -> Any:
    """Return the hub's metadata of a card, a `ModelCardData`."""
    from huggingface_hub import EvalResult, ModelCardData

    evaluations = [
        EvalResult(
            task_type="image-classification",
            task_name=f"image classification: {row.task}",
            dataset_type=row.task,
            dataset_name=row.task,
            dataset_split="test",
            metric_type="accuracy",
            metric_name="accuracy",
            metric_value=row.edited.value,
            metric_args={"interval_95": [row.edited.low, row.edited.high], "items": row.items},
        )
        for row in facts.results
    ]
    return ModelCardData(
        model_name=facts.title,
        base_model=facts.base,
        base_model_relation="merge",
        datasets=sorted(facts.data) or None,
        library_name=facts.library,
        license=facts.licence,
        pipeline_tag=facts.pipeline,
        metrics=["accuracy"] if evaluations else None,
        eval_results=evaluations or None,
        tags=list(TAGS),
    )


def percent(estimate: Estimate | None) -> str:
    """Return a fraction in % with its interval."""
    if estimate is None:
        return "not measured"
    value, low, high = (f"{100 * x:.1f}" for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})"


@cache
def _template() -> Template:
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.globals["percent"] = percent
    return environment.from_string(TEMPLATE.read_text())


def _data(source: Source, splits: Mapping[str, int]) -> dict[str, Any]:
    origin = (
        f"package {source.package} {source.version}"
        if source.package
        else f"external set {source.external}"
    )
    items = ", ".join(f"{count} {split}" for split, count in splits.items())
    return {"origin": origin, "splits": f"{items} items", "files": sorted(source.files.items())}
