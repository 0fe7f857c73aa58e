"""A target for tests, made as an image format is: clusters that faults allocate, in a scratch file.

Unallocated clusters read as zeros. Which way a cluster goes depends on its number, so that every
kind of entry is met: mapped read-only first and then written through a second fault, mapped for
writing at once, filled a page at a time, dropped again on flush.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

from blkloom._engine import ClusterTable, Extent, File
from blkloom.table.arguments import Arguments
from blkloom.target import entries
from blkloom.target.base import HOLE, RETRY, ZERO, Retry, Target
from blkloom.target.opening import Opening
from blkloom.units import Bytes

CLUSTER = 2048
PAGE = 8


@dataclass
class Growing(Target):
    """Zeros that become data where they are written."""

    name = "growing"
    summary = "clusters allocated by faults, for tests"

    @classmethod
    def parse(cls, arguments: Arguments) -> Self:
        arguments.finish()
        return cls()

    def map(self, opening: Opening, start: Bytes, length: Bytes) -> list[tuple[Bytes, Bytes, Extent]]:
        self._read_only = opening.read_only
        self._scratch = os.memfd_create("growing")
        file = File(self._scratch, writable=True, label="growing")
        self._table = ClusterTable(length, CLUSTER, [file], page=PAGE)
        self._places: dict[int, int] = {}
        self._end = 0
        return [(Bytes(0), length, Extent.table(self._table))]

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
