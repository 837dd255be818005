"""What merging costs as the vectors become more: times and memory, and lines through the times."""

import io
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.contenders import Bench, Measured, expressed, interleave
from benchmarks.measuring import table
from taskvec.atomic import write_text
from taskvec.pictures import COLOURS, STYLE

EXPRESSIONS = {
    "task arithmetic": lambda names: f"0.3 * ({' + '.join(names)})",
    "TIES, flat": lambda names: f"ties({', '.join(names)}, density=0.2)",
}
ROUNDS = {"task arithmetic": 5, "TIES, flat": 3}


@dataclass(frozen=True)
class Line:
    """One method at one size, with several numbers of vectors.

    Attributes:
        method: a key of `EXPRESSIONS`.
        size: the model, for the reader.
        found: number of vectors -> what the merge cost.
    """

    method: str
    size: str
    found: Mapping[int, Measured]

    @property
    def fit(self) -> tuple[float, float]:
        """The straight line through the medians: seconds at no vector, and for one more."""
        times = [measured.times.median for measured in self.found.values()]
        slope, start = np.polyfit(list(self.found), times, 1)
        return float(start), float(slope)

    @property
    def deviation(self) -> float:
        """How far a median is from the line at most, as a fraction of the line there."""
        start, slope = self.fit
        return max(
            abs(measured.times.median / (start + slope * number) - 1)
            for number, measured in self.found.items()
        )


def measure(bench: Bench, size: str, numbers: tuple[int, ...]) -> list[Line]:
    """Return a line for each method."""
    lines = []
    for method, words in EXPRESSIONS.items():
        bench.say(f"growth: {method}, {size}")
        commands = {}
        for number in numbers:
            expression = words([f"m{place}" for place in range(number)])
            commands[str(number)] = expressed(expression, bench.files.first(number))
        found = interleave(commands, 1 if bench.quick else ROUNDS[method], bench.out)
        shutil.rmtree(bench.out)
        lines.append(Line(method, size, {number: found[str(number)] for number in numbers}))
    return lines


def section(lines: list[Line], picture: str) -> str:
    """Return the words and the table."""
    rows = []
    for line in lines:
        start, slope = line.fit
        words = f"{start:.2f} {slope:+.3f} T, to {100 * line.deviation:.0f} %"
        for number, measured in line.found.items():
            first = number == min(line.found)
            rows.append(
                [
                    f"{line.method}, {line.size}" if first else "",
                    str(number),
                    measured.times.cell(),
                    measured.megabytes,
                    words if first else "",
                ]
            )
    return "\n\n".join(
        [
            "### Cost against the number of vectors",
            f"![Seconds and private memory against the number of vectors]({picture})",
            table(["merge", "vectors T", "seconds", "private MB", "seconds by the line"], rows),
            "The line is the least-squares fit of the medians; the percentage is the largest "
            "distance of a median from it. Both merges are expressions; TIES trims over the whole "
            f"model, to density 0.2. Medians of {' and '.join(map(str, ROUNDS.values()))} rounds.",
        ]
    )  # fmt: skip


def draw(lines: list[Line], path: Path) -> None:
    """Write the picture: seconds of each method, and private memory of all."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]
        figure = Figure(figsize=(9.6, 3.1), layout="constrained")
        *seconds, memory = figure.subplots(1, 1 + len(EXPRESSIONS))
        sizes = list(dict.fromkeys(line.size for line in lines))
        for axes, method in zip(seconds, EXPRESSIONS, strict=True):
            for line in lines:
                if line.method == method:
                    _times(axes, line, COLOURS[sizes.index(line.size)])
            _finish(axes, f"{method}: seconds", lines)
        for line in lines:
            x, y = list(line.found), [value.private / 1e6 for value in line.found.values()]
            colour = COLOURS[sizes.index(line.size)]
            marker = "os"[list(EXPRESSIONS).index(line.method)]
            memory.plot(x, y, marker, color=colour, label=f"{line.method}, {line.size}")
        _finish(memory, "private memory: MB", lines)
        buffer = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", metadata=nothing)
    write_text(path, buffer.getvalue())


def _times(axes: Axes, line: Line, colour: str) -> None:
    x = np.array(list(line.found))
    times = [measured.times for measured in line.found.values()]
    middle = np.array([value.median for value in times])
    low = middle - [min(value.seconds) for value in times]
    high = np.array([max(value.seconds) for value in times]) - middle
    start, slope = line.fit
    axes.errorbar(x, middle, (low, high), fmt="o", color=colour, label=line.size, capsize=2)
    ends = np.array([0, x.max()])
    axes.plot(ends, start + slope * ends, "--", color=colour, linewidth=1)


def _finish(axes: Axes, title: str, lines: list[Line]) -> None:
    axes.set_title(title)
    axes.set_xlabel("vectors")
    axes.set_xticks(sorted({number for line in lines for number in line.found}))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
