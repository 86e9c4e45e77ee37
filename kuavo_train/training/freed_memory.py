"""What one training step frees, the next one takes: it is not given back to the system in between.

A step of a small model on the CPU allocates some hundred MiB in tensors of a few MiB. By its own rules glibc gives such
blocks back when they are freed, and each page that is asked for anew costs a page fault: thousands in every step.
"""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
KEPT = 1 << 30  # bytes at the end of the heap
LARGEST = 32 << 20  # bytes of a block that comes from the heap; glibc takes no more on 64 bits


def keep_freed_memory() -> None:
    """In this process from here on; does nothing where the allocator is not glibc's."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_MMAP_THRESHOLD, LARGEST)
    mallopt(_TRIM_THRESHOLD, KEPT)
