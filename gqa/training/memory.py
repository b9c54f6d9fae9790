"""Memory of the host between steps."""

import ctypes
import sys
from collections.abc import Mapping

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def share_heaps() -> None:
    """Lets the threads of this process share two heaps (glibc on Linux; elsewhere nothing).

    A heap keeps what its threads free: with one for each of a compiler's threads a third of the memory was that.
    """
    _mallopt({_M_ARENA_MAX: 2})


def keep_freed_memory() -> None:
    """Lets this process keep the memory that a step frees, for the next one (glibc on Linux; elsewhere nothing).

    XLA:CPU allocates its temporary buffers afresh in every step, and the kernel hands each page out zeroed: half a
    gigabyte of page faults took a fifth of the mini T5's step. Call it before JAX starts its threads.
    """
    _mallopt({_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1})  # other arenas hold no large blocks


def _mallopt(options: Mapping[int, int]) -> None:
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name, value in options.items():
            mallopt(name, value)
