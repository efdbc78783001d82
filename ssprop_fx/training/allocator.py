"""Keeps freed memory in the process, so that a step does not page it in anew.

A compiled step on a CPU takes its large buffers afresh each time. By default glibc maps each of
them from the kernel and gives it back when it is freed, so every step pays a page fault for every
4 KiB; for memory-bound layers that costs as much as the arithmetic.
"""

import ctypes

__all__ = ["keep_freed_memory"]

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Make glibc reuse freed memory from now on, for this process alone.

    The process holds on to the most memory that it ever used.

    Returns:
        Whether it took effect: the C library is glibc, or one with the same `mallopt`.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # No buffer of its own mapping, and never give back the top of the heap.
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
