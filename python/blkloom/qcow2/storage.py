"""The bytes of one file: what every metadata access goes through, so that tests can record and replay it.

`Storage` is the contract, `FileStorage` a file or block device by its descriptor. Offsets and lengths are bytes.
One thread (the mapper's); `read` alone may be called from several. May fail: OSError of the file.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias

from blkloom.qcow2.types import HostOffset

if TYPE_CHECKING:
    from blkloom._engine import File

_UNABLE: Final = {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL, errno.ENOTTY}
"""What a file system says that cannot punch holes, or reserve space."""

NO_ROOM: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Role: TypeAlias = Literal["metadata", "data"]
"""What of a file goes through one storage."""

_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2
_ZERO_RANGE: Final = 16
_AT_ONCE: Final = 1 << 20
_SECTOR: Final = 512

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Storage(Protocol):
    """One file. Nothing is durable before `sync`; until then the order in which writes reach the disk is open."""

    @property
    def path(self) -> str:
        """Names it in errors."""

    def size(self) -> int:
        """Its length now."""

    def read(self, offset: HostOffset, length: int) -> bytes:
        """Exactly `length` bytes; past the end of the file, zeros."""

    def write(self, offset: HostOffset, data: bytes) -> None:
        """All of `data`; the file grows as needed. A crash leaves each sector of 512 bytes as before or as after it."""

    def sync(self) -> None:
        """What was written before is durable when this returns."""

    def zero(self, offset: HostOffset, length: int) -> None:
        """The range reads as zeros from now on; the file grows as needed. It may come to be a hole."""

    def punch(self, offset: HostOffset, length: int) -> bool:
        """The range becomes a hole and reads as zeros; the file keeps its length. Returns False where the file system
        has no holes; then nothing has changed.
        """

    def reserve(self, offset: HostOffset, length: int) -> None:
        """Takes space for a range of the file, so that writing to it needs none; its contents stay. Does nothing where
        the file system cannot do that. Raises OSError (ENOSPC, EDQUOT).
        """

    def lay_out(self, offset: HostOffset, length: int) -> None:
        """Takes space for a range that reads as zeros, and goes on to, where all of it is to be had: writes need not
        each look for some.
        """

    def truncate(self, size: int) -> None:
        """Makes the file `size` bytes long; what is new reads as zeros."""

    def data_runs(self, offset: HostOffset, length: int) -> Iterator[tuple[int, int]]:
        """(start, end) of the parts of a range that may hold more than zeros; all of it where that is not known."""


class FileStorage:
    """The file open as `fd`, which stays the caller's. `fd` must not be O_DIRECT. file: which has that descriptor, and
    must know when a sync of it fails; None where nothing else uses it.
    """

    def __init__(self, fd: int, path: str, file: File | None = None) -> None:
        self._fd = fd
        self._path = path
        self._file = file
        self._has_holes = True
        """Nobody has said otherwise."""
        self._pages: memoryview | None = None
        """What is written from: whole pages."""

    @property
    def path(self) -> str:
        """Names it in errors."""
        return self._path

    @property
    def fd(self) -> int:
        """The descriptor."""
        return self._fd

    def size(self) -> int:
        """The file's length, the block device's capacity."""
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

        The kernel copies what is written page by page, and where a page of the caller's is not in memory it stops
        there: what was copied is in the file, and may be on the disk, before the rest. So what is written lies in
        pages as it will in the file, and no sector lies in two of them.
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
            # Whatever kept the file system from it (no support, no extents to be had): writing is the plain way.
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
            self._can(_PUNCH_HOLE | _KEEP_SIZE, offset, length)  # what was to be had of it is for others

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
                if error.errno != errno.ENXIO:  # ENXIO: nothing but a hole up to the end
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
                done -= inside  # it stopped inside a sector: all of that is written again
            part = part[done:]
            offset += done

    def _can(self, mode: int, offset: HostOffset, length: int) -> bool:
        """Does it, unless the file system cannot do such things; returns which."""
        try:
            self._fallocate(mode, offset, length)
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
            if mode & _PUNCH_HOLE and error.errno != errno.EINVAL:  # that may be about the range
                self._has_holes = False
            return False
        return True

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        while _libc.fallocate(self._fd, mode, offset, length) != 0:
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number), self._path)
