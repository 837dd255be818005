"""Edits outside the graph: one expression at given coefficients, written to a file anywhere.

The file says in its header what it was made of, as every file of taskvec does.
"""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from tasks.artifacts import Artifacts
from tasks.combine import stored_vectors
from tasks.evaluate import evaluated
from tasks.inputs import architecture, check_origin, checkpoint, mapped
from tasks.stages import Emit
from taskvec import streaming
from taskvec.edits import at
from taskvec.errors import InvalidExpression, InvalidInput
from taskvec.expressions import Edit
from taskvec.params import Params


def edit(
    artifacts: Artifacts,
    recipe: Edit,
    coefficients: Mapping[str, float],
    seed: int,
    out: Path,
    emit: Emit,
) -> dict[str, str]:
    """Write ``theta_0 + b_0 + sum_k c_k * basis_k`` to ``out``.

    Args:
        artifacts: where the vectors and the pre-trained model lie.
        recipe: a parsed expression without lists of values.
        coefficients: a value for each coefficient.
        seed: of the fine-tuned models that the vectors come from.
        out: a .safetensors file outside data/, which DVC manages.
        emit: is told the progress.

    Returns:
        What was read: path below the root -> fingerprint.

    Raises:
        InvalidExpression: an option has several values.
        InvalidInput: ``out`` is no place for it, or a coefficient is missing or unknown.
        IncompatibleWeights: the vectors do not fit one another or the model.
    """
    if recipe.choices:
        label, values = next(iter(recipe.choices.items()))
        raise InvalidExpression(f"{label} has {len(values)} values; one edit needs one of them")
    _check_out(out, artifacts)
    pretrained = mapped(artifacts.pretrained(), "checkpoint")
    paths = {name: artifacts.vector(name, seed) for name in recipe.vectors}
    loaded = {name: mapped(path, "vector") for name, path in paths.items()}
    for name, item in loaded.items():
        check_origin(item, pretrained.fingerprint, f"the vector of {name}")
    streaming.apply(
        pretrained,
        at(recipe, coefficients, stored_vectors(loaded)),
        out,
        progress=lambda done, total: emit({"step": done, "steps": total}),
        identity=pretrained.metadata["identity"],
        expression=str(recipe),
        digest=recipe.digest,
        coefficients=dict(sorted(coefficients.items())),
        operands={name: item.fingerprint for name, item in loaded.items()},
        seed=seed,
    )
    read = {artifacts.pretrained(): pretrained, **{paths[name]: loaded[name] for name in paths}}
    return {str(path.relative_to(artifacts.root)): item.fingerprint for path, item in read.items()}


def evaluate(
    artifacts: Artifacts, params: Params, path: Path, tasks: list[str], split: str, emit: Emit
) -> pd.DataFrame:
    """Return how an edited model does beside the pre-trained one: one row a model and task.

    Args:
        artifacts: where pictures and heads lie.
        params: says what the model is.
        path: the edited model.
        tasks: what to evaluate on.
        split: "validation", or "test" for a figure that nothing will be chosen by.
        emit: is told the progress.

    Returns:
        The columns model ("pretrained" or "edit"), task, split, items, correct and chance.
    """
    tower = architecture(params.model)
    pretrained = checkpoint(artifacts.pretrained(), tower)
    models = {"pretrained": pretrained, "edit": checkpoint(path, tower, pretrained.fingerprint)}
    rows = []
    for label, weights in models.items():
        tower.load(weights.tensors)
        for task in tasks:
            rows.append({"model": label, **evaluated(artifacts, tower, task, split)})
            emit({"step": len(rows), "steps": len(models) * len(tasks)})
    return pd.DataFrame(rows)


def _check_out(out: Path, artifacts: Artifacts) -> None:
    if out.suffix != ".safetensors":
        raise InvalidInput(f"{out}: an edited model is a .safetensors file")
    if out.resolve().is_relative_to(artifacts.data.resolve()):
        raise InvalidInput(
            f"{out} lies in {artifacts.data}, whose files belong to stages; write it elsewhere, or "
            "add the edit to params.yaml"
        )
