"""The numeric fingerprint: everything besides code and data that decides the last bit."""

import os
import platform

import torch

from taskvec import lazy
from taskvec.allocation import keep_freed_memory


def make_deterministic() -> None:
    """Compute with one thread and deterministic kernels in this process.

    One thread because the number of threads changes the order of sums, and because two processes
    with two threads each are far slower on two cores than two with one.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    lazy.set_workers(1)
    keep_freed_memory()


def numeric_fingerprint() -> dict[str, str]:
    """Return what results are bit-for-bit equal for: torch, instruction set, threads, device."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "device": device,
    }
