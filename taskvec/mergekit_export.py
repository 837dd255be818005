"""Expressions written as files of mergekit, where mergekit has the same meaning for them."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from taskvec.errors import InvalidExpression
from taskvec.expressions import Call, Linear, Vector, parse
from taskvec.mergekit_file import WORDS

PLAIN = re.compile(r"(\.{0,2}/)*[A-Za-z][A-Za-z0-9_./-]*")
LINEAR = {"dare": "dare_linear", "breadcrumbs": "breadcrumbs", "della": "della_linear"}
ELECTED = {
    "": "ties", "magnitude": "ties", "dare": "dare_ties", "breadcrumbs": "breadcrumbs_ties",
    "della": "della",
}  # fmt: skip

Parameters = Mapping[str, float | bool]


@dataclass(frozen=True)
class Export:
    """A file to write: the method, the shared parameters, and those of each vector."""

    method: str
    shared: Parameters
    models: Mapping[str, Parameters]


def write(expression: str, vectors: Mapping[str, Path], base: Path | None) -> str:
    """Return the file of mergekit that does what an expression says.

    `taskvec.mergekit.read` gives the canonical expression back, with names made from the paths, if
    it gives it at all; another expression comes back in another form with the same result.

    Args:
        expression: without coefficients.
        vectors: name -> path of the fine-tuned model, or of the model itself if there is no base.
        base: the pre-trained model; None for a merge of whole models.

    Raises:
        InvalidExpression: mergekit cannot do this; the message says why.
    """
    edit = parse(expression, vectors, ())
    if edit.choices:
        raise InvalidExpression(
            f"'{edit}': {next(iter(edit.choices))} is a list; mergekit takes one value"
        )
    assert edit.offset is not None  # all of it is free of coefficients
    export = _whole(edit.offset) if base is None else _edited(edit.offset)
    paths = [vectors[name] for name in export.models]
    if export.method == "slerp":
        base = paths[0]
    elif base in paths or len(set(paths)) < len(paths):
        raise InvalidExpression(f"'{edit}': mergekit takes a model once; the paths must differ")
    return _yaml(export, vectors, base)


def rest(fraction: float) -> float:
    """Return 1 minus a fraction as it is written: 0.1 for 0.9."""
    return float(1 - Decimal(repr(fraction)))


def _whole(sum_: Linear) -> Export:
    """Return a merge of whole models."""
    (atom, weight), *more = sum_.terms
    names = [] if more or weight != 1 else _unweighted(atom)
    method = atom.method if isinstance(atom, Call) else ""
    if method == "slerp" and names:
        return Export("slerp", {"t": _options(atom)["t"]}, {name: {} for name in names})
    if method == "average" and names:
        return Export("linear", {"normalize": True}, {name: {"weight": 1.0} for name in names})
    weights = _weights(sum_)
    if weights is None:
        raise InvalidExpression(
            f"'{sum_}': without a base mergekit has weighted sums, average and slerp of models; "
            "name the base that these vectors start from"
        )
    return Export("linear", {"normalize": False}, _present(weights, sum_))


def _edited(sum_: Linear) -> Export:
    """Return a merge of deltas into a base."""
    (atom, weight), *more = sum_.terms
    if isinstance(atom, Call) and not more:
        names = _unweighted(atom)
        if atom.method == "average" and names:
            shared = {"normalize": True, "lambda": weight}
            return Export("task_arithmetic", shared, {name: {"weight": 1.0} for name in names})
        if atom.method == "model_stock":
            return _stock(atom, weight, names)
        if atom.method == "ties":
            return _ties(atom, weight)
    weights = _weights(sum_)
    if weights is not None:
        return Export("task_arithmetic", {"normalize": False}, _present(weights, sum_))
    kind, rescale, models = _models(sum_.terms, sum_)
    if kind not in LINEAR:
        raise InvalidExpression(f"'{sum_}': mergekit trims by magnitude in ties alone")
    return Export(LINEAR[kind], {"normalize": False, **rescale}, models)


def _stock(call: Call, weight: float, names: list[str]) -> Export:
    if weight != 1 or len(names) < 2:
        raise InvalidExpression(
            f"'{Linear(((call, weight),))}': mergekit's model_stock takes two or more vectors as "
            "they are, and the result as it is"
        )
    return Export("model_stock", {}, {name: {} for name in names})


def _ties(call: Call, weight: float) -> Export:
    options = _options(call)
    density, variant = options["density"], options["variant"]
    terms = [term for operand in call.operands for term in operand.terms]
    kind, rescale, models = _models(terms, call)
    if len(models) > len(call.operands):
        raise InvalidExpression(f"'{call}': mergekit elects between vectors, not sums of them")
    if density != 1 and kind:
        raise InvalidExpression(f"'{call}': mergekit thins out once; give ties density=1")
    if density != 1:
        _check_scope(call)
        models = {name: {**values, "density": density} for name, values in models.items()}
    weights = {values["weight"] for values in models.values()}
    if variant == "mean":
        if len(weights) > 1:
            raise InvalidExpression(
                f"'{call}': mergekit divides by the weights that agree, not by their number; give "
                'equal weights, or variant="normalized"'
            )
        weight *= weights.pop()
        models = {name: {**values, "weight": 1.0} for name, values in models.items()}
    elif variant == "normalized" and min(weights) < 0:
        raise InvalidExpression(
            f"'{call}': mergekit divides by the sum of the weights with their signs; only "
            'variant="sum" can have negative ones'
        )
    shared = {"normalize": variant != "sum", "lambda": weight, **rescale}
    return Export(ELECTED[kind], shared, models)


def _models(
    terms: Iterable[tuple[Vector | Call, float]], whole: Linear | Call
) -> tuple[str, dict[str, bool], dict[str, dict[str, float]]]:
    """Return by which method vectors are thinned out, how they are rescaled, and each of them."""
    kinds: set[str] = set()
    rescale: set[str] = set()
    models: dict[str, dict[str, float]] = {}
    for atom, weight in terms:
        for name, values in _thinned(atom):
            if name in models:
                raise InvalidExpression(f"'{whole}': mergekit takes {name} once")
            models[name] = {"weight": weight, **values}
        if isinstance(atom, Call):
            kinds.add(atom.method)
            rescale.add(_options(atom).get("rescale", ""))
    if len(kinds) > 1 or len(rescale) > 1:
        raise InvalidExpression(
            f"'{whole}': mergekit thins all vectors out by one method with one rescale"
        )
    kind = kinds.pop() if kinds else ""
    random = kind in ("dare", "della")
    return kind, {"rescale": "l1" in rescale} if random else {}, models


def _thinned(atom: Vector | Call) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the vectors of a term, and how they are thinned out in the words of mergekit."""
    if isinstance(atom, Vector):
        yield atom.name, {}
        return
    if atom.method not in ELECTED:
        raise InvalidExpression(f"'{atom}': mergekit cannot do this, or not in one file")
    options = _options(atom)
    _check_scope(atom)
    if options.get("seed", 0) != 0:
        raise InvalidExpression(f"'{atom}': a file of mergekit has no seed; leave it out")
    if options.get("rescale") == "unbiased":
        raise InvalidExpression(
            f'\'{atom}\': mergekit keeps the sum of magnitudes; write rescale="l1" or "none"'
        )
    known = ("density", "gamma", "epsilon")
    values = {key: value for key, value in options.items() if key in known}
    if atom.method == "dare":
        values["density"] = rest(options["p"])
    names = _unweighted(atom)
    if not names:
        raise InvalidExpression(
            f"'{atom}': mergekit thins vectors out as they are; write sums and weights outside"
        )
    for name in names:
        yield name, values


