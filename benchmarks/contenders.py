"""Ways to merge checkpoints, each a command that writes one file, and what they cost."""

import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks.generated import Checkpoints
from benchmarks.measuring import Times
from benchmarks.processes import run
from taskvec.lazy import blocks
from taskvec.mapped import open_weights, weights_as_vector

MERGEKIT = "0.1.5"
MODEL = "model.safetensors"
COEFFICIENT = 0.3
DENSITY = 0.2

Arguments = Sequence[str | Path]
Command = Callable[[Path], Arguments]  # takes the directory to write `MODEL` into


@dataclass(frozen=True)
class Measured:
    """What runs of one command cost.

    Attributes:
        times: wall times, in the order of the runs.
        private: the largest private memory of all runs, in bytes; see `benchmarks.processes`.
        path: the file that the last run wrote.
    """

    times: Times
    private: int
    path: Path

    @property
    def megabytes(self) -> str:
        """The private memory in MB, for a table."""
        return f"{self.private / 1e6:.0f}"


def interleave(commands: Mapping[str, Command], rounds: int, out: Path) -> dict[str, Measured]:
    """Run every command once a round, A B C A B C; ``out`` gets a directory for each.

    What a run wrote before is deleted first, and after each run the disk gets what is left to
    write: neither is timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    private = dict.fromkeys(commands, 0)
    paths = {name: out / str(number) / MODEL for number, name in enumerate(commands)}
    for _ in range(rounds):
        for name, command in commands.items():
            shutil.rmtree(paths[name].parent, ignore_errors=True)
            paths[name].parent.mkdir(parents=True)
            cost = run(command(paths[name].parent))
            os.sync()
            seconds[name].append(cost.seconds)
            private[name] = max(private[name], cost.private)
    return {
        name: Measured(Times(tuple(seconds[name])), private[name], paths[name]) for name in commands
    }


def plain(files: Checkpoints, threads: int, *, fsync: bool = False) -> Command:
    """Return the program that only reads and writes."""
    module = [*_module("benchmarks.plain"), str(threads), str(int(fsync))]
    return lambda out: [*module, out / MODEL, *files.files]


def taskvec(config: Path) -> Command:
    """Return `taskvec merge`."""
    return lambda out: [*_module("flows.cli"), "merge", config, "--out", out / MODEL]


def expressed(expression: str, files: Checkpoints) -> Command:
    """Return a merge by an expression."""
    module = _module("benchmarks.expressed")
    return lambda out: [*module, expression, out / MODEL, *files.files]


def published(coefficient: float, files: Checkpoints) -> Command:
    """Return task arithmetic by the paper's class."""
    module = _module("benchmarks.published")
    return lambda out: [*module, str(coefficient), out / MODEL, *files.files]


def mergekit(program: Path, config: Path) -> Command:
    """Return mergekit's command for a file of one of its methods."""
    return lambda out: [program, config, out]


def find_mergekit(given: Path | None, directory: Path) -> Path:
    """Return mergekit's program in an environment of its own, which is made unless one is given.

    Raises:
        SystemExit: the environment has another release of mergekit, or another torch than ours.
    """
    root = given or directory / "mergekit"
    python, torch = root / "bin/python", version("torch").partition("+")[0]
    if given is None:
        venv.create(root, with_pip=True)
        install = [
            str(python),
            "-m",
            "pip",
            "install",
            "-q",
            f"torch=={torch}",
            f"mergekit=={MERGEKIT}",
        ]
        subprocess.run(install, check=True, stdout=sys.stderr)
    code = "from importlib.metadata import version as v; print(v('mergekit'), v('torch'))"
    found = run([python, "-c", code]).output.split()
    expected = [MERGEKIT, version("torch")]
    if found != expected:
        sys.exit(
            f"{root} has mergekit {found[0]} and torch {found[1]}; "
            f"expected {expected[0]} and {expected[1]}, so that only the programs differ"
        )
    return root / "bin/mergekit-pytorch"


def differing(one: Path, other: Path, tolerance: float) -> float:
    """Return the fraction of all elements of two files that differ by more than a tolerance."""
    vectors = [weights_as_vector(open_weights(path)) for path in (one, other)]
    assert vectors[0].shapes == vectors[1].shapes
    wrong = number = 0
    for name in vectors[0].shapes:
        for _, (a, b) in blocks(vectors, name, 0, vectors[0].size(name)):
            wrong += int((np.abs(a - b) > tolerance).sum())
            number += a.size
    return wrong / number


def _module(name: str) -> list[str]:
    return [sys.executable, "-m", name]


@dataclass(frozen=True)
class Bench:
    """Where and with what to measure.

    Attributes:
        directory: for everything that is written.
        files: the checkpoints, more than needed perhaps.
        number: how many vectors to merge.
        program: mergekit's, None to go without.
        quick: measure everything once, and not all of it.
        started: when the benchmark began, in seconds of `time.monotonic`.
    """

    directory: Path
    files: Checkpoints
    number: int
    program: Path | None
    quick: bool
    started: float

    @property
    def out(self) -> Path:
        """What a command writes goes here."""
        return self.directory / "out"

    @property
    def merged(self) -> Checkpoints:
        """The checkpoints to merge."""
        return self.files.first(self.number)

    def say(self, what: str) -> None:
        """Show what comes next."""
        print(f"{time.monotonic() - self.started:6.0f} s  {what}", file=sys.stderr, flush=True)
