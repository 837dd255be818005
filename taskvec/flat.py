"""Edits in place: all edited parameters are views of one flat buffer.

Trying a coefficient is then ``flat = theta_0 + b_0 + sum_k c_k * basis_k``, one fused pass over
contiguous memory, instead of a new state dict and `load_state_dict`. The derivative of a loss by a
coefficient is one inner product: ``dL/dc_k = <dL/dflat, basis_k>``.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from taskvec import layered
from taskvec.errors import IncompatibleWeights
from taskvec.towers import PREFIX, Tower
from taskvec.vectors import check_alike


class FlatEditor:
    """Holds a tower whose edited parameters share one buffer, and applies edits to it."""

    def __init__(
        self, tower: Tower, basis: Mapping[str, Mapping[str, Tensor]], offset: Mapping[str, Tensor]
    ) -> None:
        """Take over the tower; its present weights are theta_0.

        Args:
            tower: loaded with theta_pre; its edited parameters become views of the buffer.
            basis: coefficient -> {parameter: tensor}.
            offset: the coefficient-free part, {parameter: tensor}; may be empty.

        Raises:
            IncompatibleWeights: a vector does not have exactly the edited parameters, in their
                shapes and dtypes.
        """
        names = tower.edited()
        found = dict(tower.module.named_parameters())
        self._parameters = [found[name.removeprefix(PREFIX)] for name in names]
        self._names = names
        self._base = self._flatten([parameter.data for parameter in self._parameters])
        if offset:
            self._base += self._gather(offset, "the coefficient-free part")
        self._basis = {
            name: self._gather(basis[name], f"the vector of {name}") for name in sorted(basis)
        }
        self._flat = self._base.clone()
        self._make_views()
        self._segments = self._find_segments()

    @property
    def layers(self) -> list[str]:
        """The layers that coefficients may differ by: see `taskvec.layered`."""
        return layered.layers(self._names)

    def apply(self, coefficients: Mapping[str, float]) -> None:
        """Set the tower to ``theta_0 + b_0 + sum_k c_k * basis_k``; no unit, any sign.

        Args:
            coefficients: ``NAME`` -> c, or ``NAME@LAYER`` -> c for every layer.

        Raises:
            IncompatibleWeights: not exactly the coefficients of the basis are given, or not exactly
                the layers of the model.
        """
        values = self._checked(coefficients)
        self._flat.copy_(self._base)
        for name, vector in self._basis.items():
            value = values[name]
            if isinstance(value, float | int):
                if value:
                    self._flat.add_(vector, alpha=value)
                continue
            for layer, start, stop in self._segments:
                self._flat[start:stop].add_(vector[start:stop], alpha=value[layer])

    def slope(
        self, loss: Callable[[], Tensor], coefficients: Iterable[str]
    ) -> tuple[float, dict[str, float]]:
        """Return a loss of the tower as it is, and its derivative by coefficients.

        Args:
            loss: computes a scalar from the tower.
            coefficients: ``NAME`` or ``NAME@LAYER``.

        Source: the chain rule for ``theta = theta_0 + sum_k c_k * basis_k``; an element of theta
        depends on ``NAME@LAYER`` only inside the layer.
        """
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        value = loss()
        found = torch.autograd.grad(value, self._parameters, materialize_grads=True)
        return float(value.detach()), self._products(self._flatten(list(found)), coefficients)

    def _products(self, gradient: Tensor, coefficients: Iterable[str]) -> dict[str, float]:
        found = {}
        for coefficient in coefficients:
            name, mark, wanted = coefficient.partition(layered.MARK)
            vector = self._basis[name]
            parts = [
                torch.dot(gradient[start:stop], vector[start:stop])
                for layer, start, stop in self._segments
                if layer == wanted or not mark
            ]
            found[coefficient] = float(torch.stack(parts).double().sum())
        return found

    def _checked(self, coefficients: Mapping[str, float]) -> dict[str, float | dict[str, float]]:
        values = layered.grouped(coefficients)
        if values.keys() != self._basis.keys():
            raise IncompatibleWeights(
                f"the basis has the coefficients {', '.join(self._basis)}, "
                f"the search {', '.join(sorted(values))}; run `taskvec run` to combine anew"
            )
        for name, value in values.items():
            if isinstance(value, dict) and value.keys() != set(self.layers):
                raise IncompatibleWeights(
                    f"the model has the layers {', '.join(self.layers)}, "
                    f"{name} has values for {', '.join(sorted(value))}; give one for each layer"
                )
        return values

    def _gather(self, tensors: Mapping[str, Tensor], what: str) -> Tensor:
        own = dict(zip(self._names, self._parameters, strict=True))
        check_alike(own, tensors, "the model", what)
        return self._flatten([tensors[name] for name in self._names])

    def _flatten(self, tensors: list[Tensor]) -> Tensor:
        """Return the elements in the memory order of the parameters, one after the other."""
        parts = []
        for tensor, parameter in zip(tensors, self._parameters, strict=True):
            placed = torch.empty_like(parameter.data, dtype=torch.float32)  # keeps the strides
            placed.copy_(tensor)
            parts.append(placed.as_strided((placed.numel(),), (1,)))
        return torch.cat(parts)

    def _make_views(self) -> None:
        start = 0
        for parameter in self._parameters:
            size, strides = parameter.numel(), parameter.stride()
            chunk = self._flat[start : start + size]
            parameter.data = chunk.as_strided(parameter.shape, strides, start)
            start += size

    def _find_segments(self) -> list[tuple[str, int, int]]:
        """Return the runs of one layer in the buffer: layer, first element, one after the last."""
        segments: list[tuple[str, int, int]] = []
        stop = 0
        for name, parameter in zip(self._names, self._parameters, strict=True):
            start, stop, layer = stop, stop + parameter.numel(), layered.layer(name)
            if segments and segments[-1][0] == layer:
                start = segments.pop()[1]
            segments.append((layer, start, stop))
        return segments
