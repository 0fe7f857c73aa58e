"""The allocator of host clusters: which clusters of an image file are free.

A cluster that is allocated has the refcount 1 in memory at once. A cluster that is freed (`give_back`) keeps its
refcount until `settle`. flush.py calls `settle` when no table on disk refers to the cluster and no request in flight
reads it. So nothing refers to a cluster whose refcount in memory is 0, neither now nor after a crash, and it may be
allocated again.

The allocator does not use free clusters inside the file before all tables have been checked (see `trust`). Until then
the file grows. It does not grow over clusters that a table refers to: a file that was cut short would show zeros in
place of the missing data.

Free clusters are searched from the lowest number up, one *run* at a time. Each run is checked once (no metadata lies
in it, whatever the refcounts say) and made to read as zeros once (it is past the old end of the file, or a hole is
punched). Its clusters are then allocated one by one. One thread (the mapper's). May fail: CorruptImage, OSError of the
storage (ENOSPC).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import numpy as np
from numpy.typing import NDArray

from blkloom.errors import BackingError
from blkloom.image.errors import CorruptImage
from blkloom.image.qcow2.format.geometry import L1Index
from blkloom.image.storage import NO_ROOM
from blkloom.image.types import HostOffset

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blkloom.image.format import WriteContext
    from blkloom.image.qcow2.state.image import Image
    from blkloom.image.qcow2.state.overlap_check import OverlapCheck
    from blkloom.image.qcow2.state.refcounts import Refcounts
    from blkloom.image.qcow2.write.recount import Recount
    from blkloom.image.storage import Storage

_GROWTH: Final = (4 << 20, 64 << 20)
"""Minimum and maximum bytes by which a file grows at a time; in between, an eighth of its size."""

_HOST_LIMIT: Final = 1 << 56
"""Limit of host offsets: bits 9 - 55 of an entry."""


@dataclass(frozen=True, slots=True)
class Run:
    """Contiguous host clusters from `first` on. zeroed: whether they certainly read as zeros."""

    first: int
    count: int
    zeroed: bool


_NOTHING: Final = Run(0, 0, False)


class Allocator:
    """Allocator for the clusters of one image file.

    metadata_in: returns the name of the metadata in a run of clusters (first, count), "" for none. frees: called with
    clusters that became free, before they are punched or allocated; raises CorruptImage if they contain metadata.
    """

    def __init__(
        self,
        refcounts: Refcounts,
        storage: Storage,
        *,
        cluster_bits: int,
        metadata_in: Callable[[int, int], str],
        frees: Callable[[NDArray[np.uint64]], None] = lambda _clusters: None,
        reserve: Callable[[HostOffset, int], None] | None = None,
        secure: Callable[[HostOffset, int], None] | None = None,
        direct: bool = False,
        doubtful: bool = False,
    ) -> None:
        """reserve: called with clusters that are about to be allocated; it may allocate space for them, or raise
        ENOSPC. secure: allocates space for a table in the file system before there is anything to write to it, or
        raises ENOSPC; None: writes find space or fail. direct: the clusters are written with direct I/O. doubtful: see
        `trust`.
        """
        self._refcounts = refcounts
        self._storage = storage
        self._bits = cluster_bits
        self._metadata_in = metadata_in
        self._frees = frees
        self.check_end: Callable[[], None] | None = None
        """Called before the first allocation, when no change would be lost; it raises CorruptImage if something refers
        past the end of the file.
        """
        self._reserve = reserve
        self._take_space = secure
        self._direct = direct
        self._secured: set[int] = set()
        self._first_size = storage.size()
        self.file_end: Final = -(-self._first_size >> cluster_bits)
        """Clusters that the file had when it was opened."""
        self._end: int | None = None
        self._size = self._first_size
        """Minimum size of the file in bytes, unless another program truncates it."""
        if direct:
            self._end_with_a_cluster()
        self._doubtful = doubtful
        self._floor = 0
        """No cluster below is allocated."""
        self._hint = 0
        """No cluster below is free, except those of the current runs."""
        self.recount: Recount | None = None
        """The running recount, which counts references."""
        self.freed_inside = False
        """Whether clusters were freed that may be allocated only after the check."""
        self._run = _NOTHING
        self._next = _NOTHING
        self._given_back: list[NDArray[np.uint64]] = []
        self.freed = 0
        """Number of clusters freed so far."""

    @classmethod
    def of(cls, image: Image, refcounts: Refcounts, overlaps: OverlapCheck, context: WriteContext) -> Self:
        """The allocator of an image that is written."""
        return cls(
            refcounts,
            image.storage,
            cluster_bits=image.geometry.cluster_bits,
            metadata_in=overlaps.allocation,
            frees=overlaps.frees,
            reserve=context.allocating,
            secure=image.storage.reserve if context.take_space else None,
            direct=context.direct and not image.header.has_data_file,
            doubtful=True,
        )

    def _end_with_a_cluster(self) -> None:
        """Extends the file to a whole cluster. After a direct write to the last, partial block of a file, the engine
        truncates the file to its former size, so the file must not grow at the same time.
        """
        end = -(-self._first_size >> self._bits) << self._bits
        try:
            if end > self._first_size:
                self._storage.truncate(end)
        except OSError as error:
            if error.errno != errno.EINVAL:  # the size of a block device does not change
                raise

    def take(self, want: int) -> Run:
        """Allocates up to `want` contiguous clusters, at least one. Raises CorruptImage, ENOSPC."""
        self.at_hand(want)
        self._checked_size()
        run = self._run
        count = min(want, run.count)
        if self._reserve:
            self._reserve(HostOffset(run.first << self._bits), count << self._bits)
        if self._take_space:
            self.secure(self._refcounts.block_of(run.first))
        self._refcounts.set(run.first, count, 1)
        self._run = Run(run.first + count, run.count - count, run.zeroed)
        return Run(run.first, count, run.zeroed)

    def take_table(self) -> Run:
        """Allocates one cluster for a table, with `secure`."""
        run = self.take(1)
        try:
            self.secure(run.first << self._bits)
        except OSError:
            self.take_back(run)
            raise
        return run

    def secure(self, offset: int) -> None:
        """Allocates space for the cluster of metadata that contains the byte, before it is changed in memory, so that a
        flush does not run out of space. Raises ENOSPC.
        """
        cluster = offset >> self._bits
        if self._take_space and cluster not in self._secured:
            self._take_space(HostOffset(cluster << self._bits), 1 << self._bits)
            self._secured.add(cluster)

    def at_hand(self, want: int) -> int:
        """Number of clusters, of `want`, that can be allocated in one run, or in two with the next run. Raises
        CorruptImage, and ENOSPC if there is none.
        """
        if not self._run.count:
            self._run, self._next = self._next, _NOTHING
        if not self._run.count:
            self._run = self._find(want)
        if self._run.count < want and not self._next.count:
            self._look_further(want - self._run.count)
        return self._run.count + self._next.count

    def _look_further(self, want: int) -> None:
        """Searches for the run after the current one, and merges both if they are contiguous."""
        run = self._run
        try:
            found = self._find(want)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            return  # the write that needs the space finds this, and fails
        if (found.first, found.zeroed) == (run.first + run.count, run.zeroed):
            self._run = Run(run.first, run.count + found.count, run.zeroed)
        else:
            self._next = found

    def trust(self) -> None:
        """Allows the allocation of every cluster with refcount 0, because all tables have been checked. Before that,
        the allocator is *doubtful*: it allocates only clusters past the end that the file had when it was opened, and
        past all clusters with a refcount, so no table that was not read yet can name them.
        """
        self._doubtful = self.freed_inside = False
        self._floor = 0
        self.forget_run()

    @property
    def doubtful(self) -> bool:
        """See `trust`."""
        return self._doubtful

    @property
    def end(self) -> int:
        """The first cluster past the end that the file had when it was opened, and past all clusters that had a
        refcount then. Called before the first allocation. Raises CorruptImage.
        """
        if self._end is None:
            counted = self._refcounts.last_used() + 1 if self._refcounts.counts_past(self.file_end) else 0
            self._end = max(self.file_end, counted)
        return self._end

    def moved(self, index: L1Index, entries: NDArray[np.uint64]) -> None:
        """Called when the L2 table with these entries is about to move."""
        if self.recount:
            self.recount.moved(index, entries)

    def give_back(self, clusters: NDArray[np.uint64], index: L1Index | None = None) -> None:
        """Records that one reference to each named cluster was removed in memory (a cluster may be named twice): by L2
        table `index`, None for other metadata.
        """
        if self.recount:
            self.recount.released(clusters, index)
        if clusters.size:
            self._given_back.append(clusters)

    def take_back(self, run: Run) -> None:
        """Undoes a `take` whose clusters have no references yet."""
        self._refcounts.set(run.first, run.count, 0)
        self._look_from(run.first)

    @property
    def waiting(self) -> bool:
        """Whether freed clusters wait for `settle`."""
        return bool(self._given_back)

    def settle(self) -> None:
        """Decrements the refcounts of freed clusters, and punches those that became free. Called when no table on disk
        refers to them, and no request reads them.
        """
        if not self._given_back:
            return
        clusters = np.concatenate(self._given_back)
        free = self._refcounts.add(self.recount.settling(clusters) if self.recount else clusters, -1)
        if self.recount:
            self.recount.settled(clusters)
        self._given_back.clear()
        self.freed += free.size
        if self._secured:
            self._secured.difference_update(free.tolist())
        if not free.size:
            return
        self._frees(free)
        self.freed_inside |= self._doubtful and int(free[0]) < self.end
        self._look_from(int(free[0]))  # truncating the file can wait
        for first, count in runs_of(free):
            self._punch(first, count)

    def forget_run(self) -> None:
        """Drops the current run, which is searched again: its clusters may be at the end of the file, which is to be
        truncated.
        """
        self._look_from(0)

    def _look_from(self, cluster: int) -> None:
        """Restarts the search at this cluster, because clusters before the current run may have become free."""
        cluster = max(cluster, self._floor)
        if cluster < self._hint:
            self._hint, self._run, self._next = cluster, _NOTHING, _NOTHING

    def trim_file(self) -> None:
        """Truncates the file after its last used cluster, but not below the size at opening: with a wrong refcount, a
        table might refer to a cluster there.
        """
        end = max(self._refcounts.last_used() + 1 << self._bits, self._first_size)
        try:
            if end < self._storage.size():
                self._size = end
                self._storage.truncate(end)
        except OSError as error:
            if error.errno != errno.EINVAL:  # the size of a block device does not change
                raise
        self.forget_run()

    # below: runs

    def _find(self, want: int) -> Run:
        """Finds a run of free clusters with refcount blocks, checks it, and zeroes it as far as possible."""
        if self.check_end:
            check_end, self.check_end = self.check_end, None
            try:
                check_end()
            except OSError:
                self.check_end = check_end
                raise
        if self._doubtful and not self._floor:
            self._floor = self._hint = self.end
        while True:
            size = self._storage.size()
            growth = min(max(size // 8, _GROWTH[0]), _GROWTH[1]) >> self._bits
            start, count = self._refcounts.free_run(self._hint, max(want, growth, 1))
            if not self._refcounts.described(start):
                self._describe(start)
                continue
            end_of_file = -(-size >> self._bits)
            if start < end_of_file:
                count = min(count, end_of_file - start)
            self._check(start, count)
            count = self._extend(start, count)
            zeroed = start >= end_of_file or self._punch(start, count)
            if self._direct and zeroed:
                self._storage.lay_out(HostOffset(start << self._bits), count << self._bits)
            self._hint = start + count
            return Run(start, count, zeroed)

    def _describe(self, start: int) -> None:
        """Makes refcount structures for clusters that have none, in the first of these clusters."""
        count = self._refcounts.describing(start)
        self._check(start, count)
        if self._extend(start, count) < count:
            raise self._full()
        before = self._refcounts.table_offset, self._refcounts.table_clusters
        if self._take_space:
            self._take_space(HostOffset(start << self._bits), count << self._bits)
            if count == 1:
                self.secure(self._refcounts.entry_of(start))
        self._refcounts.describe(start)
        self._hint = start + count
        if self._refcounts.table_offset != before[0]:
            first = before[0] >> self._bits
            self.give_back(np.arange(first, first + before[1], dtype=np.uint64))

    def _check(self, first: int, count: int) -> None:
        if (first + count) << self._bits > _HOST_LIMIT:
            raise self._full()
        if what := self._metadata_in(first, count):
            raise CorruptImage(
                f"{what} lies in clusters {first} to {first + count - 1}, which are free by their refcounts",
                path=self._storage.path,
            )

    def _extend(self, first: int, count: int) -> int:
        """Extends the file to include the run, or its first cluster if there is no more space. Returns the resulting
        run.
        """
        while first + count << self._bits > self._checked_size():
            try:
                self._storage.truncate(first + count << self._bits)
                self._size = first + count << self._bits
            except OSError as error:
                if error.errno == errno.EINVAL:
                    raise self._full() from error  # a block device
                if count == 1:
                    raise
                count = 1
        return count

    def _checked_size(self) -> int:
        """Size of the file. Raises CorruptImage if it has been truncated since it was opened."""
        if (size := self._storage.size()) < self._size:
            raise CorruptImage(
                f"the file was cut short to {size} bytes by another program; it had {self._size}",
                path=self._storage.path,
            )
        return size

    def _punch(self, first: int, count: int) -> bool:
        """Punches the run; returns whether it reads as zeros now."""
        return self._storage.punch(HostOffset(first << self._bits), count << self._bits)

    def _full(self) -> BackingError:
        return BackingError(
            "no space is left in the image file",
            path=self._storage.path,
            errno=errno.ENOSPC,
            cure="make room on its file system; on a block device, make that larger",
        )


def runs_of(numbers: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """Contiguous runs (first, count) of sorted distinct numbers."""
    if numbers.size:
        cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
        for part in np.split(numbers, cuts):
            yield int(part[0]), part.size
