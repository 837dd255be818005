"""Merging checkpoints, file to file: `taskvec merge`, mergekit, the paper's class, a bare copy.

Every time is the wall time of a whole process, from the start of the interpreter to its end, with
the inputs in the page cache. The checkpoints are generated and deleted.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks import growth, methods
from benchmarks.contenders import (
    COEFFICIENT,
    DENSITY,
    MERGEKIT,
    Bench,
    Command,
    Measured,
    differing,
    expressed,
    find_mergekit,
    interleave,
    mergekit,
    plain,
    published,
    taskvec,
)
from benchmarks.generated import (
    CHANGE,
    WEIGHTS,
    Shapes,
    elements,
    generate,
    tower_shapes,
    write_config,
)
from benchmarks.measuring import (
    ROOT,
    Times,
    conditions,
    ratio,
    ratio_cell,
    table,
    verdict,
)
from benchmarks.processes import run

PICTURE = ROOT / "docs/merging_cost.svg"
OURS, FLAT = "`taskvec merge`", "taskvec, flat"
THEIRS, PAPER = f"mergekit {MERGEKIT}", "the paper's class"
BARE = {"read and write, 1 thread": 1, "read and write, 2 threads": 2}
SYNCED = "read and write, 2 threads, fsync"
OF_MERGEKIT, OF_BARE, OF_DIRECT = 1 / 20, 1.5, 1 / 4
MEGABYTES, ERROR = 300, 1e-4
ROUNDS = (7, 3)  # of task arithmetic, and of our own TIES
ROUNDING = 1e-7  # some units in the last place of a weight
SHARE = 1e-4  # of the elements may differ: equal magnitudes, opposite changes that cancel
RESULTS = 4  # files as large as a checkpoint that lie about at a time, beside what is merged
VENV_BYTES = 4e9


@dataclass(frozen=True)
class Size:
    """A model to merge checkpoints of, and the numbers of vectors to measure its growth with."""

    words: str
    shapes: Shapes
    numbers: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the base and all checkpoints, and the results beside them."""
        return 4 * elements(self.shapes) * (1 + max(self.numbers) + RESULTS)


def measure(*, quick: bool, scratch: Path | None, mergekit_venv: Path | None) -> str:
    """Return the section of docs/benchmarks.md; ``quick`` merges tiny files, without mergekit."""
    load, started = os.getloadavg()[0], time.monotonic()
    sizes = _tiny_sizes() if quick else _sizes()
    with _scratch(scratch, sizes, with_venv=not (quick or mergekit_venv)) as directory:
        program = None if quick else find_mergekit(mergekit_venv, directory)
        lines: list[growth.Line] = []
        texts: list[str] = []
        for size in sizes:
            files = generate(directory / "checkpoints", size.shapes, max(size.numbers))
            os.sync()
            bench = Bench(directory, files, 2 if quick else 8, program, quick, started)
            interleave({"": plain(files, 2)}, 1, bench.out)  # into the page cache
            if not texts:
                texts = [_arithmetic(bench), methods.section(bench, size.shapes), _spectral(bench)]
            lines += growth.measure(bench, size.words, size.numbers)
            files.remove()
    if not quick:
        growth.draw(lines, PICTURE)
    texts.append(growth.section(lines, PICTURE.name))
    return "\n\n".join(["## Merging checkpoints", conditions(load, ("torch", "numpy")), *texts])


def _sizes() -> list[Size]:
    return [
        Size("88 M", tower_shapes("ViT-B-32"), (2, 4, 8, 16)),
        Size("303 M", tower_shapes("ViT-L-14"), (2, 4, 8)),
    ]


def _tiny_sizes() -> list[Size]:
    shapes = {f"resblocks.{i}.mlp.weight": (64, 32) for i in range(2)} | {"ln.bias": (7,)}
    return [Size("tiny", {f"transformer.{name}": shape for name, shape in shapes.items()}, (2, 3))]


