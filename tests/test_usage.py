"""What a stage used: by its own account, and by nvidia-smi's."""

import time
from pathlib import Path

import pytest

from flows.usage import GpuSampler, Meter, split

# Prints what nvidia-smi prints; the second device is busier each time.
PROGRAM = """#!/bin/sh
echo "$1" >> "$LOG"
echo "10, 1000"
echo "$((20 * $(wc -l < "$LOG"))), 3000"
"""


def sampled(devices: list[str], samples: int, monkeypatch: pytest.MonkeyPatch) -> GpuSampler:
    monkeypatch.setattr("flows.usage.SAMPLE_SECONDS", 0.01)
    with GpuSampler(devices) as sampler:
        deadline = time.monotonic() + 20
        while len(sampler._busy) < 2 * samples and time.monotonic() < deadline:
            time.sleep(0.01)
    return sampler


def test_gpus_are_sampled_while_a_stage_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text(PROGRAM)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    usage = sampled(["2", "5"], 2, monkeypatch).usage
    assert usage["gpu_memory_mib"] == 3000
    assert float(usage["gpu_utilisation"]) >= (10 + 20 + 10 + 40) / 4
    assert (tmp_path / "log").read_text().splitlines()[0] == "--id=2,5"


@pytest.mark.parametrize("program", ["#!/bin/sh\nexit 9\n", "#!/bin/sh\necho N/A, N/A\n", ""])
def test_without_an_answer_nothing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    if program:
        (tmp_path / "nvidia-smi").write_text(program)
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("flows.usage.SAMPLE_SECONDS", 0.01)
    with GpuSampler(["0"]) as sampler:
        time.sleep(0.1)
    assert sampler.usage == {}


def test_nothing_is_asked_for_a_stage_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", lambda *a, **k: pytest.fail("asked"))
    assert sampled([], 0, monkeypatch).usage == {}


def test_the_peak_of_memory_begins_anew() -> None:
    full = bytearray(300 * 2**20)
    before = Meter().read()["peak_memory_mib"]
    del full
    after = Meter().read()["peak_memory_mib"]
    assert float(after) < float(before) - 200


def test_figures_and_texts_are_told_apart() -> None:
    assert split({"device": "cpu", "peak_memory_mib": 1.5}) == (
        {"system/peak_memory_mib": 1.5},
        {"system/device": "cpu"},
    )
