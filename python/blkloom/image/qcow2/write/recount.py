"""Recount: counts the references to each host cluster and corrects the refcounts, in steps, while the image is in use.

It counts the clusters before the end of the file as it was opened. Clusters that are allocated during the recount are
past that end (see allocation.py), so references to counted clusters can only be removed. One *window* of clusters is
counted at a time, from all tables. Active L2 tables are read as they are in memory; `released`, `moved` and `settled`
correct the counts if requests change tables during the recount. L2 tables of snapshots do not change. At the end of a
window, its counts are stored as refcounts, in new refcount blocks where there were none. Then each refcount is exact,
and clusters leaked by a crash are free again.

The image is inconsistent if it was closed and a cluster with references has refcount 0, or if a table of any image
refers past the end of the file. One thread (the mapper's), a few milliseconds per step. May fail: CorruptImage,
ResourceError (too large for a recount), OSError.

Source: QEMU docs/interop/qcow2, "Dirty bit".
"""

from __future__ import annotations

import errno
import itertools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from blkloom.errors import ResourceError
from blkloom.image.qcow2.format.geometry import L1Index
from blkloom.image.qcow2.format.tables import OFFSET_WORD, Layout, decode, host_clusters
from blkloom.image.types import HostOffset, Words

if TYPE_CHECKING:
    from blkloom.image.qcow2.format.snapshots import Snapshot
    from blkloom.image.qcow2.state.image import Image
    from blkloom.image.qcow2.state.l2_checks import L2Checks
    from blkloom.image.qcow2.state.overlap_check import OverlapCheck
    from blkloom.image.qcow2.state.refcounts import Refcounts
    from blkloom.image.qcow2.write.allocation import Allocator
    from blkloom.image.qcow2.write.flush import WriteBack

_log = logging.getLogger(__name__)

_STEP: Final = 256 << 10
"""Bytes of tables, or of counts, per step."""
_WINDOW: Final = 1 << 23
"""Clusters counted at a time, with 8 bytes for each."""
_MOST_WINDOWS: Final = 64
_L1_LIMIT: Final = 256 << 20
_HELD: Final = 64 << 20
"""Maximum bytes of unwritten counts and of new blocks."""