def _check_scope(call: Call) -> None:
    options = _options(call)
    if options.get("scope", "tensor") != "tensor" and options["density"] != 1:
        raise InvalidExpression(
            f"'{call}': mergekit compares the elements of each tensor; write scope=\"tensor\""
        )


def _weights(sum_: Linear) -> dict[str, float] | None:
    """Return vector -> weight; None if there is more in it than sums and averages."""
    result: dict[str, float] = {}
    for atom, weight in sum_.terms:
        inner: list[dict[str, float] | None]
        share = weight
        if isinstance(atom, Vector):
            inner = [{atom.name: 1.0}]
        elif atom.method in ("average", "task_arithmetic"):
            inner = [_weights(operand) for operand in atom.operands]
            share = weight / len(inner) if atom.method == "average" else weight
        else:
            return None
        for part in inner:
            if part is None:
                return None
            for name, factor in part.items():
                result[name] = result.get(name, 0.0) + share * factor
    return result


def _present(weights: Mapping[str, float], sum_: Linear) -> dict[str, dict[str, float]]:
    """Return the weights that are not zero."""
    found = {name: {"weight": weight} for name, weight in weights.items() if weight}
    if not found:
        raise InvalidExpression(f"'{sum_}': everything cancels; nothing is left to merge")
    return found


def _unweighted(atom: Vector | Call) -> list[str]:
    """Return the names of the operands if all of them are vectors as they are."""
    names = []
    for operand in atom.operands if isinstance(atom, Call) else ():
        (inner, weight), *more = operand.terms
        if more or weight != 1 or not isinstance(inner, Vector):
            return []
        names.append(inner.name)
    return names


def _options(atom: Vector | Call) -> dict[str, Any]:
    return dict(atom.options) if isinstance(atom, Call) else {}


def _yaml(export: Export, vectors: Mapping[str, Path], base: Path | None) -> str:
    lines = [f"merge_method: {export.method}"]
    if base is not None:
        lines.append(f"base_model: {_reference(base)}")
    lines.append("models:")
    for name, parameters in export.models.items():
        lines.append(f"  - model: {_reference(vectors[name])}")
        lines += _parameters(parameters, "    ")
    lines += _parameters({k: v for k, v in export.shared.items() if (k, v) != ("lambda", 1)}, "")
    return "\n".join(lines) + "\n"


def _parameters(values: Parameters, indent: str) -> list[str]:
    written = [f"{indent}  {key}: {json.dumps(value)}" for key, value in values.items()]
    return [f"{indent}parameters:", *written] if written else []


def _reference(path: Path) -> str:
    """Return a path as YAML; in a plain one mergekit takes + for an adapter, @ for a revision."""
    text = str(path)
    if not PLAIN.fullmatch(text) or text.lower() in (*WORDS, "null"):
        text = json.dumps(text, ensure_ascii=False)
    return f"{{model: {{path: {text}}}}}" if set("+@") & set(text) else text
