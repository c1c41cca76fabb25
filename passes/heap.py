"""Give memory that was freed back to the system, which glibc keeps. Elsewhere nothing is done.

Tokens that are kept lie between temporary values that are not; the pages of these stay with the process, and as batches
differ in size they are seldom used again.
"""

from __future__ import annotations

import ctypes
import gc
import sys

_STEPS = 8
_M_MMAP_THRESHOLD = -3  # of mallopt, in malloc.h


def trim_heap() -> None:
    """Give back whole pages between the blocks that are in use; takes milliseconds."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def trim_at_times(step: int) -> None:
    """Trim at every eighth step: at each it would cost a third of the time of a batch, as fresh pages do."""
    if step % _STEPS == 0:
        trim_heap()


def give_freed_memory_back() -> None:
    """Trim the heap, and have glibc map every block from 64 KB on by itself, now and later, which slows them down.

    Else it keeps blocks of up to 32 MB for itself once one of that size was freed, and they pile up between new ones.
    """
    gc.collect()
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, 2**16)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") else None  # other libcs lack it