class Recount:
    """The recount of one image. allocator: allocates refcount blocks, and gives the end of the counted clusters."""

    def __init__(
        self,
        image: Image,
        refcounts: Refcounts,
        overlaps: OverlapCheck,
        l2_checks: L2Checks,
        snapshots: list[Snapshot],
        allocator: Allocator,
    ) -> None:
        self._image = image
        self._refcounts = refcounts
        self._overlaps = overlaps
        self._l2_checks = l2_checks
        self._snapshots = snapshots
        self._allocator = allocator
        self._file_end: Final = allocator.file_end
        self._layout: Final = Layout(image.geometry, image.header.version, image.header.has_data_file)
        self._bits: Final = image.geometry.cluster_bits
        self._low = 0
        self._counts = np.zeros(0, np.uint64)
        """References to clusters from `_low` on."""
        self._next = 0
        """The first cluster past the window that has a reference."""
        self._counted = np.zeros(image.l1.size, np.bool_)
        """L2 tables of the active disk whose references are in `_counts`."""
        self._done = 0
        """Clusters below this one have exact refcounts."""
        self._read = 0
        self.changed = 0
        """Number of clusters whose refcount was wrong."""

    @property
    def _end(self) -> int:
        return self._allocator.end

    def steps(self, write_back: WriteBack) -> Iterator[None]:
        """Runs the recount, one step at a time; at the end all refcounts are on disk."""
        self._done = self.changed = 0
        try:
            yield from self._windows(write_back)
        finally:
            self._low, self._counts = 0, np.zeros(0, np.uint64)
        write_back.write_all()
        if self.changed:
            _log.warning("%s: %d refcounts put right", self._image.path, self.changed)

    def _windows(self, write_back: WriteBack) -> Iterator[None]:
        low = 0
        for _ in range(_MOST_WINDOWS):
            # Settle references that were removed until now, so that the window does not count them.
            write_back.write_all()
            self._allocator.recount = self
            yield from self._count(low)
            yield from self._put(write_back)
            low = self._next_window()
            if low >= self._end:
                return
        raise ResourceError(
            f"the image's file has {self._end} clusters, too many to be counted here",
            errno=errno.EFBIG,
            cure="repair the image with qemu-img check -r all",
        )

    def released(self, clusters: Words, index: L1Index | None) -> None:
        """Records that one reference to each cluster was removed in memory, by L2 table `index` of the active disk,
        None for other metadata. The reference is still on disk, so it counts until it is `settled`, even if its table
        is counted later.
        """
        if index is not None and not self._counted[index]:
            self._add(clusters[~self._exact(clusters)], 1)

    def settling(self, clusters: Words) -> Words:
        """Called when these references are not on disk any more. Returns the clusters whose refcounts must be
        decremented: all, if refcounts are trusted, so that they are right in counted and uncounted windows. Otherwise
        refcounts in uncounted windows are decremented here if possible, so that only refcounts that were wrong before
        are reported as corrected.
        """
        if self._l2_checks.counts_hold:
            return clusters
        exact = self._exact(clusters)
        self._refcounts.lower(clusters[~exact])
        return clusters[exact]

    def settled(self, clusters: Words) -> None:
        """Called when the refcounts have been decremented."""
        waiting = clusters[~self._exact(clusters) & self._inside(clusters)] - np.uint64(self._low)
        np.subtract.at(self._counts, waiting.astype(np.int64), np.uint64(1))

    def moved(self, index: L1Index, entries: Words) -> None:
        """Counts the entries of L2 table `index`, which is about to move and might be missed otherwise."""
        if not self._counted[index]:
            self._counted[index] = True
            self._add(host_clusters(self._layout, entries), 1)

    # below: counting

    def _count(self, low: int) -> Iterator[None]:
        """Counts all references to clusters of the window that begins at `low`."""
        per_block = self._refcounts.per_block
        self._low = low
        self._counts = np.zeros(min(max(_WINDOW // per_block, 1) * per_block, self._end - low), np.uint64)
        self._next = self._end
        self._counted[:] = False
        # Tables that may move are counted in one step.
        for part in self._overlaps.changing():
            self._add(part, 1)
        l1 = self._image.l1 & OFFSET_WORD
        numbers = np.flatnonzero(l1)
        offsets = l1[numbers]
        self._add(offsets >> np.uint64(self._bits), 1)
        yield
        for part in self._overlaps.fixed():
            self._add(part, 1)
            yield
        order = np.argsort(offsets, kind="stable")
        numbers, offsets = numbers[order], offsets[order]
        cuts = [0, *(np.flatnonzero(np.diff(offsets)) + 1).tolist(), numbers.size]
        holes = _Holes(self._image)
        for first, end in itertools.pairwise(cuts if numbers.size else []):
            self._count_active(int(offsets[first]), numbers[first:end], holes)
            if self._is_step():
                yield
        holes = _Holes(self._image)
        offsets, times = np.unique(np.concatenate(self._snapshot_l1s()), return_counts=True)
        self._add(offsets >> np.uint64(self._bits), times.astype(np.uint64))
        for offset, count in zip(offsets.tolist(), times.tolist(), strict=True):
            hosts = host_clusters(self._layout, self._entries(offset, holes))
            if hosts.size and int(hosts.max()) >= self._file_end:
                raise self._past(f"an L2 table of a snapshot, at {offset:#x},", int(hosts.max()))
            self._add(hosts, count)
            if self._is_step():
                yield

    def _count_active(self, offset: int, numbers: NDArray[np.intp], holes: _Holes) -> None:
        """Counts the references of the active L2 tables that were at `offset` when the window began."""
        there = ((self._image.l1[numbers] & OFFSET_WORD) == np.uint64(offset)) & ~self._counted[numbers]
        numbers = numbers[there]
        if not numbers.size:
            return
        index = L1Index(int(numbers[0]))
        table = self._image.cached_l2(index) if numbers.size == 1 else None
        entries = self._entries(offset, holes) if table is None else table.entries
        hosts = host_clusters(self._layout, entries)
        if (missing := self._l2_checks.missing(index, hosts)) is not None:
            raise self._past(f"L2 table {index}", missing)
        if not self._l2_checks.is_met(index):
            self._l2_checks.check(index, offset, entries)
            self._l2_checks.met(index)
        self._counted[numbers] = True
        self._add(hosts, numbers.size)
        self._read += self._image.geometry.cluster

    def _entries(self, offset: int, holes: _Holes) -> Words:
        """Entries of the L2 table at `offset`, from the file."""
        cluster = self._image.geometry.cluster
        if offset % cluster or offset >= self._image.storage.size():
            raise self._image.corrupt(
                f"an L1 entry refers to {offset:#x}: an L2 table begins at a multiple of {cluster:#x} within the file "
                f"({self._image.storage.size():#x})"
            )
        if holes.hold(offset):
            return np.zeros(0, np.uint64)
        self._read += cluster
        words = decode(self._image.storage.read(HostOffset(offset), cluster))
        return words[:: 2 if self._image.geometry.extended else 1]

    def _snapshot_l1s(self) -> list[Words]:
        """Host offsets of the L2 tables of each snapshot."""
        if (length := sum(snapshot.l1_size * 8 for snapshot in self._snapshots)) > _L1_LIMIT:
            raise ResourceError(
                f"L1 tables of {len(self._snapshots)} snapshots take {length} bytes, too many to be counted here",
                errno=errno.EFBIG,
                cure="repair the image with qemu-img check -r all",
            )
        read = self._image.storage.read
        offsets = [decode(read(snapshot.l1_offset, snapshot.l1_size * 8)) & OFFSET_WORD for snapshot in self._snapshots]
        return [np.zeros(0, np.uint64), *(part[part != 0] for part in offsets)]

    def _add(self, clusters: Words, times: Words | int) -> None:
        """Adds references to the counts of the clusters."""
        inside = self._inside(clusters)
        more = np.uint64(times) if isinstance(times, int) else times[inside]
        np.add.at(self._counts, (clusters[inside] - np.uint64(self._low)).astype(np.int64), more)
        if self._low + self._counts.size < self._end and clusters.size:
            behind = clusters[clusters >= np.uint64(self._low + self._counts.size)]
            self._next = min(self._next, int(behind.min())) if behind.size else self._next

    def _inside(self, clusters: Words) -> NDArray[np.bool_]:
        """Which of the clusters are in the window."""
        found: NDArray[np.bool_] = clusters >= np.uint64(self._low)
        return found & (clusters < np.uint64(self._low + self._counts.size))

    def _exact(self, clusters: Words) -> NDArray[np.bool_]:
        """Which of the clusters have exact refcounts."""
        found: NDArray[np.bool_] = clusters >= np.uint64(self._end)
        return found | (clusters < np.uint64(self._done))

    def _is_step(self) -> bool:
        if self._read < _STEP:
            return False
        self._read = 0
        return True

    # below: putting counts right

    def _put(self, write_back: WriteBack) -> Iterator[None]:
        """Stores the counts of the window as refcounts, block by block."""
        refcounts, per_block = self._refcounts, self._refcounts.per_block
        for first in range(self._low, self._low + self._counts.size, per_block):
            index = first // per_block
            wanted = self._counts[first - self._low : first - self._low + per_block]
            self._compare(first, wanted)
            if not refcounts.described(first) and wanted.any():
                self._describe(index)
            if refcounts.described(first):
                self.changed += refcounts.put(index, wanted)
            self._done = first + wanted.size
            if refcounts.held > _HELD:
                write_back.write_refcounts()
            self._read += refcounts.block_memory
            if self._is_step():
                yield

    def _describe(self, index: int) -> None:
        """Makes a missing block. Refcounts are not trusted in this case, see `_compare`; so this does not call the
        allocator while the allocator waits for the end of the recount (`BackgroundCheck.finish`).
        """
        run = self._allocator.take_table()
        if self._refcounts.described(index * self._refcounts.per_block):  # it was made for that cluster
            self._allocator.take_back(run)
        else:
            self._refcounts.add_block(index, run.first)

    def _compare(self, first: int, wanted: Words) -> None:
        """Checks that clusters from `first` on with references have refcounts above 0."""
        if self._l2_checks.counts_hold:
            wrong = (self._refcounts.get(first, wanted.size) == 0) & (wanted != 0)
            if wrong.any():
                cluster = first + int(wrong.argmax())
                raise self._image.corrupt(
                    f"the cluster at {cluster << self._bits:#x} is in use, and free by its refcount"
                )

    def _next_window(self) -> int:
        """The next block after the window with any reference or refcount."""
        per_block = self._refcounts.per_block
        index = -(-(self._low + self._counts.size) // per_block)
        described = np.flatnonzero(self._refcounts.table[index:])
        block = (index + int(described[0])) * per_block if described.size else self._end
        return min(self._next // per_block * per_block if self._next < self._end else self._end, block)

    def _past(self, what: str, cluster: int) -> Exception:
        return self._image.corrupt(
            f"{what} refers to {cluster << self._bits:#x}, past the end of the file, which was cut short"
        )


class _Holes:
    """Which tables, queried in ascending order, are in holes of the file: they have no references."""

    def __init__(self, image: Image) -> None:
        self._storage = image.storage
        self._cluster = image.geometry.cluster
        self._size = image.storage.size()
        self._data = 0
        """The file has a hole between the last queried table and this offset."""

    def hold(self, offset: int) -> bool:
        """Whether the table at `offset` is in a hole."""
        if offset >= self._data:
            runs = self._storage.data_runs(HostOffset(offset), max(self._size - offset, 0))
            self._data = next(runs, (self._size, self._size))[0]
        return offset + self._cluster <= self._data
