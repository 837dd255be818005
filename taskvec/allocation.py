"""What the C library does with memory that is freed."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def keep_freed_memory() -> None:
    """Let this process keep freed memory for its next use: a third less processor time.

    glibc otherwise hands every large array back to the system and asks for it again, and the
    system clears it each time. For programs that do one job; nothing happens without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # bytes; the largest that glibc admits
        mallopt(M_TRIM_THRESHOLD, 512 << 20)
