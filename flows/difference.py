"""What differs between two executions of a stage, or between two edited models."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flows.lineage import Artifact, Lineage
from flows.records import Execution
from taskvec.errors import InvalidInput
from taskvec.layers import layer_of

NONE = "none"
EDIT = "EDIT"
LONG = 60  # characters of a value
OUTSIDE = "outside blocks"


def words(old: Execution, new: Execution) -> list[str]:
    """Return what differs in what two executions were given, with old and new values."""
    found = ["its command changed"] if old.command != new.command else []
    for file in sorted({*old.parameters, *new.parameters}):
        before, after = old.parameters.get(file, {}), new.parameters.get(file, {})
        for key in sorted({*before, *after}):
            found += _changed(file, key, before.get(key), after.get(key))
    for path in sorted({*old.inputs, *new.inputs}):
        one, other = (given.get(path, NONE) for given in (old.inputs, new.inputs))
        if one != other:
            found.append(f"{path} changed: {one[:12]} -> {other[:12]}")
    return found


def _changed(file: str, key: str, old: Any, new: Any) -> Iterator[str]:
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from _changed(file, f"{key}.{name}", old.get(name), new.get(name))
    elif file == "code.yaml" and key not in ("python",) and not key.startswith("packages"):
        yield "its code changed" if new is not None and old is not None else f"{file}: {key}"
    else:
        yield f"{key} changed: {_brief(old)} -> {_brief(new)}"


def _brief(value: Any) -> str:
    text = NONE if value is None else str(value)
    return text if len(text) <= LONG else f"{text[: LONG - 3]}..."


def difference(lineage: Lineage, left: Artifact, right: Artifact) -> dict[str, Any]:
    """Return what differs between two models: how they were made, how they do, their weights.

    Args:
        lineage: of the repository.
        left: a model, and
        right: another.

    Raises:
        InvalidInput: one holds no weights.
        IncompatibleWeights: they have other tensors.
        MissingArtifact: the file of one is not at hand.
    """
    for artifact in (left, right):
        if not artifact.fingerprint:
            raise InvalidInput(
                f"{artifact.name} is no model or vector whose file is at hand; `taskvec diff` "
                "compares two of these, such as two edits or one at two revisions (addition@HEAD~1)"
            )
    found = [lineage.chain(artifact) for artifact in (left, right)]
    one, other = (_by_role(chain) for chain in found)
    seeds = [chain[0].item.rpartition("-")[2] if chain else "" for chain in found]
    stages = {role: _told(one[role], other[role], seeds) for role in one if role in other}
    pair = [_facts(lineage, artifact) for artifact in (left, right)]
    return {
        "left": {"path": left.name, "md5": left.key},
        "right": {"path": right.name, "md5": right.key},
        "seeds": _beside(*({"seed": seed} for seed in seeds)),
        "stages": {role: said for role, said in stages.items() if said},
        "only left": [role for role in one if role not in other],
        "only right": [role for role in other if role not in one],
        "coefficients": _beside(*(facts["coefficients"] for facts in pair)),
        "metrics": _beside(*(facts["metrics"] for facts in pair)),
        "weights": distances(*(lineage.stored(artifact) for artifact in (left, right))),
    }


def render(found: Mapping[str, Any]) -> str:
    """Return a difference as text."""
    lines = [f"- {found['left']['path']}  {found['left']['md5'][:12]}"]
    lines.append(f"+ {found['right']['path']}  {found['right']['md5'][:12]}")
    for title in ("seeds", "coefficients"):
        lines += [f"\n{name}: {_pair(*values)}" for name, values in found[title].items()]
    for role, said in found["stages"].items():
        lines.append(f"\n{role}")
        lines += [f"  {text}" for text in said]
    for side, mark in (("left", "-"), ("right", "+")):
        if found[f"only {side}"]:
            lines.append(f"\nonly {mark}: {', '.join(found[f'only {side}'])}")
    shown = {k: v for k, v in found["metrics"].items() if k.startswith("test.")}
    if shown:
        lines.append("\nmetrics")
        lines += [f"  {name}: {_pair(*values)}" for name, values in shown.items()]
    weights = found["weights"]
    if weights["distance"]:
        lines.append(
            f"\nweights: distance {weights['distance']:.4g}, "
            f"{100 * weights['relative']:.2g} % of the norm"
        )
        for layer, one in weights["layers"].items():
            lines.append(f"  {layer}: {one['distance']:.4g} ({100 * one['relative']:.2g} %)")
    else:
        lines.append("\nweights: equal, bit for bit")
    return "\n".join(lines)


def _pair(old: Any, new: Any) -> str:
    if isinstance(old, int | float) and isinstance(new, int | float):
        return f"{old:.6g} -> {new:.6g} ({new - old:+.4g})"
    return f"{_brief(old)} -> {_brief(new)}"


def _by_role(chain: list[Execution]) -> dict[str, Execution]:
    """Return the executions by what they do, under names that leave out edit and seed."""
    name, _, seed = (chain[0].item if chain else "").rpartition("-")
    found = {}
    for execution in chain:
        neutral = replace(
            execution,
            command=_neutral(execution.command, name, seed),
            inputs={_neutral(path, name, seed): md5 for path, md5 in execution.inputs.items()},
            outputs={_neutral(path, name, seed): md5 for path, md5 in execution.outputs.items()},
            parameters={
                file: {_neutral(key, name, seed): value for key, value in values.items()}
                for file, values in execution.parameters.items()
            },
        )
        found[neutral.name] = neutral
    return found


def _neutral(text: str, name: str, seed: str) -> str:
    """Return a command, path or key of an edit as it is called for any edit and seed."""
    if name:
        text = re.sub(rf"(?<![A-Za-z0-9_]){re.escape(name)}(?![A-Za-z0-9_])", EDIT, text)
        text = re.sub(rf"-{seed}(?=[./ ]|$)", "", text)
    return text


def _told(one: Execution, other: Execution, seeds: list[str]) -> list[str]:
    """Return what differs between two executions that do the same for two models.

    Files that both read and that stages made are left out: what is different about them is told
    where they were made.
    """
    said = words(replace(one, inputs={}), replace(other, inputs={}))
    for which, here, there in (("first", one, other), ("second", other, one)):
        if names := sorted(set(here.inputs) - set(there.inputs)):
            said.append(f"only the {which} read {', '.join(names)}")
    same = one.inputs == other.inputs and seeds[0] == seeds[1]
    if not said and same and one.outputs != other.outputs:
        said.append("the same recipe gave other bytes")
    return said


def _facts(lineage: Lineage, artifact: Artifact) -> dict[str, dict[str, Any]]:
    """Return coefficients and test metrics of a model."""
    metrics: dict[str, Any] = {}
    for made in lineage.below(artifact):
        name = made.artifact.name
        if made.through.stage == "evaluate" and name.endswith(".json"):
            metrics |= json.loads(lineage.stored(made.artifact).read_text())
    return {"coefficients": dict(artifact.metadata.get("coefficients", {})), "metrics": metrics}


def _beside(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return name -> [left, right] of what differs."""
    names = dict.fromkeys([*left, *right])
    pairs = {name: [left.get(name), right.get(name)] for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def distances(left: Path, right: Path) -> dict[str, Any]:
    """Return the Euclidean distance of the weights, whole and by layer, and as a share of the norm.

    Raises:
        IncompatibleWeights: the models have other tensors.
    """
    from taskvec.lazy import gram
    from taskvec.mapped import difference as apart
    from taskvec.mapped import open_weights, weights_as_vector

    one, other = open_weights(left), open_weights(right)
    products = gram([apart(one, other), weights_as_vector(one)])
    layers: dict[str, Any] = {}
    for name, matrix in products.items():
        found = layer_of(name)
        layer = OUTSIDE if found is None else f"layer {found}"
        layers[layer] = layers.get(layer, 0) + matrix.diagonal()
    whole = sum(layers.values())
    ordered = sorted(layers, key=lambda layer: (layer == OUTSIDE, len(layer), layer))
    return {**_norms(whole), "layers": {layer: _norms(layers[layer]) for layer in ordered}}


def _norms(squares: Any) -> dict[str, float]:
    distance, norm = (float(value) ** 0.5 for value in squares)
    return {"distance": distance, "relative": distance / norm if norm else 0.0}