@contextmanager
def _scratch(parent: Path | None, sizes: Sequence[Size], *, with_venv: bool) -> Iterator[Path]:
    """Yield a directory that is deleted in any case; exit if the disk has too little room."""
    where = parent or Path(tempfile.gettempdir())
    largest = max(size.bytes for size in sizes)
    needed = 1.1 * largest + with_venv * VENV_BYTES
    free = shutil.disk_usage(where).free
    if free < needed:
        sys.exit(
            f"the benchmark needs {needed / 1e9:.1f} GB in {where}, {free / 1e9:.1f} GB are free; "
            "name another directory by --scratch"
        )
    if psutil.virtual_memory().available < largest:
        print(
            f"warning: {largest / 1e9:.1f} GB of files do not fit into the free memory; "
            "what is read from the disk is not comparable",
            file=sys.stderr,
        )
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with tempfile.TemporaryDirectory(dir=where, prefix="taskvec-merging-") as name:
            yield Path(name)
    finally:
        signal.signal(signal.SIGTERM, before)


def _starts(bench: Bench) -> str:
    """Return how long the programs take to start, after a run that warms them up."""
    bench.say("starts")
    commands: dict[str, Command] = {OURS: lambda out: [sys.executable, "-m", "flows.cli", "-h"]}
    if bench.program:
        program = bench.program
        commands[THEIRS] = lambda out: [program, "--help"]
    interleave(commands, 1, bench.out)
    found = interleave(commands, 1 if bench.quick else 3, bench.out)
    return ", ".join(f"{name} {value.times.median:.1f} s" for name, value in found.items())


def _arithmetic(bench: Bench) -> str:
    """Return the table of task arithmetic and TIES."""
    starts, files = _starts(bench), bench.merged
    rounds = (1, 1) if bench.quick else ROUNDS
    sums = _task_arithmetic(bench, rounds[0])
    bare = min((sums[name] for name in BARE), key=lambda value: value.times.median).times
    trimmed, agreement = _ties(bench, rounds[1])
    shutil.rmtree(bench.out)
    header = ["merge", "by", "seconds", "private MB", "times mergekit", "times bare", "target"]
    rows = _rows("task arithmetic", sums, bare) + _rows(f"TIES, density {DENSITY}", trimmed, bare)
    return "\n\n".join(
        [
            table(header, rows),
            f"{bench.number} fine-tuned checkpoints and their base, {files.parameters / 1e6:.1f} M "
            f"float32 parameters each ({files.base.stat().st_size / 1e6:.0f} MB): drawn weights "
            f"with a standard deviation of {WEIGHTS:g}, changes of {CHANGE:g}. Median (lowest to "
            f"highest) of {rounds[0]} rounds, in each of which every way runs once; TIES "
            f"{rounds[1]} rounds, by mergekit once. A time is that of a whole process, start of "
            f"the interpreter included (to show its help takes {starts}); the page cache is warm. "
            "*Private* is the largest sum of RssAnon over the processes, seen every 5 ms. *Bare* "
            "is the faster one of the first two lines: read every file once through a 1 MiB "
            "buffer and write as much as one; no arithmetic, nothing else.",
            f"{OURS} also waits for the disk (fsync) and digests what it writes; mergekit and the "
            "paper's class do neither. `taskvec merge` and mergekit read the same configuration. "
            f"*Flat* trims over the whole model, as the paper of TIES does, by an expression; "
            f"mergekit trims tensor by tensor. {agreement}{_bound(sums, bare)}",
        ]
    )


def _task_arithmetic(bench: Bench, rounds: int) -> dict[str, Measured]:
    """Return what every way costs; their results must agree."""
    bench.say("task arithmetic")
    files = bench.merged
    own = dict.fromkeys(files.finetuned, {"weight": COEFFICIENT})
    config = write_config(bench.directory / "ta.yml", "task_arithmetic", own, files.base)
    ways: dict[str, Command] = {name: plain(files, threads) for name, threads in BARE.items()}
    ways[SYNCED] = plain(files, 2, fsync=True)
    ways |= {OURS: taskvec(config), PAPER: published(COEFFICIENT, files)}
    if bench.program:
        ways[THEIRS] = mergekit(bench.program, config)
    found = interleave(ways, rounds, bench.out)
    for name in {PAPER, THEIRS} & found.keys():
        share = differing(found[OURS].path, found[name].path, ROUNDING)
        assert share == 0, f"{name} differs from {OURS} in {share:.1e} of the elements"
    return found


