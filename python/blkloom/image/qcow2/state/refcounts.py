"""Refcounts of host clusters: a table of refcount blocks, each one cluster of counters of 1 to 64 bits.

Refcounts are changed in memory, in blocks that are NumPy arrays of native counters. `write_blocks` and `write_table`
write them when flush.py says so, again and again until `written`. Invariants: a block in the cache is what the file
will hold after the next write; changed blocks are never dropped; a refcount is always from 0 to `maximum`. A cluster
is free if its refcount is 0 or if no block describes it yet: `describe` makes blocks (and a larger table) for clusters
past that. One thread (the mapper's). May fail: CorruptImage for what the file says, OSError of the storage.

Source: QEMU docs/interop/qcow2, "Host cluster management".
"""

from __future__ import annotations

import errno
import itertools
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import numpy as np
from numpy.typing import NDArray

from blkloom.errors import ResourceError
from blkloom.image.errors import CorruptImage
from blkloom.image.types import HostOffset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from blkloom.image.qcow2.state.image import Image
    from blkloom.image.storage import Storage

TABLE_LIMIT: Final = 8 << 20
"""Maximum bytes of a table; QEMU's own limit."""

_CACHE_LIMIT: Final = 16 << 20
_SECTOR: Final = 512
_ENTRY: Final = 8
_RESERVED: Final = 0x1FF


