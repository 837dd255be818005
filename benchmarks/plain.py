"""`python -m benchmarks.plain THREADS FSYNC OUT FILE...`: read files once, write as much as one.

Nothing that merges files can be faster than this. Each thread reads its part of every file into
one buffer and, while it reads the last file, writes that buffer to its part of ``OUT``. With 1 for
``FSYNC`` it also waits until the disk has it, else it gives 0.
"""

import os
import sys
from threading import Thread

BUFFER = 1 << 20


def main() -> None:
    """Read and write."""
    threads, fsync, out, *files = sys.argv[1:]
    descriptors = [os.open(file, os.O_RDONLY) for file in files]
    size = os.fstat(descriptors[-1]).st_size
    step = -(-size // int(threads))
    target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    workers = [
        Thread(target=copy, args=(descriptors, target, start, min(start + step, size)))
        for start in range(0, size, step)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if fsync == "1":
        os.fsync(target)


def copy(files: list[int], target: int, start: int, stop: int) -> None:
    """Read a range of bytes of every file, and write that of the last one."""
    buffer = memoryview(bytearray(BUFFER))
    for file in files:
        place = start
        while place < stop:
            number = os.preadv(file, [buffer[: stop - place]], place)
            if not number:
                break
            if file == files[-1]:
                os.pwrite(target, buffer[:number], place)
            place += number


if __name__ == "__main__":
    main()
