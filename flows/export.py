"""Edited models on their way out: a directory with weights, a model card and a statement.

The directory is written beside its place and renamed, so that it is there as a whole or not at all.
Equal lineages give equal bytes.
"""

import json
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from flows import card, formats, received, retractions, signing
from flows.card import Facts, Result
from flows.formats import Layout
from flows.lineage import Artifact, Lineage
from flows.recording import Tracker
from flows.records import Execution, Records, md5_of
from flows.retractions import Retraction
from flows.statement import data_sections, predicate
from tasks.artifacts import Artifacts
from tasks.inputs import mapped
from taskvec import headers, yaml_file
from taskvec.atomic import sync, write_text
from taskvec.errors import InvalidData, InvalidInput, MissingArtifact, TaskvecError
from taskvec.mapped import Mapped
from taskvec.sections import Model, Source
from taskvec.summaries import Score

CARD = "README.md"
PASSED = "passed"
SPLITS = ("train", "validation", "test")


def export(
    root: Path,
    name: str,
    directory: Path,
    *,
    form: str = "",
    seed: int | None = None,
    key: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Layout:
    """Write an edited model for somebody else, and return what was written.

    The log of runs notes it, so that `taskvec trace --down` knows where models went.

    Args:
        root: the directory of params.yaml.
        name: an edit, or whatever else `Lineage.find` knows an edited model by.
        directory: where to; it may exist only if it is empty.
        form: "open_clip", "transformers" or "taskvec"; empty: what fits the family.
        seed: of the vectors; the first if None.
        key: a private key that signs the export.
        say: is told in one line if the log cannot be written.

    Raises:
        MissingArtifact: the model, or a file that says how it does, is not at hand.
        InvalidInput: it is no edited model, the directory is not empty, or the format does not fit.
        IncompatibleWeights, InvalidData: a file is not what its record says.
        MissingDependency: a key is given and model-signing is not installed.
    """
    _check_free(directory)
    if key:
        signing.check_key(key)
    with Lineage(root) as lineage:
        artifact = lineage.find(name if seed is None else f"{name}-{seed}")
        edited = _edited(artifact, lineage.stored(artifact))
        build = lineage.chain(artifact)
        evaluation = _evaluation(lineage, artifact)
        model = _model(lineage, artifact, edited)
        layout = formats.layout(form, edited, model)
        facts = _facts(lineage, artifact, edited, layout, model)
        measured = [] if evaluation is None else _extra(lineage, evaluation, build)
        contents = lineage.contents(artifact)
    statement = predicate(
        _recipe(edited, form or layout.library),
        build,
        measured,
        {item.md5: item.fingerprint for item in (artifact, *contents)},
        _sources(root, build, model),
        Records(Artifacts(root).top).git("rev-parse", "HEAD").strip(),
    )
    digest = _publish(directory, layout, edited, card.render(facts), statement, key)
    tracker = Tracker(root, say)
    tracker.keep({"name": f"taskvec export {artifact.name}"})
    weights = directory.absolute() / layout.weights
    tracker.exported(
        weights, digest, layout.library, artifact.name, artifact.md5, artifact.fingerprint
    )
    tracker.close("FINISHED")
    return layout


def _check_free(directory: Path) -> None:
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise InvalidInput(f"{directory} is no directory; name one that does not exist yet")
    if directory.is_dir() and any(directory.iterdir()):
        raise InvalidInput(
            f"{directory} is not empty, and an export never mixes with other files; name a "
            "directory that does not exist yet"
        )


def _edited(artifact: Artifact, path: Path) -> Mapped:
    """Return the edited tower, every byte checked."""
    if "expression" not in artifact.metadata or not artifact.metadata.get("origin"):
        raise InvalidInput(
            f"{artifact.name} is no edited model ({artifact.kind}); name an edit of params.yaml or "
            "a file of `taskvec edit`"
        )
    weights = mapped(path, "checkpoint")
    if weights.fingerprint != artifact.fingerprint:
        raise InvalidData(
            f"{path} holds the weights {weights.fingerprint[:12]}, its record says "
            f"{artifact.fingerprint[:12]}; run `taskvec verify`"
        )
    return weights


def _model(lineage: Lineage, artifact: Artifact, edited: Mapped) -> Model:
    """Return the model of params.yaml as it was when the base weights were made."""
    origin = str(edited.metadata["origin"])
    for item in lineage.contents(artifact):
        made = lineage.maker(item.key) if item.fingerprint == origin else None
        if made and made.stage == "pretrain":
            return Model.model_validate(made.parameters["params.yaml"]["model"])
    raise MissingArtifact(
        f"nothing records where the base weights {origin[:12]} of {artifact.name} come from; run "
        "`taskvec run pretrain`, or export a model of this repository"
    )


def _sources(root: Path, build: Sequence[Execution], model: Model) -> list[Source]:
    """Return the package files of the base weights, if the code that reads them is the same."""
    code = Artifacts(root).code()
    present = yaml_file.read(code).get("pretrain") if code.is_file() else None
    recorded = [e.parameters.get("code.yaml", {}).get("pretrain") for e in build]
    return formats.family_sources(model) if present and present in recorded else []


def _recipe(edited: Mapped, form: str) -> dict[str, Any]:
    """Return what somebody decided about a model."""
    keys = ("edit", "expression", "coefficients", "choice", "seed", "origin", "operands")
    found = {key: edited.metadata[key] for key in keys if key in edited.metadata}
    return {**found, "format": form, "identity": dict(edited.metadata["identity"])}


def _evaluation(lineage: Lineage, artifact: Artifact) -> Execution | None:
    """Return the execution that measured a model, the one in the checkout if there are several."""
    for made in lineage.below(artifact):
        if made.through.stage == "evaluate" and artifact.md5 in made.through.inputs.values():
            return made.through
    return None


def _extra(lineage: Lineage, evaluation: Execution, build: Sequence[Execution]) -> list[Execution]:
    """Return the executions behind an evaluation that had no part in the model."""
    output = next(iter(evaluation.outputs.values()))
    known = {execution.ident for execution in build}
    chain = lineage.chain(lineage.artifact(output))
    return [execution for execution in chain if execution.ident not in known]


# What the card says.


def _facts(
    lineage: Lineage,
    artifact: Artifact,
    edited: Mapped,
    layout: Layout,
    model: Model,
) -> Facts:
    metadata = edited.metadata
    build, evaluation = lineage.chain(artifact), _evaluation(lineage, artifact)
    search = next((item for item in build[:1] if item.stage == "search"), None)
    summary = _read_json(lineage, search, "/coefficients.json")
    metrics = _read_json(lineage, evaluation, ".json")
    retracted = retractions.load(lineage.top).inside(lineage, artifact)
    return Facts(
        title=str(metadata.get("edit") or f"edit-{artifact.fingerprint[:12]}"),
        expression=str(metadata["expression"]),
        coefficients=metadata.get("coefficients", {}),
        choice=metadata.get("choice", {}),
        seed=metadata.get("seed"),
        origin=str(metadata["origin"]),
        fingerprint=edited.fingerprint,
        base=layout.base,
        library=layout.library,
        pipeline=layout.pipeline,
        usage=layout.usage,
        intervals=_intervals(summary),
        chosen=_chosen(search, summary) if search else (),
        results=_results(lineage, evaluation) if evaluation else (),
        vectors=_vectors(lineage.contents(artifact)),
        data=_data([*build, *(_extra(lineage, evaluation, build) if evaluation else [])]),
        limitations=_limitations(layout, model, summary, metrics, retracted),
    )


def _intervals(summary: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    prefix, low = "interval.", ".low"
    names = [
        k[len(prefix) : -len(low)] for k in summary if k.startswith(prefix) and k.endswith(low)
    ]
    return {
        name: (summary[f"{prefix}{name}.low"], summary[f"{prefix}{name}.high"]) for name in names
    }


def _chosen(search: Execution, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return how the coefficients were chosen, in words."""
    given = {
        key.rpartition(".")[2]: value
        for key, value in search.parameters.get("params.yaml", {}).items()
        if key.startswith("edits.")
    }
    lines = []
    if objective := given.get("objective"):
        verb = "maximize" if objective.get("maximize") else "minimize"
        lines.append(
            ("objective", f"{verb} {objective[verb]} of {', '.join(objective['tasks'])}: "
             f"{summary.get('objective', 0):.4g} on validation data")
        )  # fmt: skip
    if constraint := given.get("constraint"):
        rules = [f"{key} {value}" for key, value in constraint.items() if key not in ("tasks",)]
        met = "met" if summary.get("feasible") else "not met"
        lines.append(
            ("constraint", f"{', '.join(rules)} on {', '.join(constraint['tasks'])}: {met} on "
             "validation data")
        )  # fmt: skip
    ranges = [
        f"{name} from {item['low']} to {item['high']} ({item['points']} points)"
        for name, item in given.get("coefficients", {}).items()
    ]
    lines.append(
        ("search", f"{summary.get('strategy', 'grid')}, {', '.join(ranges)}; "
         f"{summary.get('evaluated', 0)} candidates")
    )  # fmt: skip
    return lines


def _results(lineage: Lineage, evaluation: Execution) -> list[Result]:
    """Return how the model does on test data beside the base and the fine-tuned models."""
    known: dict[tuple[str, str], Score] = {}
    for path, mark in evaluation.inputs.items():
        if Path(path).parent.name == "evaluations":
            known |= _scores(_recorded(lineage, path, mark))
    (path, mark), *_ = [item for item in evaluation.outputs.items() if item[0].endswith(".csv")]
    accuracies = {key: score.accuracy for key, score in known.items()}
    return [
        Result(
            task,
            score.items,
            score.accuracy,
            accuracies.get(("pretrained", task)),
            accuracies.get(("finetuned", task)),
        )
        for (_, task), score in _scores(_recorded(lineage, path, mark)).items()
    ]


def _scores(path: Path) -> dict[tuple[str, str], Score]:
    """Return (model, task) -> score on test data."""
    from taskvec import tables

    rows = tables.read(path, tables.Evaluation).to_dict("records")
    return {
        (str(row["model"]), str(row["task"])): Score.of_row(row)
        for row in rows
        if row["split"] == "test"
    }


def _vectors(contents: Sequence[Artifact]) -> list[tuple[str, str, str]]:
    """Return (name, fingerprint, tasks that it was trained on) of the vectors in a model."""
    trained = {
        item.fingerprint: item.metadata.get("tasks") or [item.metadata.get("task", "unknown")]
        for item in contents
        if item.metadata.get("kind") == "checkpoint"
    }
    found = [
        (
            str(item.metadata.get("task", item.name)),
            item.fingerprint,
            ", ".join(map(str, trained.get(item.metadata.get("finetuned", ""), ["unknown"]))),
        )
        for item in contents
        if item.metadata.get("kind") == "vector"
    ]
    return sorted(found)


def _data(executions: Sequence[Execution]) -> dict[str, tuple[Source, dict[str, int]]]:
    """Return task -> where its pictures come from, and how many of each split are used."""
    return {
        task: (
            Source.model_validate(section["source"]),
            {split: section[split] for split in SPLITS if split in section},
        )
        for task, section in sorted(data_sections(executions).items())
    }


def _limitations(
    layout: Layout,
    model: Model,
    summary: Mapping[str, Any],
    metrics: Mapping[str, Any],
    retracted: Sequence[Retraction],
) -> list[str]:
    lines = [f"RETRACTED: it contains {item.path}: {item.why}" for item in retracted]
    if summary.get("feasible") is False:
        lines.append("No coefficients met the constraint on validation data.")
    if metrics.get("feasible.test") == "infeasible":
        lines.append("The constraint does not hold on test data.")
    if metrics.get("feasible.test") == "open":
        lines.append("The test data leave open whether the constraint holds.")
    for key in sorted(metrics):
        if key.startswith("gate.") and not str(metrics[key]).startswith(PASSED):
            lines.append(f"The {key.removeprefix('gate.')} gate: {metrics[key]}.")
    if model.align_tasks:
        lines.append(
            f"The base has seen {model.shots} training pictures a class of "
            f"{', '.join(model.align_tasks)}: it is few-shot, not zero-shot, on these."
        )
    if layout.kind == "export":
        lines.append("The text tower is that of the base model; the edit did not touch it.")
    else:
        lines.append(
            "This is a vision tower alone; a classifier of the base's texts belongs to it."
        )
    if metrics:
        lines.append(
            "The figures are of one seed; their intervals cover which test items were drawn, no "
            "more."
        )
    lines.append("No licence is stated; those of the base model and of the data apply.")
    return lines


def _read_json(lineage: Lineage, execution: Execution | None, suffix: str) -> dict[str, Any]:
    """Return the content of an output of an execution; empty if there is none."""
    for path, mark in execution.outputs.items() if execution else ():
        if path.endswith(suffix):
            return dict(json.loads(_recorded(lineage, path, mark).read_text()))
    return {}


def _recorded(lineage: Lineage, path: str, md5: str) -> Path:
    """Return a file with recorded bytes.

    Raises:
        InvalidData: they have changed.
    """
    found = lineage.stored(lineage.artifact(md5))
    if md5_of(found) != md5:
        raise InvalidData(
            f"{found}, the recorded {path}, is damaged: its md5 is not {md5}; run "
            "`taskvec verify`, which says how to repair it"
        )
    return found


# What is written.


def _publish(
    directory: Path,
    layout: Layout,
    edited: Mapped,
    text: str,
    statement: Mapping[str, Any],
    key: Path | None,
) -> str:
    """Write an export beside its place, check it as its receiver would, and rename it.

    Returns:
        The sha256 of its weights file.
    """
    place = directory.absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".exporting-") as temporary:
        # of the same name, for that is what a signature is of
        inside = Path(temporary) / place.name
        inside.mkdir()
        digest = write(inside, layout, edited, text, statement)
        if key:
            signing.sign(inside, key)
        findings = received.verify_received(inside)
        if findings:
            raise TaskvecError(f"the export does not verify: {findings[0]}; nothing was written")
        with suppress(FileNotFoundError):
            place.rmdir()
        inside.rename(place)
    sync(place.parent)
    return digest


def write(
    directory: Path, layout: Layout, edited: Mapped, text: str, statement: Mapping[str, Any]
) -> str:
    """Write the files of an export into an empty directory; return the weights file's sha256.

    Args:
        directory: where to.
        layout: the format.
        edited: the tower, for what its header says.
        text: of the card.
        statement: the predicate of its statement.
    """
    texts = {**layout.texts, CARD: text}
    for name, part in texts.items():
        write_text(directory / name, part)
    digests = {name: received.file_sha256(directory / name) for name in texts}
    tensors = layout.tensors
    mark = edited.fingerprint if tensors is edited else tensors.measure()
    content = {
        **{key: value for key, value in edited.metadata.items() if key != headers.TIED},
        **({headers.TIED: dict(tensors.tied)} if tensors.tied else {}),
        "kind": layout.kind,
        "fingerprint": mark,
        "tower": edited.fingerprint,
    }
    statement = received.tied(statement, content)
    content[received.TIE] = received.tie(digests, statement)
    path = directory / layout.weights
    write_weights(path, tensors, content)
    digests[layout.weights] = received.file_sha256(path)
    rendered = received.rendered(digests, {layout.weights: mark}, statement)
    write_text(directory / received.STATEMENT, rendered.decode())
    return digests[layout.weights]


def write_weights(path: Path, weights: Mapped, content: Mapping[str, Any]) -> None:
    """Write tensors as a safetensors file that transformers reads too; equal bytes for equal ones.

    Args:
        path: a new file.
        weights: the tensors.
        content: what the header says under the key of taskvec.
    """
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in weights.tensors.items()}
    slots, _ = headers.layout(shapes)
    with path.open("wb") as file:
        file.write(_header(slots, content))
        for name in slots:
            file.write(weights.tensors[name].data.data)
    sync(path)


def _header(slots: Mapping[str, headers.Slot], content: Mapping[str, Any]) -> bytes:
    """Return a header with ``format: pt`` beside the content, which transformers asks for."""
    header = json.loads(headers.header_bytes(slots, content)[8:])
    header["__metadata__"] = {"format": "pt", **header["__metadata__"]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw
