"""The benchmarks still run: searches and merging on little of drawn weights, the page around."""

import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from benchmarks import cluster, merging, strategies
from benchmarks.__main__ import page, read
from benchmarks.measuring import Times, ratio
from benchmarks.processes import run
from benchmarks.strategies import Found, Run, section
from taskvec import params
from taskvec.search import Candidate

ROOT = Path(__file__).parents[1]


@pytest.mark.nightly
def test_the_search_benchmark_runs_and_its_three_ways_agree() -> None:
    # a process of its own: it sets the number of threads of torch
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "search", "--quick"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("## One more coefficient in a search")
    assert all(way in done.stdout for way in ("bare forward pass", "one more coefficient", "naive"))


@pytest.mark.nightly
def test_every_strategy_runs_beside_the_grid_at_its_price() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "benchmarks", "strategies", "--quick"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("## Strategies of the search")
    _, lines, single = (rows(done.stdout, number) for number in range(3))
    assert set(lines) == set(strategies.WAYS)
    # one edit with one coefficient, which golden takes, and one with two
    searches = {name: 1 if "golden" in name else 2 for name in lines}
    assert {name: int(cells[0]) for name, cells in lines.items()} == searches
    assert lines["grid"][1:7] == ["0.00", "0.00", "100 %", "100.0 %", "100.0 %", "0"]
    for name in ("guided", "tpe, a quarter", "cma_es, a quarter", "gradient, a quarter"):
        assert 0 < float(lines[name][5].removesuffix(" %")) <= 25, name
    assert list(single) == ["default"]


def rows(text: str, table: int) -> dict[str, list[str]]:
    """Return a table of a section by its first column."""
    block = [block for block in text.split("\n\n") if block.startswith("| ")][table]
    lines = [line.strip("| ").split(" | ") for line in block.splitlines()[2:]]
    return {cells[0]: cells[1:] for cells in lines}


def found(study: str, edit: str, way: str, *figures: float, seed: int = 0) -> Found:
    distance, price, broken = figures
    return Found(Run(Path(), study, edit, seed), way, distance, price, breaks=bool(broken))


FOUND = [
    *[found("methods", name, "grid", 0, 1, 0) for name in ("by_ties_mean", "by_other")],
    found("methods", "by_ties_mean", "guided", 0.5, 0.24, 0),
    found("methods", "by_other", "guided", -0.3, 0.2, 0),
    found("addition", "all_tasks", "grid", 0, 1, 0),
    found("addition", "all_tasks", "guided", 0.2, 0.25, 1),
    found("methods", "by_ties_mean", "tpe, a quarter", 3.0, 0.2, 0),
]


def test_distances_and_prices_are_means_over_searches_beside_the_worst() -> None:
    text = section(FOUND, 0.0)
    together, part, single = (rows(text, number) for number in range(3))
    assert together["guided"] == [
        "3", "0.13", "0.50", "67 %", "23.0 %", "25.0 %", "1",
        "points at most 0.2: met; price at most 0.25: met",
    ]  # fmt: skip
    assert "tpe, a quarter" not in together
    assert part["guided"][:3] == ["2", "0.35", "0.50"]
    assert part["guided"][-1].startswith("points at most 0.2: **missed**")
    assert part["tpe, a quarter"][:2] == ["1", "3.00"]
    assert single["methods"][:2] == ["2", "0.10 (0.50), 22 %"]
    assert single["addition"][:2] == ["1", "0.20 (0.20), 25 %"]
    assert part["halving"][0] == "0"
    assert "tpe, a quarter" in text.split("### By experiment")[1]


def test_the_strategies_say_what_was_measured_and_what_was_not() -> None:
    text = section([*FOUND, found("addition", "all_tasks", "grid", 0, 1, 0, seed=2)], 0.0)
    assert "methods (edits: 2, seeds: 0), addition (edits: 1, seeds: 0, 2)." in text
    (absent,) = re.findall(r"they have not been run: (.*)\.", text)
    assert set(absent.split(", ")) == {"default", *strategies.STUDIES} - {"methods", "addition"}
    assert "on a part: methods (by_ties_mean); addition (all_tasks);" in text


def test_edits_of_which_strategies_are_measured_exist() -> None:
    for study, edits in strategies.SUBSET.items():
        place = ROOT if study == strategies.DEFAULT else ROOT / "experiments" / study
        assert set(edits) <= set(params.load(place / "params.yaml").edits), study


def test_a_search_that_the_stage_did_otherwise_is_refused() -> None:
    run_ = Run(Path(), "methods", "by_ties_mean", 0)
    best = Candidate({"c": 0.3}, {"ties.density": 0.2}, {})
    same = {"coefficient.c": 0.3, "option.ties.density": 0.2, "objective": 1.0}
    strategies._check(run_, best, same)
    for other in ({**same, "coefficient.c": 0.35}, {**same, "option.ties.density": 0.3}):
        with pytest.raises(AssertionError, match="methods by_ties_mean 0: the grid chooses"):
            strategies._check(run_, best, other)


@pytest.mark.nightly
def test_the_merging_benchmark_runs_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "merging", "--quick", "--scratch", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("## Merging checkpoints")
    for way in ("read and write", "`taskvec merge`", "the paper's class", "tsv_m", "TIES, flat"):
        assert way in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_benchmark_that_has_no_room_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 999, 1))
    with pytest.raises(SystemExit, match="needs .* GB in .* are free"):
        merging.measure(quick=True, scratch=tmp_path, mergekit_venv=None)
    assert list(tmp_path.iterdir()) == []


def test_private_memory_is_that_of_all_processes_and_no_mapped_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(64 << 20))
    code = f"""
import mmap, os, time
child = os.fork()
file = open({str(tmp_path / "file")!r}, "rb")
mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(mapped[::4096])
own = bytearray(b"1") * (64 << 20)
os.waitpid(child, 0) if child else time.sleep(0.3)
"""
    cost = run([sys.executable, "-c", code])
    assert 2 * 64 << 20 < cost.private < (2 * 64 << 20) + (40 << 20)
    assert cost.seconds > 0.3


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="ended with 3: what went wrong"):
        run([sys.executable, "-c", "import sys; sys.stderr.write('what went wrong'); sys.exit(3)"])


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


def test_a_simulated_graph_takes_its_work_on_one_slot_and_its_longest_path_on_many() -> None:
    graph = cluster.stages(tasks=3, edits=5)
    work = sum(seconds for seconds, _ in graph.values())
    assert cluster.makespan(graph, 1, 0.0, 0.0) == pytest.approx(work)
    longest: dict[str, float] = {}
    for name, (seconds, before) in graph.items():
        longest[name] = seconds + max((longest[other] for other in before), default=0.0)
    assert cluster.makespan(graph, 1000, 0.0, 0.0) == pytest.approx(max(longest.values()))
    assert cluster.makespan(graph, 1, 2.0, 1.0) == pytest.approx(work + 3.0 * len(graph))
    assert cluster.makespan(graph, 4, 0.5, 0.0) >= 0.5 * len(graph)
