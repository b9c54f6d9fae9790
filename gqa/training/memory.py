"""Memory of the host between steps."""

import ctypes
import sys

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Lets this process keep the memory that a step frees, for the next one (glibc on Linux; elsewhere nothing).

    XLA:CPU allocates its temporary buffers afresh in every step, and the kernel hands each page out zeroed: half a
    gigabyte of page faults took a fifth of the mini T5's step. Call it before JAX starts its threads.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)  # heaps of the other arenas cannot hold large blocks
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
