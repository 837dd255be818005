"""`python -m benchmarks.published COEFFICIENT OUT BASE FILE...`: task arithmetic as published.

The class of the paper's repository (Ilharco et al., arXiv:2212.04089), restated: whole state dicts
in memory, one tensor after another. It reads the base for every vector, and once more to apply.
The only difference is the format: safetensors files in place of pickled modules.
"""

import sys
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class TaskVector:
    """``theta_ft - theta_pre``, held in memory."""

    def __init__(self, vector: dict[str, Tensor]) -> None:
        self.vector = vector

    @classmethod
    def between(cls, pretrained: str, finetuned: str) -> Self:
        """Return the vector of two checkpoints."""
        before, after = load_file(pretrained), load_file(finetuned)
        with torch.no_grad():
            return cls({name: after[name] - before[name] for name in before})

    def __add__(self, other: "TaskVector") -> "TaskVector":
        return TaskVector({name: self.vector[name] + other.vector[name] for name in self.vector})

    def __radd__(self, other: int) -> "TaskVector":
        return self  # what `sum` starts from

    def apply_to(self, pretrained: str, coefficient: float) -> dict[str, Tensor]:
        """Return the edited weights."""
        before = load_file(pretrained)
        return {name: before[name] + coefficient * self.vector[name] for name in before}


def main() -> None:
    """Merge files."""
    coefficient, out, base, *files = sys.argv[1:]
    vectors = [TaskVector.between(base, file) for file in files]
    total: TaskVector = sum(vectors)  # type: ignore[assignment]
    save_file(total.apply_to(base, float(coefficient)), out)


if __name__ == "__main__":
    main()
