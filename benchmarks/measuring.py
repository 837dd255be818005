"""Interleaved timing, and what to say beside a figure: the spread, the load, the machine."""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import psutil

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "dvc", "prefect", "mlflow")


@dataclass(frozen=True)
class Times:
    """Wall times of one way of doing something, in seconds, in the order of measurement."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median in seconds."""
        return median(self.seconds)

    def cell(self, *, digits: int = 2) -> str:
        """Return ``median (lowest to highest)`` in seconds, for a table; a single time alone."""
        if len(self.seconds) == 1:
            return f"{self.median:.{digits}f}"
        low, high = min(self.seconds), max(self.seconds)
        return f"{self.median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def interleave(ways: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, Times]:
    """Time every way once a round, A B C A B C, so that a change of load meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, way in ways.items():
            seconds[name].append(timed(way))
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def timed(way: Callable[[], object]) -> float:
    """Return the wall time of one call in seconds."""
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def ratio(times: Times, base: Times) -> tuple[float, float, float]:
    """Return the median, lowest and highest of the quotients of the same round; no unit."""
    quotients = [a / b for a, b in zip(times.seconds, base.seconds, strict=True)]
    return median(quotients), min(quotients), max(quotients)


def ratio_cell(times: Times, base: Times, *, digits: int = 2) -> str:
    """Return ``median (lowest to highest)`` of the quotients, for a table; a single one alone."""
    if len(times.seconds) == 1:
        return f"{ratio(times, base)[0]:.{digits}f}"
    middle, low, high = ratio(times, base)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def verdict(found: float, target: float) -> str:
    """Return the target and whether a quotient keeps it."""
    return f"at most {target:g}: {'met' if found <= target else '**missed**'}"


def conditions(before: float, packages: Iterable[str] = PACKAGES) -> str:
    """Return when, where and from which code a section was measured.

    Args:
        before: the load average of one minute when its measurement began.
        packages: whose releases matter.
    """
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    cores = len(os.sched_getaffinity(0))
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"Measured {time.strftime('%Y-%m-%d')} at commit {_commit()} on {_processor()}, "
        f"{cores} cores, {memory:.0f} GiB; Python {platform.python_version()}, {versions}. "
        f"Load average (1 min) {before:.1f} before and {os.getloadavg()[0]:.1f} after."
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; all columns but the first are flushed right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    commit = _git("rev-parse", "--short=12", "HEAD") or "unknown"
    changed = _git("status", "--porcelain", "--", "flows", "tasks", "taskvec", "params.yaml")
    return f"{commit} with uncommitted changes" if changed else commit


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "--no-optional-locks", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() if done.returncode == 0 else ""
