"""The map of a snapshot: each chunk is in the origin or in the store, by a cluster table over two devices.

The table has no memory for chunks that are in the origin: `missing` entries lead there. An exception is an entry that
leads to the store. The engine serves both without Python. The entries of unchanged chunks are read-only, so that the
first write to one faults.

With the lock of the group, see `origin_group.py`. May raise OSError and StoreFull.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from blkloom import _engine, entries
from blkloom._engine import ClusterTable, Extent
from blkloom.errors import FaultError
from blkloom.targets.exception_store import ChunkMove, ExceptionStore, StoreFull
from blkloom.units import Bytes

if TYPE_CHECKING:
    from typing_extensions import Buffer

_ORIGIN: Final = 0
_STORE: Final = 1
_TOGETHER: Final = 8 << 20
"""Bytes that are copied at most before their exceptions are committed."""
_LONGEST: Final = 1 << 20
"""Bytes of one read of a copy."""


Transfer: TypeAlias = "tuple[Literal['r', 'w'], Buffer, int]"
"""A read or write of a device: direction, buffer, offset."""


class SnapshotMap:
    """Origin, store and the table of both. origin, cow: private devices. clients_cow: a private device over `cow`,
    which the table maps. store: the exceptions. length: bytes of the segment.
    """

    def __init__(
        self,
        origin: _engine.Device,
        cow: _engine.Device,
        clients_cow: _engine.Device,
        store: ExceptionStore,
        length: Bytes,
    ) -> None:
        self.origin = origin
        self.cow = cow
        self.store = store
        self.chunk = store.chunk
        self.length = length
        self._clients_cow = clients_cow
        self.table = unchanged(length, self.chunk, [origin, clients_cow])

    def extent(self) -> Extent:
        """The extent of the segment."""
        return Extent.table(self.table)

    def add(self, moves: Iterable[ChunkMove]) -> None:
        """Maps exceptions. Raises ValueError for one beyond the end of the segment."""
        for first, count in _runs(moves):
            self.table.fill(first.old, count, entries.data(first.new * self.chunk, file=_STORE))

    def reset(self, moves: Iterable[ChunkMove]) -> None:
        """Begins a new table with these exceptions: the first write to any other chunk faults again."""
        self.table = unchanged(self.length, self.chunk, [self.origin, self._clients_cow])
        self.add(moves)

    def has(self, chunk: int) -> bool:
        """Whether a chunk has an exception."""
        entry = self.table.entry(chunk)
        return (entry >> entries.FILE_SHIFT) & (entries.FILES - 1) == _STORE

    def chunks(self, ranges: Iterable[tuple[Bytes, Bytes]]) -> Iterator[int]:
        """The chunks of byte ranges that have no exception, each once, in ascending order."""
        last = -1
        for offset, length in sorted(ranges):
            end = min(offset + length, self.length)
            for chunk in range(max(offset // self.chunk, last + 1), -(-end // self.chunk)):
                last = chunk
                if not self.has(chunk):
                    yield chunk

    def copy(self, chunks: Iterable[int], *, offset: int = 0, data: bytes = b"") -> None:
        """Copies chunks without exceptions to the store, and maps them there. Chunks that `data`, which is written at
        `offset`, covers whole get their part of it instead.
        """
        at_once = max(1, _TOGETHER // self.chunk)
        waiting: list[int] = []
        for chunk in chunks:
            waiting.append(chunk)
            if len(waiting) == at_once:
                self._copy(waiting, offset, data)
                waiting = []
        if waiting:
            self._copy(waiting, offset, data)

    def _copy(self, chunks: Sequence[int], offset: int, data: bytes) -> None:
        moves: list[ChunkMove] = []
        full: StoreFull | None = None
        for chunk in chunks:
            try:
                moves.append(ChunkMove(chunk, self.store.allocate()))
            except StoreFull as error:
                full = error
                break
        reads: list[Transfer] = []
        writes: list[Transfer] = []
        for first, count in _runs(moves, most=max(1, _LONGEST // self.chunk)):
            at, to = first.old * self.chunk, first.new * self.chunk
            size = min(count * self.chunk, self.length - at)
            if offset <= at and at + size <= offset + len(data):
                writes.append(("w", memoryview(data)[at - offset : at - offset + size], to))
            else:
                buffer = bytearray(size)
                reads.append(("r", buffer, at))
                writes.append(("w", buffer, to))
        move_bytes(self.origin, reads)
        move_bytes(self.cow, writes)
        if moves:
            self.store.commit(moves)
            self.add(moves)
        if full is not None:
            raise full

    def refuse_writes(self) -> None:
        """Makes writes to chunks in the store fail, with EIO. Returns when I/O in flight has ended."""
        replace(self._clients_cow, Extent.device(self.cow, 0, read_only=True))

    def fail_all(self) -> None:
        """Makes all I/O fail, with EIO. Returns when I/O in flight has ended."""
        replace(self.origin, Extent.error(errno.EIO))
        replace(self._clients_cow, Extent.error(errno.EIO))


def unchanged(length: Bytes, chunk: Bytes, devices: Sequence[_engine.Device]) -> ClusterTable:
    """A table of which all clusters are in the first device, at their own offset, and fault at a write."""
    missing = entries.data(0, file=_ORIGIN, read_only=True)
    return ClusterTable(length, chunk, [], devices=devices, missing=missing)


def replace(device: _engine.Device, extent: Extent) -> None:
    """Replaces the map of a private device, which keeps its size."""
    device.swap(_engine.Map([(0, device.size, 0, extent)]))


def move_bytes(device: _engine.Device, requests: Sequence[Transfer]) -> None:
    """Executes reads and writes together. Raises OSError."""
    if not requests:
        return
    for (_, buffer, _), result in zip(requests, device.batch(requests), strict=True):
        if result < 0:
            raise FaultError(-result, os.strerror(-result))
        if result != memoryview(buffer).nbytes:
            raise FaultError(errno.EIO, "a part only was read or written")


def _runs(moves: Iterable[ChunkMove], *, most: int = 1 << 40) -> Iterator[tuple[ChunkMove, int]]:
    """Exceptions that continue each other: (the first, their number)."""
    first: ChunkMove | None = None
    count = 0
    for move in moves:
        if first is not None and count < most and move == (first.old + count, first.new + count):
            count += 1
            continue
        if first is not None:
            yield first, count
        first, count = move, 1
    if first is not None:
        yield first, count
