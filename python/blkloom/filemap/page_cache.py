"""The page cache of a file: drop its pages, and check that they are gone.

Dropping is only a request: a page stays while something refers to it, for example a pipe or socket of a reader
(splice(2), sendfile(2)), even after the reader has closed the file. Such a page is stale once the blocks of the file
are written directly. Source: posix_fadvise(2), cachestat(2), mincore(2).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from typing import Final

from blkloom._engine import File

_CACHESTAT: Final = 451
"""System call number, the same on every architecture; since Linux 6.5."""
_CHUNK: Final = 1 << 30
_TRIES: Final = 20
_PAUSE: Final = 0.01
"""Seconds. A page stays during read-ahead too, and there is no event for the end of read-ahead."""

_libc: Final = ctypes.CDLL(None, use_errno=True)


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Counts(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently"))


def drop(file: File) -> None:
    """Writes back and drops the file's pages; pages in use stay. Raises OSError."""
    if not file.sync_error:  # on an error the kernel marks the pages clean: drop them, too
        file.sync()
    forget(file)


def forget(file: File) -> None:
    """Drops the clean pages."""
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def empty(file: File) -> bool:
    """Drops the file's pages and returns whether none is left. Raises OSError."""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE)
        drop(file)
        if not cached(file.fileno()):
            return True
    return False


def cached(fd: int) -> int:
    """Counts the pages of the file in the page cache. Raises OSError."""
    counts = _Counts()
    if not _libc.syscall(_CACHESTAT, fd, ctypes.byref(_Range(0, 0)), ctypes.byref(counts), 0):
        return int(counts.cached)
    if (number := ctypes.get_errno()) != errno.ENOSYS:
        raise OSError(number, f"cachestat: {os.strerror(number)}")
    return _resident(fd)


def _resident(fd: int) -> int:
    """As `cached`, for kernels without cachestat(2)."""
    size, found = os.fstat(fd).st_size, 0
    for at in range(0, size, _CHUNK):
        length = min(_CHUNK, size - at)
        pages = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
        with mmap.mmap(fd, length, access=mmap.ACCESS_COPY, offset=at) as mapped:
            start = ctypes.c_char.from_buffer(mapped)
            try:
                failed = _libc.mincore(ctypes.byref(start), ctypes.c_size_t(length), pages)
            finally:
                del start  # or the mapping could not be closed
            if failed:
                number = ctypes.get_errno()
                raise OSError(number, f"mincore: {os.strerror(number)}")
        found += sum(page & 1 for page in pages.raw)
    return found
