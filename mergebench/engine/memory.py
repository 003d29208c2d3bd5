"""Keep the C allocator from giving memory back between chunks.

A chunk's temporaries are of the size (0.3 to 4 MB) that glibc maps afresh and unmaps at every use by
default: each time, the kernel must find and clear the pages, which costs ten times what the arithmetic
does. With the thresholds raised, freed blocks are used again, and methods can be written in plain
expressions.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt(3)'s parameters in glibc's malloc.h


def keep_freed_memory() -> None:
    """Serve blocks up to 32 MB from memory that was used before. Does nothing where glibc is not the libc."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 128 << 20)
