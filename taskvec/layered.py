"""Coefficients that differ by layer: ``NAME@LAYER`` beside ``NAME`` for the whole vector.

A layer is a block of the network as `taskvec.layers` finds it, "0", "1" and so on; what is in no
block is one more layer, "rest".
"""

from collections.abc import Iterable, Mapping

from taskvec.layers import layer_of
from taskvec.lazy import Lazy, scaled

MARK = "@"
REST = "rest"


def layer(parameter: str) -> str:
    """Return the layer that a parameter belongs to."""
    number = layer_of(parameter)
    return REST if number is None else str(number)


def layers(parameters: Iterable[str]) -> list[str]:
    """Return the layers of parameters in the order of the network, what is in no block last."""
    found = {layer(name) for name in parameters}
    return sorted(found, key=lambda name: (name == REST, int(name) if name != REST else 0))


def spread(coefficients: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Return the same edit with a coefficient for each of the layers ``names``."""
    layers_ = list(names)
    return {f"{name}{MARK}{x}": value for name, value in coefficients.items() for x in layers_}


def base(coefficient: str) -> str:
    """Return NAME for ``NAME`` and ``NAME@LAYER``."""
    return coefficient.partition(MARK)[0]


def grouped(coefficients: Mapping[str, float]) -> dict[str, float | dict[str, float]]:
    """Return name -> value, or {layer: value} where the layers have values of their own."""
    found: dict[str, float | dict[str, float]] = {}
    for coefficient, value in sorted(coefficients.items()):
        name, mark, part = coefficient.partition(MARK)
        if not mark:
            found[name] = value
            continue
        own = found.setdefault(name, {})
        assert isinstance(own, dict), f"{name} has a value beside those of its layers"
        own[part] = value
    return found


def scaled_by_layer(vector: Lazy, values: Mapping[str, float]) -> Lazy:
    """Return a vector with every tensor multiplied by the value of its layer."""
    return scaled(vector, {name: values[layer(name)] for name in vector.shapes})
