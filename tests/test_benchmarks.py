"""The benchmarks still run: the search one in full on random weights, the page around it."""

import subprocess
import sys
from pathlib import Path

from benchmarks.__main__ import page, read
from benchmarks.measuring import Times, ratio


def test_the_search_benchmark_runs_and_its_three_ways_agree() -> None:
    # a process of its own: it sets the number of threads of torch
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "search", "--quick"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("## One more coefficient in a search")
    assert all(way in done.stdout for way in ("bare forward pass", "one more coefficient", "naive"))


def test_a_section_is_replaced_and_the_others_stay() -> None:
    sections = {"pipeline": "## P\n\nfirst", "search": "## S"}
    assert read(page(sections)) == sections
    assert read(page({**read(page(sections)), "pipeline": "## P\n\nsecond"})) == {
        "pipeline": "## P\n\nsecond",
        "search": "## S",
    }


def test_quotients_are_taken_within_a_round() -> None:
    slow, fast = Times((2.0, 8.0, 2.0)), Times((1.0, 4.0, 2.0))
    assert ratio(slow, fast) == (2.0, 1.0, 2.0)
