"""Keeps freed memory in the process, so that a step need not page it in again.

Each compiled step on a CPU allocates its large buffers again. By default glibc maps each buffer
from the kernel and unmaps it when it is freed. Every step then pays a page fault for every 4 KiB;
in memory-bound layers that costs as much as the arithmetic.
"""

import ctypes

__all__ = ["keep_freed_memory"]

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Make glibc reuse freed memory from now on, in this process only.

    The process then never returns memory to the system: it stays at its peak.

    Returns:
        Whether it took effect: the C library is glibc, or one with the same `mallopt`.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # Map no buffer separately, and never give back the top of the heap.
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
