"""Test target that works like an image format: faults allocate clusters in a scratch file.

Unallocated clusters read as zeros. The number of a cluster decides how it is mapped, so that every kind of entry
occurs: read-only first, and writable after a second fault; writable at once; filled page by page; dropped at a flush.
"""

from __future__ import annotations

import asyncio
import os

from blkloom import entries
from blkloom._engine import ClusterTable, Extent, File
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import HOLE, RETRY, ZERO, LoadedTarget, Retry
from blkloom.targets.spec import TargetSpec
from blkloom.units import Bytes

CLUSTER = 2048
PAGE = 8


class Growing(TargetSpec):
    """Zeros that become data where they are written."""

    name = "growing"
    summary = "clusters allocated by faults, for tests"

    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        return LoadedGrowing(self, context, length)


class LoadedGrowing(LoadedTarget):
    flushes = writes = True

    def __init__(self, spec: TargetSpec, context: LoadContext, length: Bytes) -> None:
        self._read_only = context.read_only
        self._scratch = os.memfd_create("growing")
        file = File(self._scratch, writable=True, label="growing")
        self._table = ClusterTable(length, CLUSTER, [file], page=PAGE)
        self._places: dict[int, int] = {}
        self._end = 0
        super().__init__(spec, [(Bytes(0), length, Extent.table(self._table))])

    def read(self, offset: Bytes, length: Bytes) -> Retry:
        for cluster in self._clusters(offset, length):
            place = self._places.get(cluster)
            if place is None:
                self._table.fill(cluster, 1, entries.ZERO)
            else:
                read_only = self._read_only or cluster % 3 == 0
                self._table.fill(cluster, 1, entries.data(place, read_only=read_only))
        return RETRY

    def write(self, offset: Bytes, data: bytes, *, fua: bool) -> Retry | None:
        if self._read_only:
            return super().write(offset, data, fua=fua)
        for cluster in self._clusters(offset, Bytes(len(data))):
            if cluster not in self._places:
                # Places go the other way round than clusters, with a gap between them.
                self._end += 2 * CLUSTER
                os.ftruncate(self._scratch, self._end)
                self._places[cluster] = self._end - CLUSTER
            self._table.fill(cluster, 1, entries.data(self._places[cluster]))
        return RETRY

    def write_zeroes(self, offset: Bytes, length: Bytes, *, may_unmap: bool, fast: bool) -> Retry | None:
        if self._read_only:
            return super().write(offset, b"", fua=False)
        for cluster in self._clusters(offset, length):
            first, last = max(offset, cluster * CLUSTER), min(offset + length, (cluster + 1) * CLUSTER)
            if may_unmap and last - first == CLUSTER:
                self._places.pop(cluster, None)
                self._table.fill(cluster, 1, entries.ZERO)
            elif cluster in self._places:
                os.pwrite(self._scratch, bytes(last - first), self._places[cluster] + first % CLUSTER)
        return None

    def discard(self, offset: Bytes, length: Bytes) -> Retry | None:
        if self._read_only:
            return super().discard(offset, length)
        first, last = -(-offset // CLUSTER), (offset + length) // CLUSTER
        if first < last:
            self.write_zeroes(Bytes(first * CLUSTER), Bytes((last - first) * CLUSTER), may_unmap=True, fast=False)
        return None

    def flush(self) -> None:
        """Forgets every mapping, as a suspended image would: the next access faults again."""
        os.fdatasync(self._scratch)
        for page in range(-(-self._table_clusters() // PAGE)):
            self._table.drop(page)

    def extents(self, offset: Bytes, length: Bytes) -> list[tuple[Bytes, int]]:
        found = []
        for cluster in self._clusters(offset, length):
            first, last = max(offset, cluster * CLUSTER), min(offset + length, (cluster + 1) * CLUSTER)
            found.append((Bytes(last - first), 0 if cluster in self._places else HOLE | ZERO))
        return found

    def close(self) -> None:
        os.close(self._scratch)

    def _table_clusters(self) -> int:
        return max(self._places, default=-1) + 1

    def _clusters(self, offset: Bytes, length: Bytes) -> range:
        return range(offset // CLUSTER, -(-(offset + length) // CLUSTER))


class AsyncGrowing(Growing):
    """The same in coroutines, which wait a different number of turns before they do anything."""

    name = "async-growing"

    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        return LoadedAsyncGrowing(self, context, length)


class LoadedAsyncGrowing(LoadedGrowing):
    most_in_flight = 5

    async def read(self, offset: Bytes, length: Bytes) -> Retry:  # type: ignore[override]
        await _turns(offset)
        return super().read(offset, length)

    async def write(self, offset: Bytes, data: bytes, *, fua: bool) -> Retry | None:  # type: ignore[override]
        await _turns(offset)
        return super().write(offset, data, fua=fua)

    async def write_zeroes(  # type: ignore[override]
        self, offset: Bytes, length: Bytes, *, may_unmap: bool, fast: bool
    ) -> Retry | None:
        await _turns(offset)
        return super().write_zeroes(offset, length, may_unmap=may_unmap, fast=fast)

    async def discard(self, offset: Bytes, length: Bytes) -> Retry | None:  # type: ignore[override]
        await _turns(offset)
        if self._read_only:
            return super().discard(offset, length)
        first, last = -(-offset // CLUSTER), (offset + length) // CLUSTER
        if first < last:
            whole = Bytes(first * CLUSTER), Bytes((last - first) * CLUSTER)
            return super().write_zeroes(*whole, may_unmap=True, fast=False)
        return None

    async def flush(self) -> None:  # type: ignore[override]
        await _turns(Bytes(0))
        super().flush()

    async def extents(self, offset: Bytes, length: Bytes) -> list[tuple[Bytes, int]]:  # type: ignore[override]
        await _turns(offset)
        return super().extents(offset, length)


async def _turns(offset: Bytes) -> None:
    for _ in range(offset // CLUSTER % 4):
        await asyncio.sleep(0)
