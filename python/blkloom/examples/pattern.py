"""An example of a target of one's own: a disk on which every 8 bytes hold their own offset.

Clusters are computed when first touched and mapped from then on, so only the first access of a
cluster runs Python. Good for finding reads that come from the wrong place. Try it:

    blkloom.open("0 2048 pattern", targets=[Pattern])
"""

import os

import numpy as np

from blkloom import (
    RETRY,
    Answer,
    Bytes,
    ClusterTable,
    Extent,
    File,
    LoadContext,
    LoadedTarget,
    Retry,
    TargetSpec,
    entries,
)

CLUSTER = 65536


class Pattern(TargetSpec):
    """The target as a table names it: it has no arguments."""

    name = "pattern"
    summary = "every 8 bytes hold their own offset (big-endian), until written"

    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        """Called when a table with it is loaded."""
        return LoadedPattern(self, context, length)


class LoadedPattern(LoadedTarget):
    """Reads as the pattern until written; what is written stays in memory."""

    writes = True

    def __init__(self, spec: Pattern, context: LoadContext, length: Bytes) -> None:
        """A cluster table over a scratch file in memory: empty, so that all of it faults."""
        self.read_only = context.read_only
        self.memory = os.memfd_create("pattern")
        os.ftruncate(self.memory, -(-length // CLUSTER) * CLUSTER)
        self.table = ClusterTable(length, CLUSTER, [File(self.memory, writable=True, label="pattern")])
        super().__init__(spec, [(Bytes(0), length, Extent.table(self.table))])

    def read(self, offset: Bytes, length: Bytes) -> Retry:
        """First touch: compute the clusters, map them, and have the engine look again."""
        for cluster in range(offset // CLUSTER, -(-(offset + length) // CLUSTER)):
            if self.table.entry(cluster) == entries.FAULT:
                at = cluster * CLUSTER
                os.pwrite(self.memory, np.arange(at, at + CLUSTER, 8, dtype=">u8").data, at)
                self.table.fill(cluster, 1, entries.data(at, read_only=self.read_only))
        return RETRY

    def write(self, offset: Bytes, data: bytes, *, fua: bool) -> Answer[Retry | None]:
        """The same; the data then goes to the memory without us."""
        return super().write(offset, data, fua=fua) if self.read_only else self.read(offset, Bytes(len(data)))

    def write_zeroes(self, offset: Bytes, length: Bytes, *, may_unmap: bool, fast: bool) -> None:
        """Always comes here (see ClusterTable), so it is done here."""
        self.write(offset, bytes(length), fua=False)
        os.pwrite(self.memory, bytes(length), offset)

    def close(self) -> None:
        """The device has closed."""
        os.close(self.memory)
