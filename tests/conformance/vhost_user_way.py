"""Access path to a device as the disk of a virtual machine, through a driver of these tests, or that of libblkio."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from rust_driver import RustDriver
from vhost_user_driver import DISCARD, SECTOR, WRITE_ZEROES, Machine
from vhost_user_served import VhostUserServed

_MOST = 1 << 20


class VhostUserWay:
    """Through virtqueues, one after the other. moves: before each request another server takes over the machine.

    Disks have sectors: parts of one are read, changed and written, also to discard them. There is one error.
    """

    unit = SECTOR
    """Bytes next to a change, within its sector, are written, too."""

    def __init__(self, served: VhostUserServed, machine: Machine | RustDriver, *, moves: bool) -> None:
        self._served = served
        self._moves = moves
        self._machine = machine
        self._size = self._machine.capacity
        self._turn = 0

    def read(self, pieces: list[tuple[int, int]], *, df: bool) -> bytes:
        self._move()
        return b"".join(self._read(offset, length) for offset, length in pieces)

    def write(self, pieces: list[tuple[int, bytes]], *, fua: bool) -> None:
        self._move()
        for offset, data in pieces:
            self._check(offset, len(data))
            for at, part in _parts(offset, data):
                self._write(at, part)
            if not data:
                self._machine.write_nothing(offset // SECTOR * SECTOR)
        if fua:
            self._machine.flush()

    def discard(self, offset: int, length: int, *, fua: bool) -> None:
        self._clear(DISCARD, offset, length, unmap=False, fua=fua)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool, fast: bool, fua: bool) -> None:
        self._clear(WRITE_ZEROES, offset, length, unmap=unmap, fua=fua)

    def flush(self) -> None:
        self._move()
        self._machine.flush()

    def cache(self, offset: int, length: int) -> None:
        self._check(offset, length)

    def extents(self, offset: int, length: int, *, one: bool) -> None:
        self._check(offset, length)

    def errnos(self, own: set[int]) -> set[int]:
        return {errno.EIO} if own else set()

    def close(self) -> None:
        """The machine stays connected."""

    def _read(self, offset: int, length: int) -> bytes:
        start, end = offset // SECTOR * SECTOR, -(-(offset + length) // SECTOR) * SECTOR
        self._check(offset, length)
        self._turn += 1
        found = self._machine.read(start, end - start, queue=self._turn % len(self._machine.queues))
        return found[offset - start :][:length]

    def _write(self, offset: int, data: bytes) -> None:
        """Within one sector, or whole sectors."""
        start = offset // SECTOR * SECTOR
        if len(data) % SECTOR or offset % SECTOR:
            whole = bytearray(self._machine.read(start, SECTOR))
            whole[offset - start : offset - start + len(data)] = data
            data = bytes(whole)
        self._turn += 1
        self._machine.write(start, data, queue=self._turn % len(self._machine.queues))

    def _clear(self, kind: int, offset: int, length: int, *, unmap: bool, fua: bool) -> None:
        self._move()
        self._check(offset, length)
        for at, part in _parts(offset, bytes(length)):
            if len(part) % SECTOR:
                self._write(at, part)
            else:
                self._machine.clear(kind, at, len(part), unmap=unmap)
        if not length:
            self._machine.clear(kind, offset // SECTOR * SECTOR, 0)
        if fua:
            self._machine.flush()

    def _move(self) -> None:
        if self._moves:
            self._served.hand_over()

    def _check(self, offset: int, length: int) -> None:
        if offset + length > self._size:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def _parts(offset: int, data: bytes) -> Iterable[tuple[int, bytes]]:
    """The part before the first sector boundary, whole sectors, the rest."""
    first = min(-offset % SECTOR, len(data))
    last = first + (len(data) - first) // SECTOR * SECTOR
    for start, end in ((0, first), (first, last), (last, len(data))):
        if end > start:
            yield offset + start, data[start:end]
