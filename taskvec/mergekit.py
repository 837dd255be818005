"""Files of mergekit read as expressions, run as they stand, and written.

What a file of mergekit (0.1.5) says is a weighted sum of the methods of taskvec/merging/, with
numbers in place of coefficients: of deltas, or of whole models where there is no base.

    task_arithmetic   0.3 * a + 0.5 * b
    linear            average(a, b), without a base
    slerp             slerp(base, a, t=0.4), without a base
    model_stock       model_stock(a, b)
    ties              ties(0.3 * a, 0.5 * b, density=0.2, scope="tensor", variant="normalized")
    dare_linear       0.3 * dare(a, p=0.5, rescale="l1") + ...; also breadcrumbs, della_linear
    dare_ties         ties(0.3 * dare(a, ...), ..., density=1); also breadcrumbs_ties, della

A model may be a LoRA adapter of the base. ``normalize`` becomes a division by the sum of the
weights, `average`, or a variant of `ties`. A parameter that differs from tensor to tensor, by a
gradient or by filters, is refused.

Everything is computed in float32. Single elements differ from mergekit: of several that are as
large as the least one to keep, all are kept; of 100, the density 0.29 keeps 29 and not 28; and
where weighted changes cancel exactly, `ties` does not always elect the positive sign.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from taskvec import edits, streaming
from taskvec.errors import IncompatibleWeights, InvalidInput, MissingArtifact
from taskvec.headers import TIED
from taskvec.layers import places
from taskvec.lazy import Lazy
from taskvec.lora import is_adapter, open_adapter
from taskvec.mapped import (
    Mapped,
    Stored,
    aligned,
    check_alike,
    difference,
    open_weights,
    weights_as_vector,
)
from taskvec.mergekit_export import write
from taskvec.mergekit_recipe import HALVES, ROUNDING, Recipe, read, reading

__all__ = ["Recipe", "merge", "read", "write"]

SUFFIX = ".safetensors"


def merge(
    config: Path,
    out: Path,
    *,
    fingerprints: bool = False,
    progress: streaming.Progress | None = None,
    warn: Callable[[str], None],
) -> str:
    """Write the model that a file of mergekit describes; return its fingerprint.

    Tensors that are not floating must be equal in all models and are copied.

    Args:
        config: the file; a relative path in it starts in its directory, or else in the working one.
        out: a .safetensors file, or a directory, which gets a model.safetensors.
        fingerprints: record the fingerprints of all inputs, also of those that another program
            wrote; it takes as long as reading these once more.
        progress: is told the bytes done and the bytes in all.
        warn: is told each sentence that the user should read.

    Raises:
        MissingArtifact: the file or a model is not there.
        InvalidInput: see `read`.
        IncompatibleWeights: the models do not have the same parameters, shapes and dtypes.
    """
    target = _target(out)
    said = reading(config)
    recipe = said.recipe
    for sentence in recipe.warnings:
        warn(sentence)
    paths = {name: _found(path, config) for name, path in recipe.vectors.items()}
    base = _opened(_found(recipe.base, config), str(recipe.base)) if recipe.base else None
    adapters = {name: path for name, path in paths.items() if base and is_adapter(path)}
    models = {name: _opened(p, name) for name, p in paths.items() if name not in adapters}
    first = base or next(iter(models.values()))
    if said.blocks is not None:
        _check_blocks(first, said.blocks, config)
    stored = {first.tensors[name].dtype for name in first.floating} & HALVES.keys()
    for dtype in sorted(stored) if said.as_stored else ():
        warn(ROUNDING.format(HALVES[dtype]))
    vectors = {name: _vector(weights, first, base) for name, weights in models.items()}
    vectors |= {name: open_adapter(path, first) for name, path in adapters.items()}
    merged = edits.at(said.edit, {}, vectors)
    assert merged is not None  # there is no coefficient to be zero
    metadata: dict[str, Any] = {
        "digest": said.edit.digest,
        "expression": recipe.expression,
        "method": said.method,
        "operands": {
            name: _identity(path, models.get(name), fingerprints)
            for name, path in recipe.vectors.items()
        },
        "origin": _identity(recipe.base, base, fingerprints) if recipe.base and base else None,
    }
    if first.tied:
        metadata[TIED] = dict(first.tied)
    return streaming.write(
        target,
        _output(first, merged, recipe),
        kind="checkpoint",
        metadata=metadata,
        progress=progress,
    )


def _target(out: Path) -> Path:
    """Return the file to write."""
    if out.suffix == SUFFIX and not out.is_dir():
        return out
    if out.exists() and not out.is_dir():
        raise InvalidInput(f"{out} is no directory; expected one, or a {SUFFIX} file")
    return out / f"model{SUFFIX}"


def _opened(path: Path, label: str) -> Mapped:
    """Return the weights in a path; messages call them ``label``."""
    return replace(open_weights(path), label=label)


def _found(path: Path, config: Path) -> Path:
    """Return where a path of a file leads to."""
    for found in (config.parent / path, path):
        if found.exists():
            return found
    raise MissingArtifact(
        f"{config}: {str(path)!r} is no file or directory, neither beside this file nor in the "
        "working directory; nothing is downloaded: download the model and name its directory"
    )


def _check_blocks(weights: Mapped, blocks: int, config: Path) -> None:
    found = sorted({place.depth for place in places(weights.tensors).values()})
    if found != [blocks]:
        raise IncompatibleWeights(
            f"{config}: slices[0]: the ranges end at {blocks}, and {weights.label} has "
            f"{' and '.join(map(str, found)) or 'no'} blocks; expected whole models: write models "
            "in place of slices"
        )


def _vector(weights: Mapped, first: Mapped, base: Mapped | None) -> Lazy:
    if base:
        return difference(base, weights)
    named = aligned(first, weights)
    check_alike(first, named)
    return weights_as_vector(named)


def _identity(path: Path, weights: Mapped | None, measure: bool) -> dict[str, str]:
    """Return what is recorded of an input: no directory, it says nothing elsewhere."""
    if weights is None:  # an adapter, whose tensors are computed
        return {"file": path.name, "fingerprint": ""}
    known = str(weights.metadata.get("fingerprint", ""))
    return {"file": path.name, "fingerprint": weights.fingerprint if measure else known}


def _output(first: Mapped, merged: Lazy, recipe: Recipe) -> streaming.Output:
    def tensor(name: str, stored: Stored) -> Stored | streaming.Computed:
        if name not in merged.shapes:
            return stored
        dtype = recipe.dtype or stored.dtype
        return streaming.Computed(merged, name, dtype, stored if recipe.base else None)

    return {name: tensor(name, stored) for name, stored in first.tensors.items()}