def _ties(bench: Bench, rounds: int) -> tuple[dict[str, Measured], str]:
    """Return what every way costs, and a sentence about how well the results agree."""
    bench.say("TIES")
    files = bench.merged
    own = dict.fromkeys(files.finetuned, {"weight": COEFFICIENT, "density": DENSITY})
    config = write_config(bench.directory / "ties.yml", "ties", own, files.base)
    names = ", ".join(f"m{number}" for number in range(bench.number))
    ways = {
        OURS: taskvec(config),
        FLAT: expressed(f"ties({names}, density={DENSITY})", files),
    }
    found = interleave(ways, rounds, bench.out)
    if bench.program is None:
        return found, ""
    bench.say("TIES by mergekit")
    found |= interleave({THEIRS: mergekit(bench.program, config)}, 1, bench.out / "mergekit")
    share = differing(found[OURS].path, found[THEIRS].path, ROUNDING)
    assert share < SHARE, f"{THEIRS} differs from {OURS} in {share:.1e} of the elements"
    return found, (
        f"All task arithmetic agrees to {ROUNDING:g} in every element, TIES trimmed tensor by "
        f"tensor in all but {share:.1g} of them, or nothing is reported. "
    )


def _bound(found: Mapping[str, Measured], bare: Times) -> str:
    """Return a sentence that says what no program could reach."""
    if THEIRS not in found:
        return ""
    twentieth = found[THEIRS].times.median / 20
    return (
        f"A twentieth of mergekit's time for task arithmetic is {twentieth:.2f} s; *bare* alone "
        f"takes {bare.median:.2f} s."
    )


def _rows(merge: str, found: Mapping[str, Measured], bare: Times) -> list[list[str]]:
    """Return the lines of a merge, with quotients and targets for our own."""
    theirs = found[THEIRS].times if THEIRS in found else None
    rows: list[list[str]] = []
    for name, value in found.items():
        ours = name in (OURS, FLAT)
        targets = []
        if ours and theirs:
            targets.append(f"mergekit {verdict(_quotient(value.times, theirs), OF_MERGEKIT)}")
        if ours and merge == "task arithmetic":
            targets.append(f"bare {verdict(_quotient(value.times, bare), OF_BARE)}")
        if ours:
            targets.append(f"MB {verdict(value.private / 1e6, MEGABYTES)}")
        rows.append(
            [
                "" if rows else merge,
                name,
                value.times.cell(),
                value.megabytes,
                _quotient_cell(value.times, theirs) if ours and theirs else "",
                _quotient_cell(value.times, bare),
                "; ".join(targets),
            ]
        )
    return rows


def _quotient(times: Times, base: Times) -> float:
    """Return the median quotient of the rounds, or that of the medians if they were not paired."""
    paired = len(times.seconds) == len(base.seconds)
    return ratio(times, base)[0] if paired else times.median / base.median


def _quotient_cell(times: Times, base: Times) -> str:
    paired = len(times.seconds) == len(base.seconds)
    return ratio_cell(times, base, digits=3) if paired else f"{_quotient(times, base):.3f}"


def _spectral(bench: Bench) -> str:
    """Return the table of TSV-M and Iso-C against direct decompositions."""
    bench.say("decompositions")
    command = [sys.executable, "-m", "benchmarks.spectral", *(["--quick"] if bench.quick else [])]
    rows = []
    for part in json.loads(run(command).output):
        ours, direct = (Times(tuple(part["seconds"][way])) for way in ("ours", "direct"))
        found, error = ratio(ours, direct)[0], part["errors"]["ours"]
        rows.append(
            [
                f"{part['method']}, {part['spectrum']}",
                direct.cell(),
                ours.cell(),
                ratio_cell(ours, direct),
                f"{error:.1e}",
                f"{part['errors']['direct']:.1e}",
                f"direct {verdict(found, OF_DIRECT)}; error {verdict(error, ERROR)}",
            ]
        )
    header = ["method, matrices", "direct, seconds", "taskvec, seconds", "times direct", "error",
              "error of direct", "target"]  # fmt: skip
    return "\n\n".join(
        [
            "### Singular vectors",
            table(header, rows),
            "The four matrices of one block of ViT-B/32, eight vectors, in memory, in one process "
            "with as many threads for both. *Direct* is the authors' formula with "
            "`torch.linalg.svd` in float32. The error is the largest relative one of a matrix "
            "(Frobenius norm), against the direct formula in float64, of the first two matrices.",
        ]
    )
