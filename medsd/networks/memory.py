"""Memory that a network on the CPU frees and asks for again, batch after batch."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Of glibc's malloc.h. Its own rule ends with blocks from 32 MiB on given back, and 64 MiB left untrimmed.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_NEVER, _USUAL_PAD, _USUAL_MMAPS, _HIGHEST = -1, 1 << 17, 65536, 1 << 25


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside the block, or a function so decorated, the process keeps what it frees, for its next tensors.

    Of glibc alone; with another C library nothing is done. As it comes, glibc returns blocks above 32 MiB at once, and
    the system clears every page of the next ones: up to half of a step where activations are as large
    (`scripts/bench_finetune.py --memory`). What it costs is memory, up to a quarter more at the peak, since blocks of
    several sizes leave gaps; so maps of slides, whose memory is promised, do without. At the end all goes back.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "gnu_get_libc_version"):
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    # With room to spare, or what little comes between two blocks of one size leaves the second no place.
    libc.mallopt(_TOP_PAD, 2 * _HIGHEST)
    try:
        yield
    finally:
        # Its own rule is off for good once a limit was set by hand.
        libc.mallopt(_MMAP_MAX, _USUAL_MMAPS)
        libc.mallopt(_TOP_PAD, _USUAL_PAD)
        libc.mallopt(_MMAP_THRESHOLD, _HIGHEST)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _HIGHEST)
        libc.malloc_trim(0)
