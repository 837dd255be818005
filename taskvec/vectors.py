"""Task vectors and their algebra (Ilharco et al., ICLR 2023, arXiv:2212.04089, section 2).

A `TaskVector` holds ``tau = theta_ft - theta_pre`` for the edited parameters and remembers its
origin: the fingerprint of ``theta_pre``. Vectors of different origins do not mix.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from taskvec.checkpoints import StateDict, check_finite, fingerprint, load, save, tied
from taskvec.errors import IncompatibleWeights

if TYPE_CHECKING:
    from taskvec.lazy import Lazy


@dataclass(frozen=True, eq=False)
class TaskVector:
    """The difference of two checkpoints, float32, name -> tensor in the shape of the parameter.

    Attributes:
        tensors: the differences; treat them as immutable.
        origin: fingerprint of the pre-trained weights that the vector starts from.
    """

    tensors: Mapping[str, Tensor]
    origin: str

    def __post_init__(self) -> None:
        ordered = {name: self.tensors[name] for name in sorted(self.tensors)}
        object.__setattr__(self, "tensors", MappingProxyType(ordered))

    @classmethod
    def between(
        cls,
        pretrained: StateDict,
        finetuned: StateDict,
        origin: str = "",
        names: list[str] | None = None,
    ) -> "TaskVector":
        """Return ``finetuned - pretrained`` over the parameters called ``names``.

        Everything else (frozen parameters, buffers) must be equal bit for bit: a difference there
        would be dropped in silence. A tensor that has two names is in the vector once.

        Args:
            pretrained: name -> tensor.
            finetuned: name -> tensor; the same names, shapes and dtypes.
            origin: fingerprint of ``pretrained``; computed if it is left out.
            names: the edited parameters; floating dtypes; default: all that are floating.

        Raises:
            IncompatibleWeights: names, shapes or dtypes differ, an edited tensor is not floating,
                a frozen one has changed, a tensor is tied in only one checkpoint, or a value is
                NaN or infinite.

        Source: arXiv:2212.04089, section 2.
        """
        check_alike(pretrained, finetuned, "the pre-trained checkpoint", "the fine-tuned one")
        if names is None:
            names = [name for name, value in pretrained.items() if value.is_floating_point()]
        unknown = set(names) - pretrained.keys()
        if unknown:
            raise IncompatibleWeights(
                f"{len(unknown)} edited parameters are not in the checkpoint (first: "
                f"{min(unknown)!r}); was it written by another model family?"
            )
        twins = _same_ties(pretrained, finetuned)
        edited = {twins.get(name, name) for name in names}
        _check_floating({name: pretrained[name] for name in edited}, "the checkpoint")
        moved = [
            name
            for name in sorted(pretrained.keys() - edited - twins.keys())
            if not torch.equal(pretrained[name], finetuned[name])
        ]
        if moved:
            raise IncompatibleWeights(
                f"{len(moved)} frozen tensors changed during fine-tuning (first: {moved[0]!r}); "
                "a task vector would lose them: freeze them, or edit them too"
            )
        tensors = {name: finetuned[name].float() - pretrained[name].float() for name in edited}
        for name, tensor in tensors.items():
            check_finite(name, tensor)
        return cls(tensors, origin or fingerprint(pretrained))

    @classmethod
    def load(cls, path: Path) -> "TaskVector":
        """Return the vector in a file that taskvec wrote; see `taskvec.checkpoints.load`."""
        loaded = load(path, "vector")
        return cls(loaded.tensors, str(loaded.metadata["origin"]))

    def save(self, path: Path, **metadata: Any) -> str:
        """Write the vector and return its fingerprint; see `taskvec.checkpoints.save`."""
        return save(path, self.tensors, "vector", origin=self.origin, **metadata)

    @classmethod
    def held(cls, tensors: Mapping[str, Any], origin: str) -> "TaskVector":
        """Return a vector of numpy arrays, without a copy."""
        return cls({name: torch.from_numpy(value) for name, value in tensors.items()}, origin)

    def lazy(self) -> "Lazy":
        """Return the vector as the merging methods take it, without a copy where it is float32."""
        from taskvec.lazy import Held  # numpy only, but not needed for the algebra

        return Held({n: value.detach().cpu().float().numpy() for n, value in self.tensors.items()})

    def apply(self, pretrained: StateDict, coefficient: float = 1.0) -> dict[str, Tensor]:
        """Return ``pretrained + coefficient * self``, each entry in its own dtype.

        Args:
            pretrained: name -> tensor, shapes as in this vector; left unchanged. Entries that the
                vector does not edit are passed through, and tied entries stay tied.
            coefficient: lambda, no unit; the paper searches [0, 1] in steps of 0.05; negative
                forgets.

        Raises:
            IncompatibleWeights: a parameter is missing, has another shape or is not floating.

        Source: arXiv:2212.04089, section 2.
        """
        edited = {name: pretrained[name] for name in self.tensors if name in pretrained}
        check_alike(self.tensors, edited, "the vector", "the pre-trained weights", dtypes=False)
        _check_floating(edited, "the pre-trained weights")
        twins = tied(pretrained)
        result = {
            name: (value.float() + coefficient * self.tensors[name]).to(value.dtype)
            if name in self.tensors
            else value
            for name, value in pretrained.items()
        }
        return result | {name: result[twin] for name, twin in twins.items()}

    def dot(self, other: "TaskVector") -> float:
        """Return the inner product over all parameters, accumulated in float64."""
        self._check(other)
        return float(
            sum(
                torch.dot(self.tensors[name].double().flatten(), value.double().flatten())
                for name, value in other.tensors.items()
            )
        )

    def norm(self) -> float:
        """Return the Euclidean norm over all parameters."""
        return self.dot(self) ** 0.5

    def cosine(self, other: "TaskVector") -> float:
        """Return the cosine similarity in [-1, 1]; 0 where a vector is zero (section 6)."""
        scale = self.norm() * other.norm()
        return max(-1.0, min(1.0, self.dot(other) / scale)) if scale else 0.0

    def __add__(self, other: object) -> "TaskVector":
        if not isinstance(other, TaskVector):
            return self if type(other) is int and other == 0 else NotImplemented
        self._check(other)
        sums = {name: value + other.tensors[name] for name, value in self.tensors.items()}
        return TaskVector(sums, self.origin)

    __radd__ = __add__

    def __neg__(self) -> "TaskVector":
        return TaskVector({name: -value for name, value in self.tensors.items()}, self.origin)

    def __sub__(self, other: object) -> "TaskVector":
        return self + -other if isinstance(other, TaskVector) else NotImplemented

    def __mul__(self, factor: object) -> "TaskVector":
        if not isinstance(factor, int | float) or isinstance(factor, bool):
            return NotImplemented
        scaled = {name: factor * value for name, value in self.tensors.items()}
        return TaskVector(scaled, self.origin)

    __rmul__ = __mul__

    def _check(self, other: "TaskVector") -> None:
        if self.origin != other.origin:
            raise IncompatibleWeights(
                f"the vectors start from different pre-trained weights ({self.origin[:12]} and "
                f"{other.origin[:12]}); fine-tune both from one checkpoint"
            )
        check_alike(self.tensors, other.tensors, "the left vector", "the right vector")


def _same_ties(pretrained: StateDict, finetuned: StateDict) -> dict[str, str]:
    before, after = tied(pretrained), tied(finetuned)
    if before != after:
        name = min(set(before.items()) ^ set(after.items()))[0]
        raise IncompatibleWeights(
            f"{name!r} is tied to another tensor in only one of the two checkpoints; store both in "
            "one way"
        )
    return before


def _check_floating(tensors: StateDict, where: str) -> None:
    wrong = sorted(name for name, value in tensors.items() if not value.is_floating_point())
    if wrong:
        raise IncompatibleWeights(
            f"{len(wrong)} edited tensors of {where} are not floating (first: {wrong[0]!r}, "
            f"{tensors[wrong[0]].dtype}); edit parameters only, not buffers that count"
        )


def check_alike(
    left: StateDict, right: StateDict, left_name: str, right_name: str, *, dtypes: bool = True
) -> None:
    """Raise IncompatibleWeights unless names, shapes and (unless told not to) dtypes agree."""
    for here, there, name, other in (
        (left, right, left_name, right_name),
        (right, left, right_name, left_name),
    ):
        only = sorted(here.keys() - there.keys())
        if only:
            raise IncompatibleWeights(
                f"{left_name} and {right_name} do not have the same parameters: {len(only)} only "
                f"in {name}, not in {other} (first: {only[0]!r}); "
                "fine-tune both from one checkpoint"
            )
    for name in sorted(left):
        a, b = left[name], right[name]
        if a.shape != b.shape:
            raise IncompatibleWeights(
                f"{name!r} has the shape {tuple(a.shape)} in {left_name} and {tuple(b.shape)} in "
                f"{right_name}; use checkpoints of one architecture"
            )
        if dtypes and a.dtype != b.dtype:
            raise IncompatibleWeights(
                f"{name!r} is {a.dtype} in {left_name} and {b.dtype} in {right_name}; "
                "store both in one dtype"
            )
