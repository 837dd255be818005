"""One more coefficient in a search: the flat buffer, the bare forward pass and the naive way.

- ``search``: what the stage search does for a coefficient that nobody has asked about: edit the
  flat buffer, ask all chunks of every task, and write every answer to the memory, a file.
- ``bare``: only ``module(batch)`` over the same pictures, which are normalised, float32 and
  channels last beforehand, in the same batches. Nobody can be faster with this tower.
- ``naive``: what the paper's scripts do for a coefficient (`TaskVector.apply_to`, then
  `eval_single_dataset`): load the pre-trained checkpoint, make a new state dict key by key,
  `load_state_dict`, and read, decode and transform every picture file. In its favour: the sum of
  the vectors is made beforehand, the pictures are small PNG files of the final size, and there is
  neither a `DataLoader` to start nor a pickled module to load.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from benchmarks import drawn
from benchmarks.measuring import (
    ROOT,
    Times,
    conditions,
    interleave,
    ratio,
    ratio_cell,
    table,
    verdict,
)
from tasks import inputs
from tasks.artifacts import Artifacts
from tasks.combine import basis_prefix, offset_prefix
from tasks.search import posed
from taskvec import checkpoints
from taskvec import params as parameters
from taskvec.flat import FlatEditor
from taskvec.metrics import BATCH
from taskvec.numeric import make_deterministic
from taskvec.params import Params, SearchParams
from taskvec.search import Problem
from taskvec.sections import Model
from taskvec.towers import PREFIX, Tower

EDIT = "addition"
COEFFICIENT = 0.35
STEP = 1e-3  # to the next coefficient
BUDGET = 2**31 - 1  # image evaluations, more than are needed
PROCESSES, ROUNDS = 5, 4
TARGET = 1.1


@dataclass(frozen=True)
class Case:
    """What a search works on.

    Attributes:
        model: the architecture; every way gets a tower of its own.
        pretrained: the state of theta_pre.
        vector: the sum of the task vectors, by parameter.
        coefficient: the name of its coefficient.
        data: task -> head (classes, D), pictures (N, 3, S, S) uint8, labels (N,).
    """

    model: Model
    pretrained: Mapping[str, Tensor]
    vector: Mapping[str, Tensor]
    coefficient: str
    data: Mapping[str, tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Part:
    """What one process measured.

    Attributes:
        correct: task -> how many pictures are right at `COEFFICIENT`, by all ways.
        pictures: task -> how many there are.
        size: their side in pixels.
        times: of every way.
    """

    correct: Mapping[str, int]
    pictures: Mapping[str, int]
    size: int
    times: Mapping[str, Times]


def measure(*, quick: bool) -> str:
    """Return the section of docs/benchmarks.md; ``quick`` takes random weights and pictures."""
    load = os.getloadavg()[0]
    processes = 1 if quick else PROCESSES
    if quick:
        parts = [_measure_once(quick, rounds=2)]
    else:
        # Where the allocator happens to put things moves a whole process by some percent.
        with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            parts = [pool.apply(_measure_once, (quick, ROUNDS)) for _ in range(processes)]
    times = {
        way: Times(tuple(second for part in parts for second in part.times[way].seconds))
        for way in parts[0].times
    }
    counts, pictures, size = parts[0].correct, parts[0].pictures, parts[0].size
    sizes = ", ".join(f"{task} {number}" for task, number in pictures.items())
    accuracies = ", ".join(f"{t} {counts[t] / number:.4f}" for t, number in pictures.items())
    found = ratio(times["search"], times["bare"])[0]
    rows = [
        ["bare forward pass", times["bare"].cell(digits=3), "1", ""],
        [
            "search, one more coefficient",
            times["search"].cell(digits=3),
            ratio_cell(times["search"], times["bare"], digits=3),
            verdict(found, TARGET),
        ],
        [
            "of that, the edit of the weights",
            times["apply"].cell(digits=4),
            ratio_cell(times["apply"], times["bare"], digits=4),
            "",
        ],
        [
            "naive: new state dict, pictures decoded again",
            times["naive"].cell(digits=3),
            ratio_cell(times["naive"], times["bare"], digits=2),
            "",
        ],
    ]
    return "\n\n".join(
        [
            "## One more coefficient in a search",
            conditions(load),
            table(["way", "seconds", "times bare", "target"], rows),
            f"Median (lowest to highest) of {len(times['bare'].seconds)} rounds in {processes} "
            "processes with one thread each; in a round every way runs once. "
            f"{sum(pictures.values())} "
            f"validation pictures of {size} pixels ({sizes}) in batches of {BATCH}. *Bare* is "
            "only the module's forward pass over batches that are normalised and laid out "
            "beforehand. *Search* is one more coefficient of the stage search with an empty "
            "memory: it edits the flat buffer, asks all pictures for their answers (right or "
            "wrong, and the cross-entropy) and writes these to the memory. "
            "*Naive* restates the paper's scripts: load the checkpoint, add key by key, "
            "`load_state_dict`, decode every picture; the pictures are small PNG files, with "
            "photographs it would be slower still. It takes "
            f"{ratio_cell(times['naive'], times['search'])} times as long as *search*.",
            "The three ways must agree on every accuracy, or nothing is reported: at coefficient "
            f"{COEFFICIENT:g}, {accuracies}. A grid of 21 points is 21 times the second line, "
            "since nothing is loaded or decoded again.",
        ]
    )


def _measure_once(quick: bool, rounds: int) -> Part:
    """Measure all ways; in a fresh process."""
    make_deterministic()
    with tempfile.TemporaryDirectory() as directory:
        root = _experiment(quick, Path(directory))
        params, artifacts = parameters.load(root / "params.yaml"), Artifacts(root)
        edit, seed = params.edits[EDIT], params.seeds[0]
        settings = SearchParams(budget=BUDGET)
        with posed(
            artifacts, EDIT, seed, params.model, edit.coefficients, edit.objective,
            edit.constraint, edit.select, settings,
        ) as problem:  # fmt: skip
            return _timed(problem, _case(params, artifacts), rounds, Path(directory))


def _experiment(quick: bool, directory: Path) -> Path:
    """Return an experiment in a new directory, so that no answer is remembered."""
    root = directory / "experiment"
    root.mkdir()
    if quick:
        drawn.experiment(root)
    else:
        for name in ("params.yaml", "data"):
            (root / name).symlink_to(ROOT / name)
    return root


def _timed(problem: Problem, case: Case, rounds: int, directory: Path) -> Part:
    search, editor = _Search(problem, case), _Editor(case)
    bare, naive = _Bare(case, editor), _Naive(case, directory)
    counts = [search(), bare.counts(), naive()]  # also warms up
    assert counts[0] == counts[1] == counts[2], f"the ways disagree: {counts}"
    ways: dict[str, Callable[[], object]] = {
        "bare": bare, "search": search, "naive": naive, "apply": editor,
    }  # fmt: skip
    return Part(
        correct=counts[0],
        pictures={task: len(labels) for task, (_, _, labels) in case.data.items()},
        size=next(iter(case.data.values()))[1].shape[-1],
        times=interleave(ways, rounds),
    )


class _Search:
    """Another coefficient every time, from `COEFFICIENT` on, as the stage search evaluates it."""

    def __init__(self, problem: Problem, case: Case) -> None:
        self._problem, self._name = problem, case.coefficient
        self._numbers = count()

    def __call__(self) -> dict[str, int]:
        value = COEFFICIENT + STEP * next(self._numbers)
        found = self._problem.evaluate({self._name: value}, self._problem.choices[0])
        return {task: int(said.correct.sum()) for task, said in found.answers.items()}


class _Editor:
    """The edit of the weights alone."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self.tower = _tower(case)
        self._editor = FlatEditor(self.tower, {case.coefficient: case.vector}, {})

    def __call__(self) -> None:
        self._editor.apply({self._case.coefficient: COEFFICIENT})


