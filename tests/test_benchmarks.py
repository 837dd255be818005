"""The benchmarks still run: search and merging on little of drawn weights, the page around them."""

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from benchmarks import merging
from benchmarks.__main__ import page, read
from benchmarks.measuring import Times, ratio
from benchmarks.processes import run


def test_the_search_benchmark_runs_and_its_three_ways_agree() -> None:
    # a process of its own: it sets the number of threads of torch
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "search", "--quick"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("## One more coefficient in a search")
    assert all(way in done.stdout for way in ("bare forward pass", "one more coefficient", "naive"))


def test_the_merging_benchmark_runs_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "merging", "--quick", "--scratch", str(tmp_path)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300, check=False,
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
