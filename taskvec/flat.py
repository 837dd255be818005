"""Edits in place: all edited parameters are views of one flat buffer.

Trying a coefficient is then ``flat = theta_0 + b_0 + sum_k c_k * basis_k``, one fused pass over
contiguous memory, instead of a new state dict and `load_state_dict`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

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

    def apply(self, coefficients: Mapping[str, float]) -> None:
        """Set the tower to ``theta_0 + b_0 + sum_k c_k * basis_k``; no unit, any sign.

        Raises:
            IncompatibleWeights: not exactly the coefficients of the basis are given.
        """
        if coefficients.keys() != self._basis.keys():
            raise IncompatibleWeights(
                f"the basis has the coefficients {', '.join(self._basis)}, "
                f"the search {', '.join(sorted(coefficients))}; run `taskvec run` to combine anew"
            )
        self._flat.copy_(self._base)
        for name, vector in self._basis.items():
            self._flat.add_(vector, alpha=coefficients[name])

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