class _Bare:
    """The forward pass alone, in a tower that has the edited weights in its own memory."""

    def __init__(self, case: Case, editor: _Editor) -> None:
        editor()
        self._case = case
        self._tower = _tower(case)
        self._tower.load(editor.tower.state())
        self._batches = {
            task: [self._tower.normalize(part) for part in images.split(BATCH)]
            for task, (_, images, _) in case.data.items()
        }

    @torch.inference_mode()
    def __call__(self) -> None:
        module = self._tower.module
        for batches in self._batches.values():
            for batch in batches:
                module(batch)

    @torch.inference_mode()
    def counts(self) -> dict[str, int]:
        """Return the number of correct pictures a task, to compare the ways."""
        counts = {}
        for task, (head, _, labels) in self._case.data.items():
            features = torch.cat([self._tower.module(batch) for batch in self._batches[task]])
            predicted = (functional.normalize(features, dim=-1) @ head.T).argmax(1)
            counts[task] = int((predicted == labels).sum())
        return counts


class _Naive:
    """One coefficient as in the published scripts, restated."""

    def __init__(self, case: Case, directory: Path) -> None:
        self._case = case
        self._tower = _tower(case)
        self._module = self._tower.module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self._checkpoint = directory / "pretrained.pt"
        torch.save(
            {k.removeprefix(PREFIX): v for k, v in case.pretrained.items()}, self._checkpoint
        )
        self._files = {
            task: [_write(image, directory / f"{task}-{i}.png") for i, image in enumerate(images)]
            for task, (_, images, _) in case.data.items()
        }

    def __call__(self) -> dict[str, int]:
        pretrained = torch.load(self._checkpoint, weights_only=True)
        with torch.no_grad():
            state = {}
            for key, value in pretrained.items():
                vector = self._case.vector.get(PREFIX + key)
                state[key] = value if vector is None else value + COEFFICIENT * vector
            self._module.load_state_dict(state, strict=False)
            return {task: self._correct(task) for task in self._case.data}

    def _correct(self, task: str) -> int:
        head, _, labels = self._case.data[task]
        correct = 0
        for start in range(0, len(labels), BATCH):
            paths = self._files[task][start : start + BATCH]
            batch = torch.stack([self._transformed(path) for path in paths])
            features = functional.normalize(self._module(batch), dim=-1)
            predicted = (features @ head.T).argmax(dim=1)
            correct += int((predicted == labels[start : start + BATCH]).sum())
        return correct

    def _transformed(self, path: Path) -> Tensor:
        """Return a picture as ``ToTensor`` and ``Normalize`` make it, (3, S, S)."""
        with Image.open(path) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
        mean = torch.tensor(self._tower.mean).view(3, 1, 1)
        std = torch.tensor(self._tower.std).view(3, 1, 1)
        return pixels.float().div(255).sub_(mean).div_(std)


def _write(image: Tensor, path: Path) -> Path:
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(path)
    return path


def _tower(case: Case) -> Tower:
    tower = inputs.architecture(case.model)
    tower.load(case.pretrained)
    return tower


def _case(params: Params, artifacts: Artifacts) -> Case:
    """Return the edit of all tasks from the artifacts, its pictures in the order of a search."""
    seed = params.seeds[0]
    basis = checkpoints.load(artifacts.basis(EDIT, seed), "basis")
    assert not any(name.startswith(offset_prefix(0)) for name in basis.tensors)
    (coefficient,) = basis.metadata["coefficients"]
    prefix = basis_prefix(0, coefficient)
    return Case(
        model=params.model,
        pretrained=checkpoints.load(artifacts.pretrained(), "checkpoint").tensors,
        vector={name.removeprefix(prefix): value for name, value in basis.tensors.items()},
        coefficient=coefficient,
        data={task: _data(artifacts, task) for task in sorted(params.edits[EDIT].objective.tasks)},
    )


def _data(artifacts: Artifacts, task: str) -> tuple[Tensor, Tensor, Tensor]:
    images, labels = inputs.images(artifacts, task, "validation")
    return inputs.head(artifacts, task), images, labels
