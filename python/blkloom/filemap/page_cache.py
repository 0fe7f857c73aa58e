"""A file's pages in memory: dropped, and whether that has worked.

Dropping is a request: a page stays while somebody holds it, be it a reader's pipe or socket (splice(2),
sendfile(2)) that outlives his descriptor. Such a page would be stale once the file is written below its file
system. Source: posix_fadvise(2), cachestat(2), mincore(2).
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
"""The same on every architecture; since Linux 6.5."""
_CHUNK: Final = 1 << 30
_TRIES: Final = 20
_PAUSE: Final = 0.01
"""Seconds. A page that is just being read ahead stays too, and nothing tells when it has been read."""

_libc: Final = ctypes.CDLL(None, use_errno=True)


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Counts(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently"))


def drop(file: File) -> None:
    """Has the file's pages written and forgotten, but for those that somebody holds. Raises OSError."""
    if not file.sync_error:  # otherwise what could not be written is clean, and has to go
        file.sync()
    forget(file)


def forget(file: File) -> None:
    """Drops the pages that need not be written."""
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def empty(file: File) -> bool:
    """Drops the file's pages; whether all of them have gone. Raises OSError."""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE)
        drop(file)
        if not cached(file.fileno()):
            return True
    return False


def cached(fd: int) -> int:
    """How many pages of the file are in memory. Raises OSError."""
    counts = _Counts()
    if not _libc.syscall(_CACHESTAT, fd, ctypes.byref(_Range(0, 0)), ctypes.byref(counts), 0):
        return int(counts.cached)
    if (number := ctypes.get_errno()) != errno.ENOSYS:
        raise OSError(number, f"cachestat: {os.strerror(number)}")
    return _resident(fd)


def _resident(fd: int) -> int:
    """As `cached`, where the kernel has no cachestat(2)."""
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
