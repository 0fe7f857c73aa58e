"""An example of a target of one's own: a disk on which every 8 bytes hold their own offset.

Clusters are computed when first touched and mapped from then on, so only the first access of a
cluster runs Python. Good for finding reads that come from the wrong place. Try it:

    blkloom.open("0 2048 pattern", targets=[Pattern])
"""

import os
from dataclasses import dataclass
from typing import Self

import numpy as np

from blkloom._engine import ClusterTable, Extent, File
from blkloom.table.arguments import Arguments
from blkloom.target import entries
from blkloom.target.base import RETRY, Retry, Target
from blkloom.target.opening import Opening
from blkloom.units import Bytes

CLUSTER = 65536


@dataclass
class Pattern(Target):
    """Reads as the pattern until written; what is written stays in memory."""

    name = "pattern"
    summary = "every 8 bytes hold their own offset (big-endian), until written"

    @classmethod
    def parse(cls, arguments: Arguments) -> Self:
        """No arguments."""
        arguments.finish()
        return cls()

    def map(self, opening: Opening, start: Bytes, length: Bytes) -> list[tuple[Bytes, Bytes, Extent]]:
        """A cluster table over a scratch file in memory: empty, so that all of it faults."""
        self.read_only: bool = opening.read_only
        self.memory: int = os.memfd_create("pattern")
        os.ftruncate(self.memory, -(-length // CLUSTER) * CLUSTER)
        self.table: ClusterTable = ClusterTable(length, CLUSTER, [File(self.memory, writable=True, label="pattern")])
        return [(Bytes(0), length, Extent.table(self.table))]

    def read(self, offset: Bytes, length: Bytes) -> Retry:
        """First touch: compute the clusters, map them, and have the engine look again."""
        for cluster in range(offset // CLUSTER, -(-(offset + length) // CLUSTER)):
            if self.table.entry(cluster) == entries.FAULT:
                at = cluster * CLUSTER
                os.pwrite(self.memory, np.arange(at, at + CLUSTER, 8, dtype=">u8").data, at)
                self.table.fill(cluster, 1, entries.data(at, read_only=self.read_only))
        return RETRY

    def write(self, offset: Bytes, data: bytes, *, fua: bool) -> Retry | None:
        """The same; the data then goes to the memory without us."""
        return super().write(offset, data, fua=fua) if self.read_only else self.read(offset, Bytes(len(data)))

    def write_zeroes(self, offset: Bytes, length: Bytes, *, may_unmap: bool, fast: bool) -> None:
        """Always comes here (see ClusterTable), so it is done here."""
        self.write(offset, bytes(length), fua=False)
        os.pwrite(self.memory, bytes(length), offset)

    def close(self) -> None:
        """The device has closed."""
        os.close(self.memory)
