"""Files of mergekit as expressions: which method and options have the meaning of which keys."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from taskvec import plugins
from taskvec.expressions import Call, Edit, Linear, Vector
from taskvec.mapped import CONTENTS, INDEX, PICKLES
from taskvec.mergekit_export import rest
from taskvec.mergekit_file import File, Model, short

CANCELLED = 1e-8  # mergekit does not divide by a sum of weights that is smaller


@dataclass(frozen=True)
class Recipe:
    """What a file of mergekit says.

    Attributes:
        expression: in canonical text, without coefficients.
        vectors: name -> path of the model, as the file has it. The vector is the difference to the
            base, or the model itself if there is no base.
        base: what the edit is added to; None for a merge of whole models.
        dtype: "F32", "F16" or "BF16"; None for those of the base, or of the models.
        warnings: sentences about what is ignored, and where mergekit would give another result.
    """

    expression: str
    vectors: Mapping[str, Path]
    base: Path | None
    dtype: str | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """What a method does with deltas: how it thins them out, what follows, and its defaults."""

    sparse: str = ""
    consensus: bool = False
    normalize: bool = False
    rescale: bool = False

    @property
    def parameters(self) -> set[str]:
        """The parameters that have an effect."""
        thinning = {"density", "rescale"} if self.sparse else set()
        return {"weight", "normalize", "lambda", *thinning, *EXTRA.get(self.sparse, ())}


EXTRA = {"breadcrumbs": ("gamma",), "della": ("epsilon",)}
RULES = {
    "task_arithmetic": Rule(),
    "ties": Rule("magnitude", consensus=True, normalize=True),
    "dare_linear": Rule("dare", rescale=True),
    "dare_ties": Rule("dare", consensus=True, rescale=True),
    "breadcrumbs": Rule("breadcrumbs"),
    "breadcrumbs_ties": Rule("breadcrumbs", consensus=True),
    "della_linear": Rule("della", rescale=True),
    "della": Rule("della", consensus=True, normalize=True, rescale=True),
}
WHOLE = {"linear": {"weight", "normalize"}, "slerp": {"t"}, "model_stock": {"filter_wise"}}
REFUSED = {
    "passthrough": "it stacks layers and merges nothing",
    "nuslerp": "it has weights and may go along rows; slerp is known",
    "multislerp": "only slerp of two models is known",
}
RANDOM = (
    "mergekit draws its masks anew in each run; here they follow from the seed 0: as many elements "
    "are kept, of the same size, but other ones"
)
DIFFERENCES = {
    "dare": RANDOM,
    "della": f"{RANDOM}; mergekit ranks along the second axis of a tensor, here along the last",
    "breadcrumbs": (
        "mergekit drops the whole change of a tensor of fewer than 1 / density elements; here one "
        "element is kept"
    ),
    "model_stock": (
        "mergekit takes changes as nearly orthogonal where the product of their lengths is below "
        "1e-6; here their angle counts"
    ),
}
ROUNDING = "mergekit computes in {}; here everything is computed in float32 and rounded once"
HALVES = {"F16": "float16", "BF16": "bfloat16"}

Build = Callable[[Sequence[Vector]], Linear]


@dataclass(frozen=True)
class Reading:
    """A recipe, its expression in normal form, and what only matters once the models are there."""

    recipe: Recipe
    edit: Edit
    method: str
    blocks: int | None  # how many blocks every model must have
    as_stored: bool  # mergekit would compute in the dtype of the models


def read(path: Path) -> Recipe:
    """Return what a file of mergekit says as an expression; the models need not be there.

    Args:
        path: YAML for mergekit-yaml or mergekit-pytorch, at most 64 KiB.

    Raises:
        MissingArtifact: there is no such file.
        InvalidInput: it is malformed, or says what an expression cannot; the message names the key.
    """
    return reading(path).recipe


def reading(path: Path) -> Reading:
    """Return what a file of mergekit says; see `read`."""
    file = File(path)
    method = file.method([*RULES, *WHOLE], REFUSED)
    used = RULES[method].parameters if method in RULES else WHOLE[method]
    file.check_parameters(method, used, of_base=method not in RULES)
    computed, dtype = file.dtypes()
    if method in RULES:
        models, build = _deltas(file, RULES[method])
    else:
        models, build = {"linear": _linear, "slerp": _slerp, "model_stock": _stock}[method](file)
    base = None if method in ("linear", "slerp") else file.base
    if base and computed in HALVES:
        file.warnings.append(ROUNDING.format(HALVES[computed]))
    names = labels(model.path for model in models)
    edit = Edit({}, build([Vector(names[model.path]) for model in models]))
    recipe = Recipe(
        expression=str(edit),
        vectors={names[model.path]: Path(model.path) for model in models},
        base=Path(base) if base else None,
        dtype=dtype,
        warnings=tuple(file.warnings),
    )
    return Reading(recipe, edit, method, file.blocks, as_stored=bool(base) and computed is None)


# Each of these returns the models that are merged, and what makes the expression of their vectors.


def _linear(file: File) -> tuple[list[Model], Build]:
    """Read a weighted sum of whole models, among which a base is one like the others."""
    weights = [file.number("weight", model.scopes, None) for model in file.models]
    normalize = file.truth("normalize", file.shared, True)
    total = math.fsum(weights)
    if normalize and total == 0:
        file.refuse("parameters.normalize", "the weights add up to 0; set it to false")
    kept = [number for number, weight in enumerate(weights) if weight]
    if not kept:
        file.refuse("models", "all weights are 0; nothing is left to merge")
    factors = [weights[number] for number in kept]
    models = [file.models[number] for number in kept]
    return models, lambda vectors: _weighted(file, vectors, factors, total if normalize else None)


def _slerp(file: File) -> tuple[list[Model], Build]:
    """Read an interpolation from the base to another model."""
    others = _others(file)
    if len(others) != 1:
        file.refuse("models", f"found {len(others)} beside the base; slerp takes one")
    bounds = "a number from 0 to 1"
    t = file.number("t", file.shared, None, bounds, lambda number: 0 <= number <= 1)
    start = next(model for model in file.models if model.path == file.base)
    return [start, *others], lambda vectors: _one(_call("slerp", map(_one, vectors), t=t))


def _stock(file: File) -> tuple[list[Model], Build]:
    """Read a Model Stock: its ratio follows from the angles of whole tensors."""
    others = _others(file)
    if len(others) < 2:
        file.refuse("models", "found 1 beside the base; model_stock takes two or more")
    if file.truth("filter_wise", file.shared, False):
        file.refuse("parameters.filter_wise", "found true; here whole tensors have an angle")
    file.warnings.append(DIFFERENCES["model_stock"])
    return others, lambda vectors: _one(_call("model_stock", map(_one, vectors)))


@dataclass(frozen=True)
class Delta:
    """A delta: its model, its weight, and how it is thinned out."""

    model: Model
    weight: float
    density: float
    method: str = ""
    options: Mapping[str, float | str] = field(default_factory=dict)

    def atom(self, vector: Vector) -> Vector | Call:
        """Return the vector, thinned out."""
        return _call(self.method, [_one(vector)], **self.options) if self.method else vector


def _deltas(file: File, rule: Rule) -> tuple[list[Model], Build]:
    """Read a method that thins deltas out and adds them, with or without an election of signs."""
    found = []
    for model in _others(file):
        weight, density = file.number("weight", model.scopes, None), 1.0
        if rule.sparse:
            bounds = "a fraction from 0 to 1"
            density = file.number("density", model.scopes, 1.0, bounds, lambda x: 0 <= x <= 1)
        found.append(Delta(model, weight, density))
    normalize = file.truth("normalize", file.shared, rule.normalize)
    scale = file.number("lambda", file.shared, 1.0)
    kept = [delta for delta in found if delta.weight and delta.density]
    if not kept or not scale:
        file.refuse("models", "all weights, densities or lambda are 0; nothing is left to merge")
    deltas = _thinned(file, rule, kept)
    models = [delta.model for delta in kept]
    if rule.consensus:
        return models, _elected(file, rule, deltas, normalize, scale)
    total = math.fsum(delta.weight for delta in found)
    divisor = total if normalize and abs(total) >= CANCELLED else None
    weights = [delta.weight for delta in deltas]

    def build(vectors: Sequence[Vector]) -> Linear:
        atoms = [delta.atom(vector) for delta, vector in zip(deltas, vectors, strict=True)]
        return _weighted(file, atoms, weights, divisor, scale)

    return models, build


def _elected(
    file: File, rule: Rule, deltas: Sequence[Delta], normalize: bool, scale: float
) -> Build:
    """Return what merges deltas by `ties`, which divides by the weights of the elected sign."""
    weights = {delta.weight for delta in deltas}
    densities = {delta.density for delta in deltas}
    if normalize and min(weights) < 0:
        file.refuse(
            "parameters.normalize",
            "found negative weights, whose sums mergekit divides by even if they are 0 or "
            "negative; set normalize to false",
        )
    variant = "sum"
    if normalize:
        variant = "normalized" if len(weights) > 1 else "mean"
    trimmed = rule.sparse == "magnitude" and len(densities) == 1 and densities != {1.0}
    options = {
        "density": deltas[0].density if trimmed else 1.0,
        "scope": "tensor" if trimmed else "flat",
        "variant": variant,
    }

    def build(vectors: Sequence[Vector]) -> Linear:
        operands = [
            _one(
                vector if trimmed else delta.atom(vector),
                1.0 if variant == "mean" else delta.weight,
            )
            for delta, vector in zip(deltas, vectors, strict=True)
        ]
        return _one(_call("ties", operands, **options), scale)

    return build


def _thinned(file: File, rule: Rule, deltas: Sequence[Delta]) -> list[Delta]:
    """Return the deltas with the way they are thinned out; one of density 1 stays as it is."""
    if all(delta.density == 1 for delta in deltas):
        return list(deltas)
    if file.truth("rescale", file.shared, rule.rescale) and not rule.rescale:
        file.refuse("parameters.rescale", f"found true; {rule.sparse} does not rescale here")
    if rule.sparse in DIFFERENCES:
        file.warnings.append(DIFFERENCES[rule.sparse])
    return [
        delta
        if delta.density == 1
        else replace(delta, method=rule.sparse, options=_thinning(file, rule, delta))
        for delta in deltas
    ]


def _thinning(file: File, rule: Rule, delta: Delta) -> dict[str, float | str]:
    """Return the options of the method that thins a delta out."""
    scopes, density = delta.model.scopes, delta.density
    norm = "l1" if file.truth("rescale", file.shared, rule.rescale) else "none"
    if rule.sparse == "dare":
        return {"p": rest(density), "rescale": norm}
    if rule.sparse == "della":
        epsilon = file.number(
            "epsilon",
            scopes,
            0.15,
            f"0 or more, with {density:g} - epsilon above 0 and {density:g} + epsilon below 1",
            lambda number: number >= 0 and density - number > 0 and density + number < 1,
        )
        return {"density": density, "epsilon": epsilon, "rescale": norm}
    if rule.sparse == "breadcrumbs":
        bounds = "a fraction of at least 0 and below 1"
        gamma = file.number("gamma", scopes, 0.01, bounds, lambda number: 0 <= number < 1)
        return {"density": density, "gamma": gamma, "scope": "tensor"}
    return {"density": density, "scope": "tensor"}


def _others(file: File) -> list[Model]:
    """Return the models beside the base."""
    if file.base is None:
        file.refuse("base_model", "missing; expected the model that the others come from")
    others = [model for model in file.models if model.path != file.base]
    if not others:
        file.refuse("models", "found the base alone; add what to merge into it")
    return others


def _weighted(
    file: File,
    atoms: Sequence[Vector | Call],
    weights: Sequence[float],
    divisor: float | None,
    scale: float = 1.0,
) -> Linear:
    """Return a weighted sum, divided by a number if there is one."""
    plain = all(isinstance(atom, Vector) for atom in atoms)
    if plain and len(atoms) > 1 and divisor == math.fsum(weights) and len(set(weights)) == 1:
        return _one(_call("average", map(_one, atoms)), scale)
    factors = [weight * scale / (divisor or 1.0) for weight in weights]
    if not all(0 < abs(factor) < math.inf for factor in factors):
        file.refuse("models", f"the factors {short(factors)} are no floats; use other weights")
    terms = sorted(zip(atoms, factors, strict=True), key=lambda term: str(term[0]))
    return Linear(tuple(terms))


def _one(atom: Vector | Call, weight: float = 1.0) -> Linear:
    return Linear(((atom, weight),))


def _call(method: str, operands: Iterable[Linear], **options: Any) -> Call:
    """Return a call in the normal form of `taskvec.expressions.parse`, made without the parser."""
    ordered = plugins.constant("merging", method, "ORDERED", False)
    sums = list(operands) if ordered else sorted(operands, key=str)
    complete = plugins.complete("merging", method, options)
    return Call(method, tuple(sums), tuple(sorted(complete.items())))


def labels(paths: Iterable[str]) -> dict[str, str]:
    """Return path -> name: that of the file or directory, longer where several have the same.

    The names do not depend on the order of the paths.
    """
    ordered = sorted(set(paths))
    result: dict[str, str] = {}
    for level in (1, 2):
        words = {path: _word(Path(path), level) for path in ordered if path not in result}
        found = [*words.values(), *result.values()]
        result |= {path: word for path, word in words.items() if found.count(word) == 1}
    for path in ordered:
        name = word = _word(Path(path), 2)
        number = 1
        while path not in result and name in result.values():
            number += 1
            name = f"{word[:60]}_{number}"
        result.setdefault(path, name)
    return result


def _word(path: Path, level: int) -> str:
    """Return the last parts of a path as a name of the language; model.safetensors is no part."""
    name = path.name
    for suffix in (INDEX, ".safetensors", *PICKLES):
        name = name.removesuffix(suffix)
    parts = [*path.parent.parts, name]
    if name in CONTENTS and path.parent.name:
        parts.pop()
    text = re.sub(r"[^A-Za-z0-9]+", "_", "_".join(parts[-level:])).strip("_")
    return (text if text[:1].isalpha() else f"model_{text}".strip("_"))[:64]
