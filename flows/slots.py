"""Slots: how many stages run at once on this machine, and on which devices."""

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from taskvec.errors import InvalidInput


class Slots:
    """How many stages run at once: one a GPU, and some on the CPU.

    A stage that wants GPUs takes that many devices where there are any; everything else, and
    everything on a machine without GPU, takes a CPU slot.
    """

    def __init__(self, cpus: int, gpus: list[str]) -> None:
        self._cpus = cpus
        self._devices = list(gpus)
        self.gpus = len(gpus)
        self._waiting = 0
        self._changed = threading.Condition()

    @property
    def total(self) -> int:
        """The largest number of stages that can run at once."""
        return self._cpus + self.gpus

    @contextmanager
    def take(self, gpus: int) -> Iterator[list[str]]:
        """Wait for a slot; yield the devices that belong to it, none for a CPU slot."""
        if gpus > self.gpus > 0:
            raise InvalidInput(f"a stage wants {gpus} GPUs, there are {self.gpus}; see meta.gpu")
        wanted = gpus if self.gpus else 0
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: self._free(wanted))
            self._waiting -= 1
            devices = self._grab(wanted)
        try:
            yield devices
        finally:
            self._give(devices)

    @contextmanager
    def spare(self, gpus: int) -> Iterator[list[str] | None]:
        """Yield the devices of a slot that nobody wants now, or None; never wait."""
        wanted = min(1, gpus) if self.gpus else 0
        with self._changed:
            devices = self._grab(wanted) if self._free(wanted) and not self._waiting else None
        try:
            yield devices
        finally:
            if devices is not None:
                self._give(devices)

    @property
    def wanted(self) -> bool:
        """Whether a stage waits for a slot."""
        return self._waiting > 0

    def _free(self, gpus: int) -> bool:
        return len(self._devices) >= gpus if gpus else self._cpus > 0

    def _grab(self, gpus: int) -> list[str]:
        devices, self._devices = self._devices[:gpus], self._devices[gpus:]
        self._cpus -= not gpus
        return devices

    def _give(self, devices: list[str]) -> None:
        with self._changed:
            self._devices += devices
            self._cpus += not devices
            self._changed.notify_all()


def find_slots(cpus: int | None = None) -> Slots:
    """Return this machine's slots: its visible GPUs, and `cpus` or one a core."""
    return Slots(cpus or len(os.sched_getaffinity(0)), _gpus())


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device for device in visible.split(",") if device not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return found.stdout.split() if found.returncode == 0 else []
