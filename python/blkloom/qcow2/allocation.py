"""Hands out host clusters and takes them back.

What is handed out counts 1 in memory at once; what is given back keeps its count until `settle`, which flush.py
calls when whatever referred to it is gone from the disk and nobody reads it any more. So a cluster that counts 0
in memory is referred to by nothing, now or after a crash, and may be used for anything.

The file grows over nothing that is referred to: were it cut short, zeros would stand for what is missing.

Counts are not believed before all tables have been looked at (see `trust`): until then the file grows.

Space is found by its counts, lowest first, a *run* at a time: a run is looked at once (that it is no metadata,
whatever the counts say), made to read as zeros once (it is past the file's old end, or punched), and then given
away cluster by cluster. One thread (the mapper's). May fail: CorruptImage, OSError of the storage (ENOSPC).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from blkloom.errors import BackingError
from blkloom.qcow2.errors import CorruptImage
from blkloom.qcow2.storage import NO_ROOM
from blkloom.qcow2.types import HostOffset, L1Index

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blkloom.qcow2.recount import Recount
    from blkloom.qcow2.refcounts import Refcounts
    from blkloom.qcow2.storage import Storage

_GROWTH: Final = (4 << 20, 64 << 20)
"""Bytes by which a file grows: an eighth of what it has, within these."""

_HOST_LIMIT: Final = 1 << 56
"""Host offsets end here: bits 9 - 55 of an entry."""


@dataclass(frozen=True, slots=True)
class Run:
    """Host clusters from `first` on. zeroed: they read as zeros, for certain."""

    first: int
    count: int
    zeroed: bool


_NOTHING: Final = Run(0, 0, False)


class Allocator:
    """The free clusters of one image file.

    metadata_in: names the metadata that lies in a run of clusters (first, count), "" for none. frees: told of clusters
    that came to be free before they are made holes or handed out; raises CorruptImage if metadata is there.
    """

    def __init__(
        self,
        refcounts: Refcounts,
        storage: Storage,
        *,
        cluster_bits: int,
        metadata_in: Callable[[int, int], str],
        frees: Callable[[NDArray[np.uint64]], None] = lambda _clusters: None,
        check_end: Callable[[], None] | None = None,
        reserve: Callable[[HostOffset, int], None] | None = None,
        secure: Callable[[HostOffset, int], None] | None = None,
        direct: bool = False,
        doubtful: bool = False,
    ) -> None:
        """check_end: called before anything is handed out, when no change would be lost; it raises CorruptImage if
        anything past the end of the file is referred to. reserve: called with what is about to be handed out; it may
        take space for it, or raise ENOSPC. secure: takes space for a table from the file system before there is
        anything to be written to it, or raises ENOSPC; None: what is written finds space or does not. direct: what is
        handed out is written past the page cache. doubtful: see `trust`.
        """
        self._refcounts = refcounts
        self._storage = storage
        self._bits = cluster_bits
        self._metadata_in = metadata_in
        self._frees = frees
        self._check_end = check_end
        self._reserve = reserve
        self._take_space = secure
        self._direct = direct
        self._secured: set[int] = set()
        self._first_size = storage.size()
        self.file_end: Final = -(-self._first_size >> cluster_bits)
        """Clusters that the file had when it was opened."""
        self._end: int | None = None
        self._size = self._first_size
        """Bytes that the file has at least, unless another program cut it."""
        if direct:
            self._end_with_a_cluster()
        self._doubtful = doubtful
        self._floor = 0
        """Nothing below is handed out."""
        self._hint = 0
        """Nothing below is free but what is at hand."""
        self.recount: Recount | None = None
        """Counts references meanwhile."""
        self.freed_inside = False
        """Clusters came to be free that will be handed out once they may be."""
        self._run = _NOTHING
        self._next = _NOTHING
        self._given_back: list[NDArray[np.uint64]] = []
        self.allocated = 0
        """Clusters handed out so far."""
        self.freed = 0
        """Clusters that came to count 0 so far."""

    def _end_with_a_cluster(self) -> None:
        """After a direct write to the block that a file ends in, the engine cuts the file where it ended: nothing may
        have grown behind that meanwhile.
        """
        end = -(-self._first_size >> self._bits) << self._bits
        try:
            if end > self._first_size:
                self._storage.truncate(end)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a block device stays as it is
                raise

    def take(self, want: int) -> Run:
        """Up to `want` neighbouring clusters, at least one. Raises CorruptImage, ENOSPC."""
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
        self.allocated += count
        return Run(run.first, count, run.zeroed)

    def take_table(self) -> Run:
        """One cluster, for a table: `secure`."""
        run = self.take(1)
        try:
            self.secure(run.first << self._bits)
        except OSError:
            self.take_back(run)
            raise
        return run

    def secure(self, offset: int) -> None:
        """The cluster of metadata that the byte lies in is about to be changed in memory: a flush must not want for
        space then. Raises ENOSPC.
        """
        cluster = offset >> self._bits
        if self._take_space and cluster not in self._secured:
            self._take_space(HostOffset(cluster << self._bits), 1 << self._bits)
            self._secured.add(cluster)

    def at_hand(self, want: int) -> int:
        """How many of `want` clusters can be had in one piece, or with the next one in two. Raises CorruptImage, and
        ENOSPC where there is none at all.
        """
        if not self._run.count:
            self._run, self._next = self._next, _NOTHING
        if not self._run.count:
            self._run = self._find(want)
        if self._run.count < want and not self._next.count:
            self._look_further(want - self._run.count)
        return self._run.count + self._next.count

    def _look_further(self, want: int) -> None:
        """Finds what comes after the run at hand, and makes both one if they are."""
        run = self._run
        try:
            found = self._find(want)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            return  # whoever wants it will hear of it
        if (found.first, found.zeroed) == (run.first + run.count, run.zeroed):
            self._run = Run(run.first, run.count + found.count, run.zeroed)
        else:
            self._next = found

    def trust(self) -> None:
        """What a *doubtful* allocator hands out lies past where the file ended when it was opened, and past all that
        counts: no table that has not been read yet can name it. From now on every cluster that counts 0 is handed out,
        for all tables have been looked at.
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
        """The first cluster that is past the end the file had when it was opened, and past all that counted then. Asked
        first before anything is handed out. Raises CorruptImage.
        """
        if self._end is None:
            counted = self._refcounts.last_used() + 1 if self._refcounts.counts_past(self.file_end) else 0
            self._end = max(self.file_end, counted)
        return self._end

    def moved(self, index: L1Index, entries: NDArray[np.uint64]) -> None:
        """The L2 table with these entries is about to lie elsewhere."""
        if self.recount:
            self.recount.moved(index, entries)

    def give_back(self, clusters: NDArray[np.uint64], index: L1Index | None = None) -> None:
        """One reference to each cluster named is gone from memory (a cluster may be named twice): of L2 table `index`,
        None for other metadata.
        """
        if self.recount:
            self.recount.released(clusters, index)
        if clusters.size:
            self._given_back.append(clusters)

    def take_back(self, run: Run) -> None:
        """Undoes a `take` of which nobody has heard."""
        self._refcounts.set(run.first, run.count, 0)
        self._look_from(run.first)
        self.allocated -= run.count

    @property
    def waiting(self) -> bool:
        """Whether anything given back waits for `settle`."""
        return bool(self._given_back)

    def settle(self) -> None:
        """What was given back is referred to no more on disk, and nobody reads it: count it down, and let the
        file system have what came to be free.
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
        self._look_from(int(free[0]))  # the file's end can wait
        for first, count in runs_of(free):
            self._punch(first, count)

    def forget_run(self) -> None:
        """The run at hand is looked for anew: its clusters may be at the end of the file, which is to be cut."""
        self._look_from(0)

    def _look_from(self, cluster: int) -> None:
        """There may be free clusters from this one on, below those at hand."""
        cluster = max(cluster, self._floor)
        if cluster < self._hint:
            self._hint, self._run, self._next = cluster, _NOTHING, _NOTHING

    def trim_file(self) -> None:
        """Cuts the file behind its last cluster in use, but nothing that it had before: were a count too low, that
        might be somebody's.
        """
        end = max(self._refcounts.last_used() + 1 << self._bits, self._first_size)
        try:
            if end < self._storage.size():
                self._size = end
                self._storage.truncate(end)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a block device stays as it is
                raise
        self.forget_run()

    # below: runs

    def _find(self, want: int) -> Run:
        """A run of free clusters that is described, checked, and as far as can be, zeros."""
        if self._check_end:
            check_end, self._check_end = self._check_end, None
            try:
                check_end()
            except OSError:
                self._check_end = check_end
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
        """Refcount structures for clusters that have none, in the first of them."""
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
        """Makes the file hold the run, or its first cluster if that is all there is room for. Returns which."""
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
        """The file's length. Raises CorruptImage if it has been cut short since it was opened."""
        if (size := self._storage.size()) < self._size:
            raise CorruptImage(
                f"the file was cut short to {size} bytes by another program; it had {self._size}",
                path=self._storage.path,
            )
        return size

    def _punch(self, first: int, count: int) -> bool:
        """Whether the run reads as zeros now."""
        return self._storage.punch(HostOffset(first << self._bits), count << self._bits)

    def _full(self) -> BackingError:
        return BackingError("no space is left in the image file", path=self._storage.path, errno=errno.ENOSPC)


def runs_of(numbers: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """Sorted distinct numbers as (first, count) of those that follow one another."""
    if numbers.size:
        cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
        for part in np.split(numbers, cuts):
            yield int(part[0]), part.size
