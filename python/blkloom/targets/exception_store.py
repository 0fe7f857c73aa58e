"""Exception stores of snapshots: which chunk of the origin was copied to which chunk of the store.

Source: Linux Documentation/admin-guide/device-mapper/snapshot.rst; dm-snap-persistent.c for the format. A persistent
store is little-endian. Chunk 0 is the header: magic, valid, version, chunk size in sectors. With E = chunk bytes / 16,
area n is chunk 1 + (E + 1) * n: E exceptions (old chunk, new chunk), which are followed by E chunks of data. An
exception with new chunk 0 is the end.

Order of writes: the caller writes the data of new chunks. `commit` clears the next area if this one becomes full,
flushes, and then writes the exceptions durably. So the store on disk always has each exception with its data or not at
all.

A transient store has its exceptions in memory that the next process of the device gets.

One thread at a time. May fail: OSError of the store, StoreFull, ValueError for a store that cannot be read.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import msgspec
from typing_extensions import override

from blkloom.errors import FaultError
from blkloom.units import SECTOR, Bytes, Sectors, to_sectors

if TYPE_CHECKING:
    from blkloom._engine import Device

MAGIC: Final = 0x70416E53
VERSION: Final = 1
_HEADER: Final = struct.Struct("<4I")
_EXCEPTION: Final = struct.Struct("<QQ")
_COPY: Final = 1 << 20
_BLOCK: Final = 4096
"""Exceptions are written in whole blocks of so many bytes, or in a chunk if that is smaller."""
_LARGEST: Final = Sectors(1 << 21)
"""The largest chunk: 1 GiB."""


class ChunkMove(NamedTuple):
    """An exception: chunk `old` of the origin is chunk `new` of the store."""

    old: int
    new: int


class StoreFull(FaultError):
    """No chunk is free."""

    def __init__(self) -> None:
        super().__init__(errno.EIO, "the exception store is full")


class StoreHeader(msgspec.Struct, frozen=True):
    """The header of a persistent store. valid: False: the snapshot was invalidated. chunk: its chunk size."""

    valid: bool
    chunk: Sectors


class Usage(NamedTuple):
    """Sectors of a store: in use, of the whole store, of metadata."""

    used: Sectors
    total: Sectors
    metadata: Sectors

    def __str__(self) -> str:
        """As in the status of a snapshot."""
        return f"{self.used}/{self.total} {self.metadata}"


def chunk_fault(chunk: int) -> str:
    """What is wrong with a chunk size (sectors); "" for nothing."""
    if chunk & (chunk - 1):
        return "Chunk size is not a power of 2"
    return "Chunk size is too high" if chunk > _LARGEST else ""


def read_header(store: Device) -> StoreHeader | None:
    """The header of a persistent store; None: it is new. Raises OSError, and ValueError for anything else."""
    magic, valid, version, chunk = _HEADER.unpack_from(store.pread(min(SECTOR, store.size), 0).ljust(SECTOR, b"\0"))
    if not magic:
        return None
    if magic != MAGIC:
        raise ValueError("Invalid or corrupt snapshot: it does not begin with the magic of an exception store")
    if version != VERSION:
        raise ValueError(f"unable to handle snapshot disk version {version}")
    if not chunk or (fault := chunk_fault(chunk)):
        raise ValueError(f"invalid on-disk chunk size {chunk}{f': {fault}' if chunk else ''}")
    return StoreHeader(bool(valid), Sectors(chunk))


class ExceptionStore(Protocol):
    """What a snapshot needs of its store. chunk: bytes."""

    chunk: Bytes

    def begin(self) -> Iterable[ChunkMove]:
        """Makes a new store, or returns the exceptions of the one that is there."""

    def allocate(self) -> int:
        """The number of a free chunk, for the next `commit`. Raises StoreFull."""

    def commit(self, moves: Sequence[ChunkMove]) -> None:
        """Records exceptions for the oldest allocated chunks, in their order, durably if the store is persistent. Their
        data was written before.
        """

    def invalidate(self) -> None:
        """Records that the snapshot is invalid."""

    def usage(self) -> Usage:
        """What is used."""


class PersistentStore(ExceptionStore):
    """A store in the kernel's format on the device `store`. read_only: nothing is written."""

    def __init__(self, store: Device, chunk: Bytes, *, read_only: bool = False) -> None:
        self.chunk = chunk
        self._store = store
        self._size = store.size
        self._read_only = read_only
        self._most = chunk // _EXCEPTION.size
        """Exceptions in an area."""
        self._area = bytearray(chunk)
        self._number = 0
        """Number of the current area."""
        self._committed = 0
        """Exceptions in the current area."""
        self._pending = 0
        """Chunks that are allocated and not committed."""
        self._next = 2

    @staticmethod
    def whole_size(size: Bytes, chunk: Bytes) -> Bytes:
        """Bytes of a store that has room for all chunks of a device of `size` bytes."""
        chunks = -(-size // chunk)
        areas = chunks // (chunk // _EXCEPTION.size) + 1
        return Bytes((1 + areas + chunks) * chunk)

    def _place(self, area: int) -> int:
        """The first byte of an area."""
        return (1 + (self._most + 1) * area) * self.chunk

    @override
    def begin(self) -> Iterable[ChunkMove]:
        if read_header(self._store) is not None:
            found = list(self._read())
            self._skip_area()
            return found
        if self._read_only:
            return []
        if self._size < 2 * self.chunk:
            raise ValueError(f"the store has {self._size} bytes; header and exceptions need {2 * self.chunk}")
        self._store.pwrite(bytes(self.chunk), self._place(0))
        self._store.flush()
        self._write_header(valid=True)
        return []

    def _write_header(self, *, valid: bool) -> None:
        header = _HEADER.pack(MAGIC, valid, VERSION, to_sectors(self.chunk))
        self._store.pwrite(header.ljust(self.chunk, b"\0"), 0, fua=True)

    def _read(self) -> Iterator[ChunkMove]:
        """All exceptions; the current area is the one that is not full, then."""
        number = 0
        while True:
            if self._place(number) + self.chunk > self._size:
                raise ValueError(f"its last area is full, and area {number} is beyond its end")
            area = self._store.pread(self.chunk, self._place(number))
            found = [ChunkMove(*pair) for pair in takewhile(lambda pair: pair[1], _EXCEPTION.iter_unpack(area))]
            for move in found:
                if (move.new + 1) * self.chunk > self._size or move.new % (self._most + 1) == 1:
                    raise ValueError(f"an exception of area {number} names chunk {move.new}, which holds no data")
                self._next = max(self._next, move.new + 1)
            yield from found
            if len(found) < self._most:
                break
            number += 1
        self._number, self._committed = number, (count := len(found))
        self._area[: count * _EXCEPTION.size] = area[: count * _EXCEPTION.size]
        if any(memoryview(area)[count * _EXCEPTION.size :]) and not self._read_only:
            # A write that was cut off has left exceptions behind the end. Later ones must not bring them back.
            self._store.pwrite(self._area, self._place(number), fua=True)

    def _skip_area(self) -> None:
        if self._next % (self._most + 1) == 1:
            self._next += 1

    @override
    def allocate(self) -> int:
        index = self._committed + self._pending
        area = self._number + index // self._most
        ends = index % self._most == self._most - 1  # the next area must exist, to hold the end
        if (self._next + 1) * self.chunk > self._size or (ends and self._place(area + 1) + self.chunk > self._size):
            raise StoreFull
        new = self._next
        self._pending += 1
        self._next += 1
        self._skip_area()
        return new

    @override
    def commit(self, moves: Sequence[ChunkMove]) -> None:
        rest = iter(moves)
        while part := list(islice(rest, self._most - self._committed)):
            first, last = self._committed, self._committed + len(part)
            for index, move in enumerate(part, first):
                _EXCEPTION.pack_into(self._area, index * _EXCEPTION.size, *move)
            if last == self._most:
                self._store.pwrite(bytes(self.chunk), self._place(self._number + 1))
            self._store.flush()
            self._write_area(first, last)
            self._committed = last
            self._pending -= len(part)
            if last == self._most:
                self._number += 1
                self._committed = 0
                self._area = bytearray(self.chunk)

    def _write_area(self, first: int, last: int) -> None:
        """Writes the exceptions from `first` to before `last` durably."""
        block = min(_BLOCK, self.chunk)
        low = first * _EXCEPTION.size // block * block
        high = -(-last * _EXCEPTION.size // block) * block
        self._store.pwrite(memoryview(self._area)[low:high], self._place(self._number) + low, fua=True)

    @override
    def invalidate(self) -> None:
        if not self._read_only:
            self._write_header(valid=False)

    @override
    def usage(self) -> Usage:
        chunk = to_sectors(self.chunk)
        used, metadata = self._next * chunk, (self._number + 2) * chunk
        return Usage(Sectors(used), to_sectors(Bytes(self._size)), Sectors(metadata))

    # merge

    def moves(self) -> Iterator[ChunkMove]:
        """All exceptions."""
        for number in range(self._number + 1):
            ends = number == self._number
            area = self._area if ends else self._store.pread(self.chunk, self._place(number))
            yield from islice(map(ChunkMove._make, _EXCEPTION.iter_unpack(area)), self._committed if ends else None)

    def last_run(self, most: int) -> tuple[ChunkMove, int] | None:
        """The last exceptions that continue each other in origin and store, in one area: (the first of them, their
        number, `most` at most). None: no exception is left.
        """
        if not self._committed:
            if not self._number:
                return None
            self._number -= 1
            self._area[:] = self._store.pread(self.chunk, self._place(self._number))
            self._committed = self._most
        first = self._move(self._committed - 1)
        count = 1
        while count < min(most, self._committed):
            before = self._move(self._committed - 1 - count)
            if before != (first.old - 1, first.new - 1):
                break
            first = before
            count += 1
        return first, count

    def _move(self, index: int) -> ChunkMove:
        return ChunkMove(*_EXCEPTION.unpack_from(self._area, index * _EXCEPTION.size))

    def drop_last(self, count: int) -> None:
        """Removes the last `count` exceptions of the area durably; their data is in the origin, flushed."""
        last, first = self._committed, self._committed - count
        self._area[first * _EXCEPTION.size : last * _EXCEPTION.size] = bytes(count * _EXCEPTION.size)
        self._write_area(first, last)
        self._committed = first
        # Where it would be if all exceptions had been recorded in the order of their chunks, as in the kernel.
        self._next = self._place(self._number) // self.chunk + first + 1


class TransientStore(ExceptionStore):
    """A store whose device has only data. log: memory of `log_size` bytes for the exceptions, zeros at first."""

    def __init__(self, store: Device, chunk: Bytes, log: Device, start: Bytes) -> None:
        """start: the first byte for exceptions in the log."""
        self.chunk = chunk
        self._size = store.size
        self._log = log
        self._start = start
        self._count = 0
        self._next = 0

    @staticmethod
    def log_size(size: Bytes, chunk: Bytes) -> Bytes:
        """Bytes of the log of a store of `size` bytes."""
        return Bytes((size // chunk + 1) * _EXCEPTION.size)

    def copy_log(self, former: TransientStore) -> None:
        """Takes the exceptions of another store on the same device, with the same chunk size. Before `begin`. Raises
        OSError.
        """
        end = former._count * _EXCEPTION.size
        for at in range(0, end, _COPY):
            count = min(_COPY, end - at)
            self._log.pwrite(former._log.pread(count, former._start + at), self._start + at)

    @override
    def begin(self) -> Iterable[ChunkMove]:
        found: list[ChunkMove] = []
        while True:
            old, new = _EXCEPTION.unpack(self._log.pread(_EXCEPTION.size, self._start + self._count * _EXCEPTION.size))
            if not new:
                self._next = self._count
                return found
            found.append(ChunkMove(old, new - 1))
            self._count += 1

    @override
    def allocate(self) -> int:
        if (self._next + 1) * self.chunk > self._size:
            raise StoreFull
        self._next += 1
        return self._next - 1

    @override
    def commit(self, moves: Sequence[ChunkMove]) -> None:
        log = b"".join(_EXCEPTION.pack(move.old, move.new + 1) for move in moves)
        self._log.pwrite(log, self._start + self._count * _EXCEPTION.size)
        self._count += len(moves)

    @override
    def invalidate(self) -> None:
        return

    @override
    def usage(self) -> Usage:
        return Usage(to_sectors(Bytes(self._next * self.chunk)), to_sectors(Bytes(self._size)), Sectors(0))
