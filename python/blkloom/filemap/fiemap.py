"""Physical extents of a file, read with the FIEMAP ioctl.

Pure but for one ioctl. Source: Linux Documentation/filesystems/fiemap.rst, include/uapi/linux/fiemap.h.
"""

from __future__ import annotations

import errno
import fcntl
import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

_FS_IOC_FIEMAP: Final = 0xC020660B
_HEAD: Final = struct.Struct("=QQIIII")
_SYNC: Final = 1
_BATCH: Final = 4096
"""Extents for each ioctl call: 224 KiB."""

MOST: Final = 4 << 20
"""Most extents of a file that are read: a map of this many takes about 1 GiB."""
_END: Final = (1 << 63) - 1

_EXTENT: Final = np.dtype(
    [
        ("logical", "=u8"),
        ("physical", "=u8"),
        ("length", "=u8"),
        ("unused", "=u8", 2),
        ("flags", "=u4"),
        ("pad", "=u4", 3),
    ]
)

LAST: Final = 0x1
UNKNOWN: Final = 0x2
DELALLOC: Final = 0x4
ENCODED: Final = 0x8
ENCRYPTED: Final = 0x80
NOT_ALIGNED: Final = 0x100
INLINE: Final = 0x200
TAIL: Final = 0x400
UNWRITTEN: Final = 0x800
MERGED: Final = 0x1000
SHARED: Final = 0x2000


@dataclass(frozen=True, eq=False)
class Extents:
    """Extents of a file in order, in bytes. flags: FIEMAP_EXTENT_*."""

    logical: NDArray[np.uint64]
    physical: NDArray[np.uint64]
    length: NDArray[np.uint64]
    flags: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.logical)

    def same_as(self, other: Extents) -> bool:
        """Whether both have the same extents."""
        return (
            np.array_equal(self.logical, other.logical)
            and np.array_equal(self.physical, other.physical)
            and np.array_equal(self.length, other.length)
            and np.array_equal(self.flags, other.flags)
        )

    def within(self, start: int, end: int) -> Extents:
        """The extents of the file's bytes from `start` to `end`, cut at both ends."""
        ends = self.logical + self.length
        some = (self.logical < end) & (ends > start)
        first: NDArray[np.uint64] = np.maximum(self.logical[some], np.uint64(start))
        physical = self.physical[some] + (first - self.logical[some])
        return Extents(first, physical, np.minimum(ends[some], np.uint64(end)) - first, self.flags[some])

    def merged(self) -> Extents:
        """Physically contiguous neighbours as one; flags are those of the first."""
        if len(self) < 2:
            return self
        goes_on = (self.logical[1:] == self.logical[:-1] + self.length[:-1]) & (
            self.physical[1:] == self.physical[:-1] + self.length[:-1]
        )
        firsts = np.flatnonzero(np.concatenate(([True], ~goes_on)))
        return Extents(
            self.logical[firsts], self.physical[firsts], np.add.reduceat(self.length, firsts), self.flags[firsts]
        )


def extents_of(fd: int, start: int = 0, end: int = _END) -> Extents:
    """The extents of the file's bytes from `start` to `end`, after its dirty data has been written. Raises OSError
    (EOPNOTSUPP: the file system has no such map; EFBIG: more than MOST extents).
    """
    pieces: list[NDArray[np.void]] = []
    at, last, total = start, False, 0
    buffer = bytearray(_HEAD.size + _BATCH * _EXTENT.itemsize)
    while not last and at < end:
        _HEAD.pack_into(buffer, 0, at, end - at, _SYNC, 0, _BATCH, 0)
        fcntl.ioctl(fd, _FS_IOC_FIEMAP, buffer)
        count = _HEAD.unpack_from(buffer)[3]
        if count == 0:
            break
        if (total := total + count) > MOST:
            raise OSError(errno.EFBIG, f"Too many extents: more than {MOST}")
        found = np.frombuffer(bytes(buffer), _EXTENT, count, _HEAD.size)
        pieces.append(found)
        reached = int(found["logical"][-1]) + int(found["length"][-1])
        last = bool(found["flags"][-1] & LAST) or reached <= at
        at = reached
    whole = np.concatenate(pieces) if pieces else np.empty(0, _EXTENT)
    flags = whole["flags"] & ~np.uint32(LAST | MERGED)
    return Extents(whole["logical"].copy(), whole["physical"].copy(), whole["length"].copy(), flags).within(start, end)
