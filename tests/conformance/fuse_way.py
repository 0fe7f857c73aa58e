"""Access path to a device as a FUSE file, with the system calls of programs and of the kernel."""

from __future__ import annotations

import ctypes
import errno
import os

from fuse_served import FuseServed

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16
_MOST = (1 << 63) - 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class FuseWay:
    """Through a file descriptor. moves: before each request another takes over what serves the file.

    A file has its own ways where a request ends beyond its end: reads and writes are short there and discards cut. What
    asks too much is refused here as by a device.
    """

    def __init__(self, served: FuseServed, *, read_only: bool, moves: bool) -> None:
        self._served = served
        self._moves = moves
        self._read_only = read_only
        self._fd = os.open(served.path, os.O_RDONLY if read_only else os.O_RDWR)
        self._size = os.fstat(self._fd).st_size

    def read(self, pieces: list[tuple[int, int]], *, df: bool) -> bytes:
        self._move()
        self._check(pieces, errno.EINVAL)
        return b"".join(self._read(offset, length) for offset, length in pieces)

    def _read(self, offset: int, length: int) -> bytes:
        found = b""
        while len(found) < length:
            more = os.pread(self._fd, length - len(found), offset + len(found))
            assert more, f"a read at {offset + len(found)} of {self._size} bytes is at the end"
            found += more
        return found

    def write(self, pieces: list[tuple[int, bytes]], *, fua: bool) -> None:
        self._move()
        if not self._read_only:
            self._check([(offset, len(data)) for offset, data in pieces], errno.ENOSPC)
        for offset, data in pieces:
            done = os.pwrite(self._fd, data, min(offset, _MOST))
            while done < len(data):
                done += os.pwrite(self._fd, data[done:], offset + done)
        if fua:
            os.fdatasync(self._fd)

    def discard(self, offset: int, length: int, *, fua: bool) -> None:
        self._move()
        if not self._read_only:
            self._check([(offset, length)], errno.EINVAL)
        self._allocate(_PUNCH_HOLE | _KEEP_SIZE, offset, length, fua=fua)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool, fast: bool, fua: bool) -> None:
        self._move()
        if not self._read_only:
            self._check([(offset, length)], errno.ENOSPC)
        self._allocate(_PUNCH_HOLE | _KEEP_SIZE if unmap else _ZERO_RANGE, offset, length, fua=fua)

    def _allocate(self, mode: int, offset: int, length: int, *, fua: bool) -> None:
        if not length and self._read_only:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if length and _LIBC.fallocate(
            self._fd, mode, ctypes.c_int64(min(offset, _MOST - length)), ctypes.c_int64(length)
        ):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        if fua:
            os.fdatasync(self._fd)

    def flush(self) -> None:
        self._move()
        os.fdatasync(self._fd)

    def cache(self, offset: int, length: int) -> None:
        self._check([(offset, length)], errno.EINVAL)

    def extents(self, offset: int, length: int, *, one: bool) -> list[tuple[int, int, int]] | None:
        self._move()
        self._check([(offset, length)], errno.EINVAL)
        found, at, end = [], offset, offset + length
        while at < end:
            hole = min(os.lseek(self._fd, at, os.SEEK_HOLE), end)
            if hole > at:
                found.append((at, hole - at, 0))
                at = hole
                continue
            try:
                data = min(os.lseek(self._fd, at, os.SEEK_DATA), end)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                data = end
            assert data > at, "neither data nor a hole"
            found.append((at, data - at, 3))
            at = data
        return found

    def errnos(self, own: set[int]) -> set[int]:
        return {errno.EBADF if number == errno.EROFS and self._read_only else number for number in own}

    def close(self) -> None:
        os.close(self._fd)

    def _move(self) -> None:
        if self._moves:
            self._served.detach()
            self._served.serve(resend=True)

    def _check(self, pieces: list[tuple[int, int]], number: int) -> None:
        if any(offset + length > self._size for offset, length in pieces):
            raise OSError(number, "beyond the end")
