"""Access to the bytes of one file of an image. All metadata is read and written through it, so that tests can record
and replay accesses.

`Storage` is the interface, `FileStorage` a file or block device with its descriptor. Offsets and lengths are bytes. One
thread (the mapper's); only `read` may be called by several. May fail: OSError of the file.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias

from blkloom.image.types import HostOffset

if TYPE_CHECKING:
    from blkloom._engine import File

_UNABLE: Final = {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL, errno.ENOTTY}
"""Errnos of file systems that cannot punch holes or allocate space."""

NO_ROOM: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Role: TypeAlias = Literal["metadata", "data"]
"""The part of a file's contents that goes through one storage."""

_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2
_ZERO_RANGE: Final = 16
_AT_ONCE: Final = 1 << 20
_SECTOR: Final = 512

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Storage(Protocol):
    """One file. Writes become durable at `sync`; before that, they may reach the disk in any order."""

    @property
    def path(self) -> str:
        """Name of the file in errors."""

    def size(self) -> int:
        """Current size of the file."""

    def read(self, offset: HostOffset, length: int) -> bytes:
        """Reads exactly `length` bytes; zeros past the end of the file."""

    def write(self, offset: HostOffset, data: bytes) -> None:
        """Writes all of `data`; the file grows as needed. After a crash, each sector of 512 bytes has its contents from
        before or after the write.
        """

    def sync(self) -> None:
        """Makes all earlier writes durable."""

    def zero(self, offset: HostOffset, length: int) -> None:
        """Makes the range read as zeros; the file grows as needed. The range may become a hole."""

    def punch(self, offset: HostOffset, length: int) -> bool:
        """Makes the range a hole that reads as zeros; the size of the file does not change. Returns False if the file
        system has no holes; then nothing has changed.
        """

    def reserve(self, offset: HostOffset, length: int) -> None:
        """Allocates space for a range of the file, so that writes to it need none; its contents stay. Does nothing if
        the file system does not support it. Raises OSError (ENOSPC, EDQUOT).
        """

    def lay_out(self, offset: HostOffset, length: int) -> None:
        """Allocates space for a range that reads as zeros, if all of it is available, so that writes need not allocate.
        The range still reads as zeros.
        """

    def truncate(self, size: int) -> None:
        """Sets the size of the file to `size` bytes; new bytes read as zeros."""

    def data_runs(self, offset: HostOffset, length: int) -> Iterator[tuple[int, int]]:
        """(start, end) of the parts of a range that may contain data; the whole range if that is not known."""


class FileStorage:
    """The open file `fd`, which the caller closes. `fd` must not be O_DIRECT. file: the engine's file with that
    descriptor, which must be told about a failed sync; None if nothing else uses it.
    """

    def __init__(self, fd: int, path: str, file: File | None = None) -> None:
        self._fd = fd
        self._path = path
        self._file = file
        self._has_holes = True
        """Whether no call has failed because the file system has no holes."""
        self._pages: memoryview | None = None
        """Page-aligned buffer for writes."""

    @property
    def path(self) -> str:
        """Name of the file in errors."""
        return self._path

    def size(self) -> int:
        """Size of the file, or capacity of the block device."""
        return os.lseek(self._fd, 0, os.SEEK_END)

    def read(self, offset: HostOffset, length: int) -> bytes:
        """See `Storage.read`."""
        data = os.pread(self._fd, length, offset)
        if len(data) == length:
            return data
        parts = [data]
        have = len(data)
        while have < length and (data := os.pread(self._fd, length - have, offset + have)):
            parts.append(data)
            have += len(data)
        return b"".join(parts).ljust(length, b"\0")

    def write(self, offset: HostOffset, data: bytes) -> None:
        """See `Storage.write`.

        The kernel copies the data page by page, and stops at a page of the caller that is not in memory: the copied
        part is then in the file, and may reach the disk before the rest. So the data is copied to a buffer whose pages
        are aligned like those of the file, and no sector lies in two pages.
        """
        pages = self._pages
        if pages is None:
            pages = self._pages = memoryview(mmap.mmap(-1, _AT_ONCE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        rest = memoryview(data)
        while rest:
            start = offset % mmap.PAGESIZE
            end = min(start + len(rest), _AT_ONCE)
            pages[start:end] = rest[: end - start]
            self._write(offset, pages[start:end])
            offset = HostOffset(offset + end - start)
            rest = rest[end - start :]

    def sync(self) -> None:
        """See `Storage.sync`."""
        if self._file:
            self._file.sync()
        else:
            os.fdatasync(self._fd)

    def zero(self, offset: HostOffset, length: int) -> None:
        """See `Storage.zero`."""
        try:
            self._fallocate(_ZERO_RANGE, offset, length)
        except OSError:
            # The file system could not do it (no support, no extents): write zeros instead.
            for at in range(offset, offset + length, _AT_ONCE):
                self.write(HostOffset(at), bytes(min(_AT_ONCE, offset + length - at)))

    def punch(self, offset: HostOffset, length: int) -> bool:
        """See `Storage.punch`."""
        return self._has_holes and self._can(_PUNCH_HOLE | _KEEP_SIZE, offset, length)

    def reserve(self, offset: HostOffset, length: int) -> None:
        """See `Storage.reserve`."""
        self._can(_KEEP_SIZE, offset, length)

    def lay_out(self, offset: HostOffset, length: int) -> None:
        """See `Storage.lay_out`."""
        try:
            self._can(_KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            self._can(_PUNCH_HOLE | _KEEP_SIZE, offset, length)  # release the part that was allocated, for others

    def truncate(self, size: int) -> None:
        """See `Storage.truncate`."""
        os.ftruncate(self._fd, size)

    def data_runs(self, offset: HostOffset, length: int) -> Iterator[tuple[int, int]]:
        """See `Storage.data_runs`. Source: lseek(2), SEEK_DATA."""
        at, end = int(offset), offset + length
        while at < end:
            try:
                start = os.lseek(self._fd, at, os.SEEK_DATA)
                stop = os.lseek(self._fd, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno != errno.ENXIO:  # ENXIO: only a hole up to the end
                    yield at, end
                return
            if start >= end:
                return
            yield start, min(stop, end)
            at = stop

    def _write(self, offset: int, part: memoryview) -> None:
        while part:
            done = os.pwrite(self._fd, part, offset)
            if not done:
                raise OSError(errno.EIO, "nothing is written", self._path)
            inside = (offset + done) % _SECTOR
            if inside < done < len(part):
                done -= inside  # it stopped inside a sector: write the whole sector again
            part = part[done:]
            offset += done

    def _can(self, mode: int, offset: HostOffset, length: int) -> bool:
        """Runs the operation; returns False if the file system does not support it."""
        try:
            self._fallocate(mode, offset, length)
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
            if mode & _PUNCH_HOLE and error.errno != errno.EINVAL:  # such an error may concern the range
                self._has_holes = False
            return False
        return True

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        while _libc.fallocate(self._fd, mode, offset, length) != 0:
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number), self._path)
