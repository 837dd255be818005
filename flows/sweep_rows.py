"""Rows of sweeps: edits that were evaluated and never written, and what they are made of."""

import csv
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flows.records import Execution
from taskvec.headers import canonical

COMMAND = "taskvec sweep row"  # outside the graph: no stage writes a row's weights
VECTORS, BASE = "data/vectors/", "data/checkpoints/pretrained.safetensors"


@dataclass(frozen=True)
class Row:
    """An edit of a sweep: the base plus the coefficient times the sum of some vectors.

    Attributes:
        sweep: name and seed, such as ``pairs-0``.
        table: path of the table that it is a row of, relative to the repository.
        subset: the names of the vectors, joined by ``+``.
        coefficient: no unit.
        objective: mean normalised accuracy on validation data.
        chosen: whether this is the subset's coefficient.
        inputs: path -> md5 of base and vectors.
    """

    sweep: str
    table: str
    subset: str
    coefficient: float
    objective: float
    chosen: bool
    inputs: Mapping[str, str]

    @property
    def name(self) -> str:
        """What `Lineage.find` knows it by."""
        return f"{self.sweep}:{self.subset}:{self.coefficient:g}"

    @cached_property
    def execution(self) -> Execution:
        """How its weights come about."""
        recipe = {"subset": self.subset, "coefficient": self.coefficient}
        content = canonical({**recipe, "inputs": dict(self.inputs)})
        mark = hashlib.sha256(content.encode()).hexdigest()
        return Execution(COMMAND, dict(self.inputs), {self.name: mark}, {"": recipe})


def table(sweep: Execution) -> str:
    """Return the md5 of the table that a sweep wrote."""
    return next(md5 for path, md5 in sweep.outputs.items() if not path.endswith(".chosen.csv"))


def rows(sweep: Execution, name: str, path: Path) -> Iterator[Row]:
    """Yield the rows of a sweep; those of a screening only where no other is of the same edit.

    Args:
        sweep: its execution.
        name: of its table, relative to the repository.
        path: of a file that holds it.
    """
    seed = sweep.item.rpartition("-")[2]
    vectors = {
        name.removeprefix(VECTORS).removesuffix(f"-{seed}.safetensors"): name
        for name in sweep.inputs
        if name.startswith(VECTORS)
    }
    found: dict[tuple[str, str], dict[str, str]] = {}
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            place = line["subset"], line["coefficient"]
            if place not in found or line["screen"] == "False":
                found[place] = line
    for (subset, coefficient), line in found.items():
        files = [BASE, *(vectors[task] for task in subset.split("+"))]
        yield Row(
            sweep.item, name, subset, float(coefficient), float(line["objective"]),
            line["chosen"] == "True", {name: sweep.inputs[name] for name in files},
        )  # fmt: skip