class Widths:
    """Encoding of counters of `1 << order` bits in a block. Sub-byte counters begin at the least significant bit."""

    def __init__(self, order: int) -> None:
        self.bits: Final = 1 << order
        self.maximum: Final = (1 << self.bits) - 1
        size = max(1, self.bits // 8)
        self._wire = np.dtype(f">u{size}")
        self.native: Final = np.dtype(f"=u{size}")
        self._shifts = np.arange(0, 8, self.bits, dtype=np.uint8) if self.bits < 8 else None

    def decode(self, raw: bytes) -> NDArray[np.unsignedinteger]:
        """Counters as an array with one element for each."""
        if self._shifts is None:
            return np.frombuffer(raw, self._wire).astype(self.native)
        packed = np.frombuffer(raw, np.uint8)[:, None]
        counts: NDArray[np.uint8] = (packed >> self._shifts & np.uint8(self.maximum)).reshape(-1)
        return counts

    def encode(self, counts: NDArray[np.unsignedinteger]) -> bytes:
        """Counters as bytes; the counters must fill whole bytes."""
        if self._shifts is None:
            return counts.astype(self._wire).tobytes()
        packed = counts.astype(np.uint8).reshape(-1, 8 // self.bits) << self._shifts
        whole: NDArray[np.uint8] = np.bitwise_or.reduce(packed, axis=1).astype(np.uint8)
        return whole.tobytes()


@dataclass(slots=True)
class _Block:
    counts: NDArray[np.unsignedinteger]
    low: int
    """Counters changed since the last write: [low, high), empty when low >= high."""
    high: int = 0
    new: bool = False
    """Whether the table on disk has no entry for it yet."""

    def changed(self, first: int, end: int) -> None:
        self.low = min(self.low, first)
        self.high = max(self.high, end)


class Refcounts:
    """The refcounts of one image. Cluster numbers are host offsets divided by the cluster size."""

    def __init__(
        self, storage: Storage, *, cluster_bits: int, order: int, table_offset: HostOffset, table_clusters: int
    ) -> None:
        """Reads the table. Raises CorruptImage for an invalid table."""
        self._storage = storage
        self._cluster_bits = cluster_bits
        self._cluster = 1 << cluster_bits
        self._widths = Widths(order)
        self.per_block: Final = (self._cluster * 8) >> order
        """Number of clusters of a block."""
        self.maximum: Final = self._widths.maximum
        self.table_offset = table_offset
        self._blocks: OrderedDict[int, _Block] = OrderedDict()
        self._dirty: set[int] = set()
        self._table_low, self._table_high = 1 << 62, 0
        self.table_moved = False
        """Whether the header on disk has another offset for the table."""
        self.logs = False
        """Whether `unlogged_blocks` and `unlogged_table` are called."""
        self._unlogged: dict[int, tuple[int, int]] = {}
        self._unlogged_table = (1 << 62, 0)
        self.before_change: Callable[[int, int], None] | None = None
        """Called with (number, host cluster) of a block that is about to be changed; may raise CorruptImage."""
        size = table_clusters << cluster_bits
        if not 0 < size <= max(TABLE_LIMIT, self._cluster):
            raise self._corrupt(
                f"refcount table of {table_clusters} clusters; 1 to {max(TABLE_LIMIT, self._cluster) >> cluster_bits} "
                "can be"
            )
        if table_offset % self._cluster or table_offset == 0 or table_offset + size > _whole(storage, self._cluster):
            raise self._corrupt(
                f"refcount table of {size} bytes at {table_offset:#x}; it must begin at a multiple of "
                f"{self._cluster:#x} that is not 0, and end within the file ({storage.size():#x})"
            )
        self.table: NDArray[np.uint64] = np.frombuffer(storage.read(table_offset, size), ">u8").astype(np.uint64)
        """Host offsets of blocks, 0 for none."""
        if (wrong := np.flatnonzero(self.table & np.uint64(_RESERVED))).size:
            number = int(wrong[0])
            raise self._corrupt(
                f"refcount table: entry {number} is {int(self.table[number]):#x}, with reserved bits set"
            )

    @classmethod
    def of(cls, image: Image) -> Self:
        """Reads the refcounts of an image. Raises CorruptImage, OSError."""
        return cls(
            image.storage,
            cluster_bits=image.geometry.cluster_bits,
            order=image.header.refcount_order,
            table_offset=image.header.refcount_table_offset,
            table_clusters=image.header.refcount_table_clusters,
        )

    @property
    def table_clusters(self) -> int:
        """Number of clusters of the table."""
        return self.table.size * _ENTRY >> self._cluster_bits

    @property
    def dirty(self) -> bool:
        """Whether there are changes that the file does not have."""
        return bool(self._dirty) or self.table_changed

    @property
    def held(self) -> int:
        """Bytes of memory of blocks that must be written."""
        return len(self._dirty) * self.block_memory

    @property
    def block_memory(self) -> int:
        """Bytes of memory of a block."""
        return self.per_block * self._widths.native.itemsize

    @property
    def table_changed(self) -> bool:
        """Whether the table itself must be written."""
        return self.table_moved or self._table_low < self._table_high

    def get(self, first: int, count: int) -> NDArray[np.uint64]:
        """Refcounts of `count` clusters from `first` on."""
        found = np.zeros(count, np.uint64)
        for index, start, end, at in self._pieces(first, count):
            if block := self._load(index):
                found[at : at + end - start] = block.counts[start:end]
        return found

    def unused(self, clusters: NDArray[np.uint64], most: int) -> NDArray[np.bool_]:
        """Which of the clusters have refcount 0, according to at most `most` blocks; clusters of other blocks count as
        used.
        """
        low, high = int(clusters.min()) // self.per_block, int(clusters.max()) // self.per_block
        if low == high:  # the most frequent case
            return self._unused(low, clusters)
        found = np.zeros(clusters.size, np.bool_)
        indices = clusters // np.uint64(self.per_block)
        for index in np.unique(indices)[:most].tolist():
            inside = indices == np.uint64(index)
            found[inside] = self._unused(index, clusters[inside])
        return found

    def _unused(self, index: int, clusters: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """`unused` for clusters of one block."""
        block = self._load(index)
        if block is None:
            return np.ones(clusters.size, np.bool_)
        within = clusters.astype(np.int64) - index * self.per_block
        unused: NDArray[np.bool_] = block.counts[within] == 0
        return unused

    def set(self, first: int, count: int, value: int) -> None:
        """Sets one refcount for a run. Blocks must exist for all of it."""
        index, start = divmod(first, self.per_block)
        if start + count <= self.per_block:  # the most frequent case
            self._set_in_block(index, start, start + count, value)
            return
        for index, start, end, _ in self._pieces(first, count):
            self._set_in_block(index, start, end, value)

    def _set_in_block(self, index: int, start: int, end: int, value: int) -> None:
        block = self._described(index)
        block.counts[start:end] = value
        self._touch(index, block, start, end)

    def put(self, index: int, counts: NDArray[np.uint64]) -> int:
        """Sets the refcounts of the first clusters of one block. Returns the number of changed ones."""
        block = self._described(index)
        if counts.size and int(counts.max()) > self.maximum:
            raise self._corrupt(f"a cluster is referred to {int(counts.max())} times, and counts end at {self.maximum}")
        others = np.flatnonzero(block.counts[: counts.size] != counts)
        if others.size:
            block.counts[others] = counts[others].astype(self._widths.native)
            self._touch(index, block, int(others[0]), int(others[-1]) + 1)
        return others.size

    def add(self, clusters: NDArray[np.uint64], change: int) -> NDArray[np.uint64]:
        """Adds `change` (1 or -1) to the refcount of each cluster, as often as it is named. Returns, sorted, those with
        refcount 0 now. Raises CorruptImage if a refcount would leave its range; then nothing has changed.
        """
        named, times = np.unique(clusters, return_counts=True)
        indices = named // np.uint64(self.per_block)
        cuts = [0, *(np.flatnonzero(np.diff(indices)) + 1).tolist(), named.size] if named.size else []
        planned: list[tuple[int, _Block, NDArray[np.int64], NDArray[np.uint64]]] = []
        for low, high in itertools.pairwise(cuts):
            index = int(indices[low])
            within = (named[low:high] % np.uint64(self.per_block)).astype(np.int64)
            block = self._described(index)
            before = block.counts[within].astype(np.uint64)
            steps = times[low:high].astype(np.uint64)
            wrong = before < steps if change < 0 else np.uint64(self.maximum) - before < steps
            if wrong.any():
                cluster = int(named[low:high][wrong][0])
                raise self._corrupt(
                    f"refcount of the cluster at {cluster << self._cluster_bits:#x} is"
                    f" {int(before[wrong][0])} and would leave its range"
                )
            planned.append((index, block, within, before - steps if change < 0 else before + steps))
        freed = []
        for index, block, within, after in planned:
            block.counts[within] = after.astype(self._widths.native)
            self._touch(index, block, int(within[0]), int(within[-1]) + 1)
            freed.append(within[after == 0].astype(np.uint64) + np.uint64(index * self.per_block))
        return np.concatenate(freed) if freed else np.zeros(0, np.uint64)

    def lower(self, clusters: NDArray[np.uint64]) -> None:
        """Subtracts 1 from the refcount of each cluster, as often as it is named, but not below 0."""
        named, times = np.unique(clusters, return_counts=True)
        indices = named // np.uint64(self.per_block)
        for index in np.unique(indices).tolist():
            if (block := self._load(index)) is None:
                continue
            inside = indices == np.uint64(index)
            within = (named[inside] % np.uint64(self.per_block)).astype(np.int64)
            steps = times[inside].astype(np.uint64)
            enough = block.counts[within] >= steps
            if enough.any():
                block, within = self._described(index), within[enough]
                block.counts[within] -= steps[enough].astype(self._widths.native)
                self._touch(index, block, int(within[0]), int(within[-1]) + 1)

    def free_run(self, start: int, most: int) -> tuple[int, int]:
        """The first free cluster from `start` on, and the number of contiguous free ones: up to `most`, and within one
        block. There always is one, because all clusters past the last block are free.
        """
        index, within = divmod(start, self.per_block)
        while block := self._load(index):
            free = block.counts[within:] == 0
            first = int(free.argmax())
            if free[first]:
                used = ~free[first : first + most]
                count = int(used.argmax()) if used.any() else used.size
                return index * self.per_block + within + first, count
            index, within = index + 1, 0
        return index * self.per_block + within, min(most, self.per_block - within)

    def described(self, cluster: int) -> bool:
        """Whether a block has a counter for the cluster."""
        index = cluster // self.per_block
        return index < self.table.size and bool(self.table[index])

    def block_of(self, cluster: int) -> int:
        """Offset of the block with the cluster's counter, which must exist (bytes)."""
        return int(self.table[cluster // self.per_block])

    def entry_of(self, cluster: int) -> int:
        """Offset of the entry of its block in the table, if the table is large enough (bytes)."""
        return self.table_offset + cluster // self.per_block * _ENTRY

    def describe(self, cluster: int) -> int:
        """Makes the block for `cluster`, which has none, and a larger table if needed. They are stored at `cluster` and
        the clusters after it, all of which must be free. Returns the number of clusters used.
        """
        index = cluster // self.per_block
        if index < self.table.size:
            self._make_block(index, cluster)
            return 1
        blocks, tables = self._larger(cluster)
        self._move_table(cluster + blocks, tables)
        for number in range(blocks):
            self._make_block(index + number, cluster + number, counted=False)
        self.set(cluster, blocks + tables, 1)
        return blocks + tables

    def add_block(self, index: int, cluster: int) -> None:
        """Makes the block of that number, for which the table has an entry, at a cluster that already has a
        refcount.
        """
        self._make_block(index, cluster, counted=False)

    def full(self, index: int, count: int) -> bool:
        """Whether the first `count` clusters of a block all have refcounts above 0."""
        block = self._load(index)
        return block is not None and bool(block.counts[:count].all())

    def describing(self, cluster: int) -> int:
        """Number of clusters that `describe` would use."""
        return 1 if cluster // self.per_block < self.table.size else sum(self._larger(cluster))

    def write_blocks(self) -> None:
        """Writes the changed sectors of changed blocks; new blocks as a whole."""
        for index in sorted(self._dirty):
            block = self._blocks[index]
            in_sector = _SECTOR * 8 // self._widths.bits
            low = 0 if block.new else block.low // in_sector * in_sector
            high = block.counts.size if block.new else -(-block.high // in_sector) * in_sector
            offset = int(self.table[index]) + low * self._widths.bits // 8
            self._storage.write(HostOffset(offset), self._widths.encode(block.counts[low:high]))

    def unlogged_blocks(self) -> Iterator[tuple[int, bytes]]:
        """(offset in the file, bytes) of refcounts that were changed since the last call."""
        in_byte = max(1, 8 // self._widths.bits)
        for index, (first, end) in self._unlogged.items():
            low, high = first // in_byte * in_byte, -(-end // in_byte) * in_byte
            counts = self._blocks[index].counts[low:high]
            yield int(self.table[index]) + low * self._widths.bits // 8, self._widths.encode(counts)
        self._unlogged.clear()

    def unlogged_table(self) -> tuple[int, bytes] | None:
        """Offset in the file and bytes of entries of the table that were changed since the last call."""
        low, high = self._unlogged_table
        self._unlogged_table = 1 << 62, 0
        if low >= high:
            return None
        return self.table_offset + low * _ENTRY, self.table[low:high].astype(">u8").tobytes()

    def write_table(self) -> None:
        """Writes the entries of new blocks, which must be durable; the whole table if it has moved."""
        low, high = (0, self.table.size) if self.table_moved else (self._table_low, self._table_high)
        if low < high:
            entries = self.table[low:high].astype(">u8").tobytes()
            self._storage.write(HostOffset(self.table_offset + low * _ENTRY), entries)

    def written(self) -> None:
        """Called when the writes of `write_blocks` and `write_table` are durable and the header names the table."""
        self._table_low, self._table_high = 1 << 62, 0
        self.table_moved = False
        self.blocks_written()

    def blocks_written(self) -> None:
        """Called when the writes of `write_blocks` need not be repeated."""
        for index in self._dirty:
            block = self._blocks[index]
            block.low, block.high, block.new = block.counts.size, 0, False
        self._dirty.clear()
        self._trim()

    def block_clusters(self) -> NDArray[np.uint64]:
        """Cluster numbers of all blocks."""
        found: NDArray[np.uint64] = self.table[self.table != 0] >> np.uint64(self._cluster_bits)
        return found

    def last_used(self) -> int:
        """The highest cluster with a refcount above 0, -1 for none."""
        for index in np.flatnonzero(self.table)[::-1].tolist():
            block = self._load(index)
            if block is not None and (used := np.flatnonzero(block.counts)).size:
                return int(index * self.per_block + used[-1])
        return -1

    def counts_past(self, cluster: int) -> bool:
        """Whether any cluster from this one on has a refcount above 0."""
        index, within = divmod(cluster, self.per_block)
        blocks = self.table[index:]
        for number in np.unique(blocks, return_index=True)[1].tolist():  # a block may occur repeatedly
            block = self._load(index + number)
            if block is not None and block.counts[0 if number else within :].any():
                return True
        return False

    # below: blocks

    def _pieces(self, first: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """(block, from, to, index in the run) for the blocks of a run."""
        at = 0
        while at < count:
            index, start = divmod(first + at, self.per_block)
            end = min(self.per_block, start + count - at)
            yield index, start, end, at
            at += end - start

    def _load(self, index: int) -> _Block | None:
        block = self._blocks.get(index)
        if block is not None:
            self._blocks.move_to_end(index)
            return block
        offset = int(self.table[index]) if index < self.table.size else 0
        if not offset:
            return None
        if offset % self._cluster or offset + self._cluster > _whole(self._storage, self._cluster):
            raise self._corrupt(
                f"refcount block {index} at {offset:#x}; it must begin at a multiple of {self._cluster:#x} within the "
                f"file ({self._storage.size():#x})"
            )
        counts = self._widths.decode(self._storage.read(HostOffset(offset), self._cluster))
        block = self._blocks[index] = _Block(counts, counts.size)
        self._trim()
        return block

    def _described(self, index: int) -> _Block:
        block = self._load(index)
        if block is None:
            raise self._corrupt(f"no refcount block describes cluster {index * self.per_block}, which is in use")
        if self.before_change and index not in self._dirty:
            self.before_change(index, int(self.table[index]) >> self._cluster_bits)
        return block

    def _touch(self, index: int, block: _Block, start: int, end: int) -> None:
        block.changed(start, end)
        self._blocks[index] = block  # it may have been dropped since it was loaded
        self._dirty.add(index)
        if self.logs:
            low, high = self._unlogged.get(index, (start, end))
            self._unlogged[index] = min(low, start), max(high, end)

    def _make_block(self, index: int, cluster: int, *, counted: bool = True) -> None:
        counts = np.zeros(self.per_block, self._widths.native)
        self._blocks[index] = _Block(counts, counts.size, new=True)
        self._dirty.add(index)
        self.table[index] = cluster << self._cluster_bits
        if self.logs:
            self._unlogged[index] = 0, self.per_block
        self._table_low = min(self._table_low, index)
        self._table_high = max(self._table_high, index + 1)
        low, high = self._unlogged_table
        self._unlogged_table = min(low, index), max(high, index + 1)
        if counted:
            self.set(cluster, 1, 1)

    def _larger(self, cluster: int) -> tuple[int, int]:
        """(blocks, table clusters) needed to describe `cluster` and their own clusters."""
        index, blocks, tables = cluster // self.per_block, 1, 1
        while True:
            last = (cluster + blocks + tables - 1) // self.per_block
            wanted = (last - index + 1, self._table_for(last))
            if wanted == (blocks, tables):
                return wanted
            blocks, tables = max(blocks, wanted[0]), max(tables, wanted[1])

    def _table_for(self, last: int) -> int:
        """Number of clusters for a table that includes block `last`, with spare entries if possible."""
        entries = max(last + 1, self.table.size * 3 // 2)
        clusters = -(-entries * _ENTRY // self._cluster)
        if clusters << self._cluster_bits > TABLE_LIMIT and last + 1 <= TABLE_LIMIT // _ENTRY:
            clusters = max(TABLE_LIMIT >> self._cluster_bits, 1)
        if clusters << self._cluster_bits > max(TABLE_LIMIT, self._cluster):
            raise ResourceError(
                "the image's refcount table has reached 8 MiB, its limit",
                errno=errno.EFBIG,
                cure="convert the image to larger clusters or narrower refcounts (qemu-img convert)",
            )
        return clusters

    def _move_table(self, cluster: int, clusters: int) -> None:
        """Moves the table to another location with the given size."""
        table = np.zeros((clusters << self._cluster_bits) // _ENTRY, np.uint64)
        table[: self.table.size] = self.table
        self.table = table
        self.table_offset = HostOffset(cluster << self._cluster_bits)
        self.table_moved = True
        self._unlogged_table = 0, table.size

    def _trim(self) -> None:
        """Drops the least recently used clean blocks, down to the limit."""
        excess = len(self._blocks) - max(4, _CACHE_LIMIT // self.block_memory)
        if excess > 0:
            for index in [index for index in self._blocks if index not in self._dirty][:excess]:
                del self._blocks[index]

    def _corrupt(self, what: str) -> CorruptImage:
        return CorruptImage(what, path=self._storage.path)


def _whole(storage: Storage, cluster: int) -> int:
    """Size of the file in clusters, rounded up: the last one may be incomplete."""
    return -(-storage.size() // cluster) * cluster
