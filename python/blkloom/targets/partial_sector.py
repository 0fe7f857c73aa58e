"""The last, partial sector of a file whose size is not a multiple of 512 bytes; handled as in QEMU.

The missing bytes read as zeros. The first write to the sector extends the file to the sector's end; from then on the
engine serves the sector without Python. If the file was truncated since, requests fail with EIO. The file is never open
for direct I/O. The mapper's thread; may raise OSError.
"""

from __future__ import annotations

import errno
import os

from blkloom import entries
from blkloom._engine import ClusterTable, Extent, File
from blkloom.errors import FaultError
from blkloom.targets.loaded import RETRY, Retry
from blkloom.units import SECTOR


class PartialSector:
    """The sector at byte `start` of `file`, in which the file ends."""

    def __init__(self, file: File, start: int) -> None:
        self._file = file
        self._start = start
        self._promised = file.size
        self._table = ClusterTable(SECTOR, SECTOR, [file], page=1)

    def extent(self) -> Extent:
        """The extent of the sector. Requests fault until the file contains the whole sector."""
        return Extent.table(self._table)

    def read(self, offset: int, length: int) -> bytes | Retry:
        """Reads `length` bytes at `offset` in the sector."""
        if self._there() == SECTOR:
            self._install()
            return RETRY
        return self._held().ljust(SECTOR, b"\0")[offset : offset + length]

    def write(self) -> Retry:
        """Extends the file before a write."""
        self._grow()
        return RETRY

    def write_zeroes(self, offset: int, length: int) -> None:
        """Zeroes exactly this range of the sector; other bytes of it may be written at the same time."""
        self._grow()
        self._zero(offset, length)

    def discard(self, offset: int, length: int) -> None:
        """Zeroes the part of this range that the file contains; the file keeps its size."""
        self._check_writable()
        self._zero(offset, min(length, self._there() - offset))

    def _zero(self, offset: int, length: int) -> None:
        if length > 0 and os.pwrite(self._file.fileno(), bytes(length), self._start + offset) != length:
            raise FaultError(errno.EIO, "the file system wrote a part only")

    def _there(self) -> int:
        """The number of bytes of the sector that the file contains now."""
        size = self._file.size
        if size < self._promised:
            raise OSError(errno.EIO, f"the file was cut off: it had {self._promised} bytes, and has {size}")
        return min(size - self._start, SECTOR)

    def _held(self) -> bytes:
        data = os.pread(self._file.fileno(), there := self._there(), self._start)
        if len(data) < there:
            raise OSError(errno.EIO, f"the file was cut off: {len(data)} bytes of {there} at byte {self._start}")
        return data

    def _grow(self) -> None:
        self._check_writable()
        if self._there() < SECTOR:
            os.ftruncate(self._file.fileno(), self._start + SECTOR)
        self._install()

    def _install(self) -> None:
        self._promised = self._start + SECTOR
        self._table.fill(0, 1, entries.data(self._start, read_only=not self._file.writable))

    def _check_writable(self) -> None:
        if not self._file.writable:
            raise FaultError(errno.EROFS, "the file is open for reading only")
