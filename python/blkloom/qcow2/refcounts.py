"""Reference counts of host clusters: a table of blocks, each one cluster of counters of 1 to 64 bits.

Counts are changed in memory, a block as one NumPy array of native counters, and written by `write_blocks` and
`write_table` when flush.py says so, again and again until `written`. Invariants: a block in the cache is what the file
will hold after the next write; changed blocks are never dropped; a count never leaves 0 .. `maximum`. Free is what
counts 0, and so is what no block describes yet: `describe` makes blocks (and a larger table) for clusters past that.
One thread (the mapper's). May fail: CorruptImage for what the file says, OSError of the storage.

Source: QEMU docs/interop/qcow2, "Host cluster management".
"""

from __future__ import annotations

import errno
import itertools
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from blkloom.errors import ResourceError
from blkloom.qcow2.errors import CorruptImage
from blkloom.qcow2.types import HostOffset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from blkloom.qcow2.storage import Storage

TABLE_LIMIT: Final = 8 << 20
"""Bytes a table may take; QEMU's own limit."""

_CACHE_LIMIT: Final = 16 << 20
_SECTOR: Final = 512
_ENTRY: Final = 8
_RESERVED: Final = 0x1FF


class Widths:
    """How counters of `1 << order` bits lie in a block. Sub-byte counters begin at the least significant bit."""

    def __init__(self, order: int) -> None:
        self.bits: Final = 1 << order
        self.maximum: Final = (1 << self.bits) - 1
        size = max(1, self.bits // 8)
        self._wire = np.dtype(f">u{size}")
        self.native: Final = np.dtype(f"=u{size}")
        self._shifts = np.arange(0, 8, self.bits, dtype=np.uint8) if self.bits < 8 else None

    def decode(self, raw: bytes) -> NDArray[np.unsignedinteger]:
        """One counter an element."""
        if self._shifts is None:
            return np.frombuffer(raw, self._wire).astype(self.native)
        packed = np.frombuffer(raw, np.uint8)[:, None]
        counts: NDArray[np.uint8] = (packed >> self._shifts & np.uint8(self.maximum)).reshape(-1)
        return counts

    def encode(self, counts: NDArray[np.unsignedinteger]) -> bytes:
        """The bytes of whole bytes' worth of counters."""
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
    """The table on disk does not know it yet."""

    def changed(self, first: int, end: int) -> None:
        self.low = min(self.low, first)
        self.high = max(self.high, end)


class Refcounts:
    """The counts of one image. Cluster numbers are host offsets divided by the cluster size."""

    def __init__(
        self, storage: Storage, *, cluster_bits: int, order: int, table_offset: HostOffset, table_clusters: int
    ) -> None:
        """Reads the table. Raises CorruptImage for a table that cannot be."""
        self._storage = storage
        self._cluster_bits = cluster_bits
        self._cluster = 1 << cluster_bits
        self._widths = Widths(order)
        self.per_block: Final = (self._cluster * 8) >> order
        """Clusters a block describes."""
        self.maximum: Final = self._widths.maximum
        self.table_offset = table_offset
        self._blocks: OrderedDict[int, _Block] = OrderedDict()
        self._dirty: set[int] = set()
        self._table_low, self._table_high = 1 << 62, 0
        self.table_moved = False
        """The table lies elsewhere than the header on disk says."""
        self.before_change: Callable[[int, int], None] | None = None
        """Called with (number, host cluster) of a block that is about to be changed; may raise CorruptImage."""
        size = table_clusters << cluster_bits
        if not 0 < size <= max(TABLE_LIMIT, self._cluster):
            raise self._corrupt(f"refcount table of {table_clusters} clusters")
        if table_offset % self._cluster or table_offset == 0 or table_offset + size > _whole(storage, self._cluster):
            raise self._corrupt(f"refcount table at {table_offset:#x}")
        self.table: NDArray[np.uint64] = np.frombuffer(storage.read(table_offset, size), ">u8").astype(np.uint64)
        """Host offsets of blocks, 0 for none."""
        if np.any(self.table & np.uint64(_RESERVED)):
            raise self._corrupt("refcount table entry with reserved bits set")

    @property
    def table_clusters(self) -> int:
        """How many clusters the table takes."""
        return self.table.size * _ENTRY >> self._cluster_bits

    @property
    def dirty(self) -> bool:
        """Whether the file lacks something."""
        return bool(self._dirty) or self.table_changed

    @property
    def held(self) -> int:
        """Bytes of memory that blocks take which must be written."""
        return len(self._dirty) * self.block_memory

    @property
    def block_memory(self) -> int:
        """Bytes of memory that a block takes."""
        return self.per_block * self._widths.native.itemsize

    @property
    def table_changed(self) -> bool:
        """Whether the table itself must be written."""
        return self.table_moved or self._table_low < self._table_high

    def get(self, first: int, count: int) -> NDArray[np.uint64]:
        """Counts of `count` clusters from `first` on."""
        found = np.zeros(count, np.uint64)
        for index, start, end, at in self._pieces(first, count):
            if block := self._load(index):
                found[at : at + end - start] = block.counts[start:end]
        return found

    def unused(self, clusters: NDArray[np.uint64], most: int) -> NDArray[np.bool_]:
        """Which of the clusters count 0, as far as `most` blocks tell; those of other blocks are taken to be in use."""
        low, high = int(clusters.min()) // self.per_block, int(clusters.max()) // self.per_block
        if low == high:  # nearly always
            return self._unused(low, clusters)
        found = np.zeros(clusters.size, np.bool_)
        indices = clusters // np.uint64(self.per_block)
        for index in np.unique(indices)[:most].tolist():
            inside = indices == np.uint64(index)
            found[inside] = self._unused(index, clusters[inside])
        return found

    def _unused(self, index: int, clusters: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Of clusters of one block."""
        block = self._load(index)
        if block is None:
            return np.ones(clusters.size, np.bool_)
        within = clusters.astype(np.int64) - index * self.per_block
        unused: NDArray[np.bool_] = block.counts[within] == 0
        return unused

    def set(self, first: int, count: int, value: int) -> None:
        """Gives a run one count. All of it must be described."""
        index, start = divmod(first, self.per_block)
        if start + count <= self.per_block:  # nearly always
            self._set_in_block(index, start, start + count, value)
            return
        for index, start, end, _ in self._pieces(first, count):
            self._set_in_block(index, start, end, value)

    def _set_in_block(self, index: int, start: int, end: int, value: int) -> None:
        block = self._described(index)
        block.counts[start:end] = value
        self._touch(index, block, start, end)

    def put(self, index: int, counts: NDArray[np.uint64]) -> int:
        """Gives the first clusters that one block describes these counts. Returns how many had others."""
        block = self._described(index)
        if counts.size and int(counts.max()) > self.maximum:
            raise self._corrupt(f"a cluster is referred to {int(counts.max())} times, and counts end at {self.maximum}")
        others = np.flatnonzero(block.counts[: counts.size] != counts)
        if others.size:
            block.counts[others] = counts[others].astype(self._widths.native)
            self._touch(index, block, int(others[0]), int(others[-1]) + 1)
        return others.size

    def add(self, clusters: NDArray[np.uint64], change: int) -> NDArray[np.uint64]:
        """Adds `change` (1 or -1) to each cluster's count, as often as it is named. Returns, sorted, those that
        count 0 now. Raises CorruptImage when a count would leave its range; then nothing has changed.
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
        """Takes 1 from each cluster's count, as often as it is named, where there is as much to be taken."""
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
        """The first free cluster from `start` on, and how many follow it without a break: up to `most`, and
        never past what its block describes. There always is one: past the last block all is free.
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
        """Whether a block has a counter for it."""
        index = cluster // self.per_block
        return index < self.table.size and bool(self.table[index])

    def block_of(self, cluster: int) -> int:
        """Where the block is that counts it, which there is (bytes)."""
        return int(self.table[cluster // self.per_block])

    def entry_of(self, cluster: int) -> int:
        """Where the table has its block's entry, if it is large enough (bytes)."""
        return self.table_offset + cluster // self.per_block * _ENTRY

    def describe(self, cluster: int) -> int:
        """Makes the block for `cluster`, a cluster that no block describes, and if need be a larger table. They
        lie at `cluster` and what follows it, all of which must be free. Returns how many clusters that took.
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
        """Makes the block of that number, which the table has room for, at a cluster that is counted already."""
        self._make_block(index, cluster, counted=False)

    def full(self, index: int, count: int) -> bool:
        """Whether the first `count` clusters that a block describes all count more than 0."""
        block = self._load(index)
        return block is not None and bool(block.counts[:count].all())

    def describing(self, cluster: int) -> int:
        """How many clusters `describe` would take."""
        return 1 if cluster // self.per_block < self.table.size else sum(self._larger(cluster))

    def write_blocks(self) -> None:
        """Changed blocks, as far as they changed (whole sectors); new ones whole."""
        for index in sorted(self._dirty):
            block = self._blocks[index]
            in_sector = _SECTOR * 8 // self._widths.bits
            low = 0 if block.new else block.low // in_sector * in_sector
            high = block.counts.size if block.new else -(-block.high // in_sector) * in_sector
            offset = int(self.table[index]) + low * self._widths.bits // 8
            self._storage.write(HostOffset(offset), self._widths.encode(block.counts[low:high]))

    def write_table(self) -> None:
        """Entries of new blocks, which must be durable; all of it where it moved."""
        low, high = (0, self.table.size) if self.table_moved else (self._table_low, self._table_high)
        if low < high:
            entries = self.table[low:high].astype(">u8").tobytes()
            self._storage.write(HostOffset(self.table_offset + low * _ENTRY), entries)

    def written(self) -> None:
        """What `write_blocks` and `write_table` wrote is durable, and the header names the table."""
        self._table_low, self._table_high = 1 << 62, 0
        self.table_moved = False
        self.blocks_written()

    def blocks_written(self) -> None:
        """What `write_blocks` wrote need not be written again."""
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
        """The highest cluster that counts more than 0, -1 for none."""
        for index in np.flatnonzero(self.table)[::-1].tolist():
            block = self._load(index)
            if block is not None and (used := np.flatnonzero(block.counts)).size:
                return int(index * self.per_block + used[-1])
        return -1

    def counts_past(self, cluster: int) -> bool:
        """Whether any cluster from this one on counts more than 0."""
        index, within = divmod(cluster, self.per_block)
        blocks = self.table[index:]
        for number in np.unique(blocks, return_index=True)[1].tolist():  # a block may be named again and again
            block = self._load(index + number)
            if block is not None and block.counts[0 if number else within :].any():
                return True
        return False

    def forget(self) -> None:
        """Drops what is cached, written or not: the image is about to change under us."""
        self._blocks.clear()
        self._dirty.clear()

    # below: blocks

    def _pieces(self, first: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """(block, from, to, place in the run) for the blocks a run touches."""
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
            raise self._corrupt(f"refcount block {index} at {offset:#x}")
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

    def _make_block(self, index: int, cluster: int, *, counted: bool = True) -> None:
        counts = np.zeros(self.per_block, self._widths.native)
        self._blocks[index] = _Block(counts, counts.size, new=True)
        self._dirty.add(index)
        self.table[index] = cluster << self._cluster_bits
        self._table_low = min(self._table_low, index)
        self._table_high = max(self._table_high, index + 1)
        if counted:
            self.set(cluster, 1, 1)

    def _larger(self, cluster: int) -> tuple[int, int]:
        """(blocks, table clusters) that make `cluster` and what they take themselves described."""
        index, blocks, tables = cluster // self.per_block, 1, 1
        while True:
            last = (cluster + blocks + tables - 1) // self.per_block
            wanted = (last - index + 1, self._table_for(last))
            if wanted == (blocks, tables):
                return wanted
            blocks, tables = max(blocks, wanted[0]), max(tables, wanted[1])

    def _table_for(self, last: int) -> int:
        """Clusters of a table that names block `last`, and has room for more if it can."""
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
        """To another place, where it is so long."""
        table = np.zeros((clusters << self._cluster_bits) // _ENTRY, np.uint64)
        table[: self.table.size] = self.table
        self.table = table
        self.table_offset = HostOffset(cluster << self._cluster_bits)
        self.table_moved = True

    def _trim(self) -> None:
        """Drops the blocks used longest ago that need no writing, down to the limit."""
        excess = len(self._blocks) - max(4, _CACHE_LIMIT // self.block_memory)
        if excess > 0:
            for index in [index for index in self._blocks if index not in self._dirty][:excess]:
                del self._blocks[index]

    def _corrupt(self, what: str) -> CorruptImage:
        return CorruptImage(what, path=self._storage.path)


def _whole(storage: Storage, cluster: int) -> int:
    """The file's size in whole clusters, rounded up: the last one may be cut short."""
    return -(-storage.size() // cluster) * cluster
