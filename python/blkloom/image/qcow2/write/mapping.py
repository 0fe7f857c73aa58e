"""The mapping from guest to host clusters of a writable image: L2 tables, the entries of allocated clusters, and the
engine's table. Writes, discards and the end of a session use it.

Invariant: a table in memory is changed, and the redo log has the change, before the engine is told. Replaced clusters
are passed to the allocator, which keeps them until nothing refers to them. One thread (the mapper's). May fail:
CorruptImage, OSError (ENOSPC); every single change is done completely or not at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from blkloom.image import cluster_entries
from blkloom.image.qcow2.format.geometry import L1Index
from blkloom.image.qcow2.format.tables import COPIED, OFFSET_MASK, Kind, Layout, Units, classify, host_clusters
from blkloom.image.qcow2.state.image import Image, L2Table
from blkloom.image.qcow2.state.overlap_check import Metadata
from blkloom.image.qcow2.write.allocation import Allocator, Run
from blkloom.image.types import HostOffset, Words

if TYPE_CHECKING:
    from blkloom.image.errors import CorruptImage
    from blkloom.image.format import WriteContext
    from blkloom.image.qcow2.state.bitmaps import Bitmaps
    from blkloom.image.qcow2.state.l2_checks import L2Checks
    from blkloom.image.qcow2.state.overlap_check import OverlapCheck
    from blkloom.image.qcow2.write.flush import WriteBack
    from blkloom.image.qcow2.write.writability import Writability

_AT_ONCE: Final = 1 << 20
"""Units."""


class Mapping:
    """The active mapping of a writable image, whose data is file 0 of the engine's table."""

    def __init__(
        self,
        image: Image,
        allocator: Allocator,
        write_back: WriteBack,
        overlaps: OverlapCheck,
        l2_checks: L2Checks,
        bitmaps: Bitmaps,
        writability: Writability,
        context: WriteContext,
    ) -> None:
        self.image: Final = image
        self.data: Final = image.data_storage
        self.layout: Final = Layout(image.geometry, image.header.version, image.header.has_data_file)
        self.clusters: Final = -(-image.size >> image.geometry.cluster_bits)
        """Number of guest clusters."""
        self.below: Final = context.below
        self.zeroes_by_writing = False
        """Whether the data file has no support for holes."""
        self._l2_units: Final = image.geometry.l2_units
        self._units_a_cluster: Final = image.geometry.units_a_cluster
        self._allocator = allocator
        self._write_back = write_back
        self._overlaps = overlaps
        self._l2_checks = l2_checks
        self._bitmaps = bitmaps
        self._writability = writability
        self._install = context.install
        self._quiet = context.synchronize if context.direct else None
        """Waits until the engine has finished requests that looked up the table before; None if writes by the engine
        and by Python to one block do not interfere.
        """

    def pieces(self, low: int, high: int) -> Iterator[tuple[L1Index, int, int]]:
        """Guest clusters [low, high) as (L2 table, first entry, end)."""
        per_table = self.layout.geometry.l2_entries
        while low < high:
            index, first = divmod(low, per_table)
            end = min(per_table, first + high - low)
            yield L1Index(index), first, end
            low += end - first

    def contradiction(self, table: L2Table, number: int) -> CorruptImage:
        """A description of the inconsistency of an entry."""
        geometry = self.layout.geometry
        return self.image.contradiction((table.index * geometry.l2_entries + number) * geometry.units_a_cluster)

    def check(self, table: L2Table, low: int, high: int) -> None:
        """Raises CorruptImage if one of the entries [low, high) is inconsistent."""
        if (wrong := np.flatnonzero(self._units(table, low, high).kinds == Kind.INVALID)).size:
            raise self.contradiction(table, low + int(wrong[0]) // self.layout.geometry.units_a_cluster)

    def zeros_below(self, index: L1Index, low: int, high: int) -> NDArray[np.bool_] | None:
        """Whether each unit of a table's entries [low, high) would read as zeros if it were unallocated. None: all
        would.
        """
        if self.below is None:
            return None
        per = self.layout.geometry.units_a_cluster
        first = (index * self.layout.geometry.l2_entries + low) * per
        return self.below.zeros(first, (high - low) * per)

    def own(self, index: L1Index) -> L2Table:
        """The L2 table in a form that may be changed: a new one if there was none, a copy if a snapshot shares it."""
        image = self.image
        entry = int(image.l1[index])
        table = image.l2(index)
        if self._l2_checks.found:
            raise self._l2_checks.found
        old = (entry & OFFSET_MASK) >> self.layout.geometry.cluster_bits
        if table is not None:
            self._overlaps.writes(Metadata.L2, old, f"L2 table {index}", in_place=bool(entry & COPIED))
        if table is not None and entry & COPIED:
            self._allocator.secure(int(table.offset))
            return table
        self._allocator.secure(image.header.l1_offset + index * 8)
        run = self._allocator.take_table()
        offset = HostOffset(run.first << self.layout.geometry.cluster_bits)
        count = self.layout.geometry.l2_entries
        if table is None:
            bitmaps = np.zeros(count, np.uint64) if self.layout.geometry.extended else None
            table = L2Table(index, offset, np.zeros(count, np.uint64), bitmaps)
        else:
            bitmaps = None if table.bitmaps is None else table.bitmaps.copy()
            table = L2Table(index, offset, table.entries.copy(), bitmaps)
            self._overlaps.moved(Metadata.L2, old)
            self._allocator.moved(index, table.entries)
            self._allocator.give_back(np.array([old], np.uint64))
        image.l1[index] = offset | COPIED
        self._l2_checks.met(index)
        self._write_back.l2_changed(table, 0, count)
        self._write_back.l1_changed(index)
        self._write_back.filled()
        return table

    def room(self, want: int) -> int:
        """Number of guest clusters, of `want`, that the next two `take`s can allocate."""
        return want if self.layout.data_file else min(want, self._allocator.at_hand(want))

    def take(self, cluster: int, want: int) -> Run:
        """Allocates host clusters for up to `want` guest clusters from `cluster` on."""
        self._write_back.filled()
        return Run(cluster, want, False) if self.layout.data_file else self._allocator.take(want)

    def take_back(self, run: Run) -> None:
        """Undoes `take`."""
        if not self.layout.data_file:
            self._allocator.take_back(run)

    def clear(self, host: int, length: int) -> None:
        """Makes a range of the data file read as zeros, as a hole if possible."""
        self._write_back.filled()
        if not self.data.punch(HostOffset(host), length):
            self.zeroes_by_writing = True
            self.data.zero(HostOffset(host), length)

    def make_zeros(self, run: Run) -> None:
        """Makes allocated clusters read as zeros; frees them if that fails."""
        if run.zeroed:
            return
        bits = self.layout.geometry.cluster_bits
        try:
            self.clear(run.first << bits, run.count << bits)
        except OSError:
            self.take_back(run)
            raise

    def entries_for(self, run: Run) -> Words:
        """L2 entries for the clusters of a run."""
        bits = self.layout.geometry.cluster_bits
        start = run.first << bits | COPIED
        return np.arange(start, start + (run.count << bits), 1 << bits, dtype=np.uint64)

    def filled(self) -> None:
        """Records that contents were written where a new entry will refer to."""
        self._write_back.filled()

    def give_back(self, table: L2Table, entries: Words) -> None:
        """Frees the clusters that these former entries of the table referred to."""
        self._allocator.give_back(host_clusters(self.layout, entries), table.index)

    def replace(
        self, table: L2Table, low: int, high: int, entries: Words | int, bitmaps: Words | np.uint64 | None
    ) -> None:
        """Replaces the entries [low, high) and frees the clusters of the former ones."""
        if table.entries[low:high].any():
            self.give_back(table, table.entries[low:high])
        table.entries[low:high] = entries
        if table.bitmaps is not None:
            assert bitmaps is not None, "extended images have them"
            table.bitmaps[low:high] = bitmaps
        self._write_back.l2_changed(table, low, high)

    def changed(self, table: L2Table, low: int, high: int) -> None:
        """Records a change of the entries [low, high) that does not change their clusters."""
        self._write_back.l2_changed(table, low, high)

    def publish(self, table: L2Table, low: int, high: int) -> None:
        """Stores entries [low, high) in the engine's table. Units that need the chain or decompression become faults.
        So do inconsistent ones, because the request must not only fail.
        """
        units = self._units(table, low, high)
        kinds = units.kinds
        entries = np.zeros(kinds.size, np.uint64)
        data = kinds == Kind.DATA
        if not self.layout.data_file:
            data &= units.copied
        np.copyto(entries, cluster_entries.DATA | units.offsets >> np.uint64(9), where=data)
        entries[kinds == Kind.ZERO] = cluster_entries.ZERO
        if self.below is None:
            entries[kinds == Kind.UNALLOCATED] = cluster_entries.ZERO
        geometry = self.layout.geometry
        first = table.index * geometry.l2_units + low * geometry.units_a_cluster
        self._write_back.log_changes()
        self._install(first, _read_only(entries, self.guarded(first, entries.size)))

    def guarded(self, first: int, count: int) -> NDArray[np.bool_]:
        """Which of `count` units from `first` on the engine must not write to by itself although they are not shared: a
        dirty bitmap would miss the write, or the cluster also contains metadata.
        """
        tracking = self._bitmaps.tracking
        found = self._bitmaps.unseen(first, count) if tracking else np.zeros(count, np.bool_)
        if self._writability.broken is not None:
            found[:] = True
        elif not self.layout.data_file:
            units = self.image.units(first, count)
            data = units.kinds == Kind.DATA
            found[data] |= self._overlaps.data(units.offsets[data] >> np.uint64(self.layout.geometry.cluster_bits))
        return found

    def _units(self, table: L2Table, low: int, high: int) -> Units:
        """Kinds of the units of entries [low, high)."""
        return classify(
            table.entries[low:high],
            None if table.bitmaps is None else table.bitmaps[low:high],
            self.layout.geometry,
            version=self.layout.version,
            data_file=self.layout.data_file,
            end=self.image.data_end,
        )

    def hosts(self, low: int, high: int) -> Iterator[tuple[int, int, int]]:
        """(from, to, host offset) pieces of guest bytes [low, high), all of which are allocated."""
        bits = self.layout.geometry.unit_bits
        first, stop = low >> bits, -(-high >> bits)
        offsets = self.image.units(first, stop - first).offsets
        breaks = np.flatnonzero(np.diff(offsets) != 1 << bits) + 1
        for one, other in itertools.pairwise([0, *breaks.tolist(), stop - first]):
            start, end = max(low, first + one << bits), min(high, first + other << bits)
            yield start, end, int(offsets[one]) + start - (first + one << bits)

    def withdraw(self, first: int, count: int) -> bool:
        """Makes writes to units fault until they are published again, if the engine could undo writes by Python to the
        same block: its direct write of a partial block reads the block and writes all of it. Returns whether it could.
        """
        if self._quiet:
            for low in range(first, first + count, _AT_ONCE):
                self._install(low, np.zeros(min(_AT_ONCE, first + count - low), np.uint64))
            self._quiet()
        return self._quiet is not None

    def publish_run(self, index: L1Index, low: int, count: int, host: int) -> None:
        """Stores `count` clusters from entry `low` on in the engine's table; they are contiguous from `host` on."""
        self.publish_places(index, low, self.places_from(host, count))

    def places_from(self, host: int, count: int) -> Words:
        """Entries of the engine's table for `count` contiguous clusters from `host` on, one for each unit."""
        geometry = self.layout.geometry
        start = int(cluster_entries.DATA) | host >> 9
        step = geometry.unit >> 9
        return np.arange(start, start + count * geometry.units_a_cluster * step, step, dtype=np.uint64)

    def publish_places(self, index: L1Index, low: int, entries: Words) -> None:
        """Stores entries (see `places_from`) in the engine's table, for the units from entry `low` of a table on."""
        first = index * self._l2_units + low * self._units_a_cluster
        if self._bitmaps.tracking:
            entries = _read_only(entries, self._bitmaps.unseen(first, entries.size))
        self._write_back.log_changes()
        self._install(first, entries)


def _read_only(entries: Words, which: NDArray[np.bool_]) -> Words:
    """The entries, changed to fault on writes to data where `which` is set."""
    if not which.any():
        return entries
    return np.where(which & (cluster_entries.kinds(entries) == 1), entries ^ cluster_entries.READ_ONLY_BIT, entries)
