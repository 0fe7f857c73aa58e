"""Creates the memory of a target: a sealed memfd as a region of the engine.

Called by the loading thread. May fail: ResourceError.
"""

from __future__ import annotations

import errno
import fcntl
import os
from functools import partial
from typing import Final

from blkloom._engine import Region
from blkloom.errors import ResourceError
from blkloom.targets.descriptors import Descriptors
from blkloom.units import Bytes, format_size

_PAGE: Final = 4096
_HUGE_PAGE: Final = 2 << 20


def make_region(
    descriptors: Descriptors, size: Bytes, *, huge_pages: bool, preallocate: bool, if_lost: bytes | None = None
) -> Region:
    """`size` bytes of zeros, or the memory that a former process of the device had. if_lost: the first bytes if that
    memory is lost; None: the load fails then. Raises ResourceError.
    """
    page = _HUGE_PAGE if huge_pages else _PAGE
    rounded = -(-size // page) * page
    make = partial(_make_memory, rounded, huge_pages=huge_pages, preallocate=preallocate)
    try:
        fd = descriptors.memory(make, None if if_lost is None else lambda: _filled(make(), if_lost))
        try:
            return Region(fd, rounded, page_size=page)
        finally:
            os.close(fd)
    except ResourceError:
        raise
    except (OSError, MemoryError, OverflowError) as error:
        pages = f"reserve {rounded // page} huge pages (sysctl vm.nr_hugepages) or leave huge_pages out"
        raise ResourceError(
            f"{format_size(size)} of memory cannot be had: {getattr(error, 'strerror', None) or error}",
            cure=pages if huge_pages else "make the device smaller",
            errno=getattr(error, "errno", None) or errno.ENOMEM,
        ) from error


def _make_memory(size: int, *, huge_pages: bool, preallocate: bool) -> int:
    """A sealed memfd of `size` bytes. Raises ResourceError, OSError, OverflowError."""
    if preallocate and not huge_pages and size > (available := _available_memory()):
        # The kernel would take the memory from other processes, and then kill some of them.
        raise ResourceError(
            f"{format_size(Bytes(size))} of memory cannot be had: {format_size(Bytes(available))} are available",
            cure="make the device smaller, or leave preallocate out",
        )
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if huge_pages:
        flags |= os.MFD_HUGETLB | os.MFD_HUGE_2MB
    fd = os.memfd_create("blkloom-ram", flags)
    try:
        os.ftruncate(fd, size)
        if preallocate or huge_pages:
            os.posix_fallocate(fd, 0, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _filled(memory: int, data: bytes) -> int:
    """The memfd, with the data at its beginning. Raises OSError."""
    try:
        os.pwrite(memory, data, 0)
    except BaseException:
        os.close(memory)
        raise
    return memory


def _available_memory() -> int:
    """Bytes that can be taken without swapping: MemAvailable of proc_meminfo(5)."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            name, amount, *_ = line.split()
            if name == "MemAvailable:":
                return int(amount) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
