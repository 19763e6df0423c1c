"""What the C library does with freed memory."""

import ctypes
import platform

# Parameters of mallopt, from glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next allocation; -> whether it does so now.

    glibc hands large blocks back to the system at once. On a CPU a training step frees and takes
    gigabytes, and the system clears each page anew: almost half of the time of a step of 4 patches
    of 96³ (benchmarks/distill_step.py with --give-back). The process then holds on to its peak of
    memory, which a training comes to in every step anyway. Call it before other threads allocate.
    Other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_ARENA_MAX: 1}  # -1: never give back
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
