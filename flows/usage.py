"""What a stage used: time on the processor, memory, and what its GPUs did meanwhile."""

import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SAMPLE_SECONDS = 2.0
MIB = 2**20

Usage = dict[str, float | str]


class Meter:
    """Measures this process from here to `read`; for a stage's own process.

    Names: ``device``, ``seconds`` (that have passed), ``peak_memory_mib`` (of the process),
    ``cpu_utilisation`` (processors busy, on average), and where CUDA was used
    ``gpu_peak_memory_mib`` (allocated by torch, the largest of the devices).
    """

    def __init__(self) -> None:
        self._wall, self._busy = time.monotonic(), time.process_time()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        if cuda := _cuda():
            for device in range(cuda.device_count()):
                cuda.reset_peak_memory_stats(device)

    def read(self) -> Usage:
        """Return what was used since the start."""
        wall = max(time.monotonic() - self._wall, 1e-9)
        found: Usage = {
            "device": "cpu",
            "seconds": wall,
            "cpu_utilisation": (time.process_time() - self._busy) / wall,
        }
        with suppress(OSError, ValueError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            peak = next(line for line in lines if line.startswith("VmHWM:"))
            found["peak_memory_mib"] = int(peak.split()[1]) / 1024
        if cuda := _cuda():
            devices = range(cuda.device_count())
            found["device"] = ", ".join(cuda.get_device_name(device) for device in devices)
            peaks = [cuda.max_memory_allocated(device) / MIB for device in devices]
            found["gpu_peak_memory_mib"] = max(peaks, default=0.0)
        return found


class GpuSampler:
    """Asks nvidia-smi now and then what devices do, while the block runs.

    `usage` has ``gpu_utilisation`` (percent, mean over time and devices) and ``gpu_memory_mib``
    (the largest seen in use on one of them, by anybody); nothing for no devices, or without
    nvidia-smi.
    """

    def __init__(self, devices: list[str]) -> None:
        self._devices = devices
        self._busy: list[float] = []
        self._memory = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Self:
        if self._devices:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()

    @property
    def usage(self) -> Usage:
        """What was seen so far."""
        if not self._busy:
            return {}
        mean = sum(self._busy) / len(self._busy)
        return {"gpu_utilisation": mean, "gpu_memory_mib": self._memory}

    def _work(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            with suppress(OSError, ValueError, subprocess.SubprocessError):
                self._sample()

    def _sample(self) -> None:
        query = [
            "nvidia-smi", f"--id={','.join(self._devices)}",
            "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits",
        ]  # fmt: skip
        told = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
        for line in told.stdout.splitlines():
            busy, memory = (float(word) for word in line.split(","))
            self._busy.append(busy)
            self._memory = max(self._memory, memory)


def split(usage: Mapping[str, float | str]) -> tuple[dict[str, float], dict[str, str]]:
    """Return what of a usage are figures and what is text, under names for the record of a run."""
    named = {f"system/{name}": value for name, value in usage.items()}
    figures = {name: value for name, value in named.items() if not isinstance(value, str)}
    return figures, {name: value for name, value in named.items() if isinstance(value, str)}


def _cuda() -> Any:
    """Return torch.cuda if this process uses it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch and torch.cuda.is_initialized() else None
