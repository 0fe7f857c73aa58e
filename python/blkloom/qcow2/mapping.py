"""Changes of the mapping from guest to host clusters: tables that may be changed, places for data, what the engine
is told. What writes, discards and the end of a session have in common.

Invariant: memory is changed before the engine is told, and never the other way round; what was replaced is given
back to the allocator, which keeps it until nothing refers to it. One thread (the mapper's). May fail: CorruptImage,
OSError (ENOSPC); then what had been changed until then holds, and nothing is half changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from blkloom.qcow2 import places
from blkloom.qcow2.allocation import Allocator, Run
from blkloom.qcow2.image import Image, L2Table
from blkloom.qcow2.overlap_check import Metadata
from blkloom.qcow2.placing import Layout, host_clusters
from blkloom.qcow2.tables import COPIED, OFFSET_MASK, Kind, Units, classify
from blkloom.qcow2.types import HostOffset, L1Index, Words

if TYPE_CHECKING:
    from blkloom.qcow2.cow import Below
    from blkloom.qcow2.errors import CorruptImage
    from blkloom.qcow2.flush import WriteBack
    from blkloom.qcow2.l2_checks import L2Checks
    from blkloom.qcow2.overlap_check import OverlapCheck

_AT_ONCE: Final = 1 << 20
"""Units."""

Install = Callable[[int, Words], None]
"""Stores consecutive entries of the engine's table: (first unit, an entry for each unit of the image)."""


_Units = Callable[[int, int], NDArray[np.bool_]]


class Mapping:
    """The active mapping of a writable image, whose data is file 0 of the engine's table. below: its backing chain,
    None for none.
    """

    def __init__(
        self,
        image: Image,
        allocator: Allocator,
        write_back: WriteBack,
        overlaps: OverlapCheck,
        l2_checks: L2Checks,
        *,
        below: Below | None,
        install: Install,
        guarded: _Units,
        unseen: _Units | None,
        quiet: Callable[[], None] | None = None,
    ) -> None:
        """guarded: of (first, count) units, those that the engine may not write to by itself. unseen: those of them
        that must not change unnoticed. quiet: waits until the engine is done with what it was told of before; None
        where what it writes and what is written here go well together in one block.
        """
        self.image: Final = image
        self.data: Final = image.data_storage
        self.layout: Final = Layout(image.geometry, image.header.version, image.header.has_data_file)
        self.clusters: Final = -(-image.size >> image.geometry.cluster_bits)
        """Of the guest's disk."""
        self.below: Final = below
        self.zeroes_by_writing = False
        """The data's file has no holes to be made."""
        self._l2_units: Final = image.geometry.l2_units
        self._units_a_cluster: Final = image.geometry.units_a_cluster
        self._allocator = allocator
        self._write_back = write_back
        self._overlaps = overlaps
        self._l2_checks = l2_checks
        self._install = install
        self._guarded = guarded
        self._unseen = unseen
        self._quiet = quiet

    def pieces(self, low: int, high: int) -> Iterator[tuple[L1Index, int, int]]:
        """Guest clusters [low, high) as (L2 table, first entry, end)."""
        per_table = self.layout.geometry.l2_entries
        while low < high:
            index, first = divmod(low, per_table)
            end = min(per_table, first + high - low)
            yield L1Index(index), first, end
            low += end - first

    def contradiction(self, table: L2Table, number: int) -> CorruptImage:
        """What is wrong with an entry of a table."""
        geometry = self.layout.geometry
        return self.image.contradiction((table.index * geometry.l2_entries + number) * geometry.units_a_cluster)

    def check(self, table: L2Table, low: int, high: int) -> None:
        """Raises CorruptImage if one of the entries [low, high) contradicts itself."""
        if (wrong := np.flatnonzero(self._units(table, low, high).kinds == Kind.INVALID)).size:
            raise self.contradiction(table, low + int(wrong[0]) // self.layout.geometry.units_a_cluster)

    def zeros_below(self, index: L1Index, low: int, high: int) -> NDArray[np.bool_] | None:
        """For each unit of a table's entries [low, high), whether it would read as zeros were it unallocated. None:
        all would.
        """
        if self.below is None:
            return None
        per = self.layout.geometry.units_a_cluster
        first = (index * self.layout.geometry.l2_entries + low) * per
        return self.below.zeros(first, (high - low) * per)

    def own(self, index: L1Index) -> L2Table:
        """The L2 table, made if there was none, copied if it was a snapshot's too: it may be changed."""
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
        """How many of `want` guest clusters the next two `take`s can have."""
        return want if self.layout.data_file else min(want, self._allocator.at_hand(want))

    def take(self, cluster: int, want: int) -> Run:
        """A place for up to `want` guest clusters from `cluster` on."""
        self._write_back.filled()
        return Run(cluster, want, False) if self.layout.data_file else self._allocator.take(want)

    def take_back(self, run: Run) -> None:
        """Undoes `take`."""
        if not self.layout.data_file:
            self._allocator.take_back(run)

    def clear(self, host: int, length: int) -> None:
        """Makes a range of the data's file read as zeros: a hole, if it can be."""
        self._write_back.filled()
        if not self.data.punch(HostOffset(host), length):
            self.zeroes_by_writing = True
            self.data.zero(HostOffset(host), length)

    def make_zeros(self, run: Run) -> None:
        """Makes clusters that were taken read as zeros; gives them back where that fails."""
        if run.zeroed:
            return
        bits = self.layout.geometry.cluster_bits
        try:
            self.clear(run.first << bits, run.count << bits)
        except OSError:
            self.take_back(run)
            raise

    def entries_for(self, run: Run) -> Words:
        """L2 entries that refer to the clusters of a run, one after the other."""
        bits = self.layout.geometry.cluster_bits
        start = run.first << bits | COPIED
        return np.arange(start, start + (run.count << bits), 1 << bits, dtype=np.uint64)

    def filled(self) -> None:
        """Contents were put where an entry will point."""
        self._write_back.filled()

    def give_back(self, table: L2Table, entries: Words) -> None:
        """What these entries of the table referred to is not referred to by them any more."""
        self._allocator.give_back(host_clusters(self.layout, entries), table.index)

    def replace(
        self, table: L2Table, low: int, high: int, entries: Words | int, bitmaps: Words | np.uint64 | None
    ) -> None:
        """Puts entries in place of [low, high) and gives back what these referred to."""
        if table.entries[low:high].any():
            self.give_back(table, table.entries[low:high])
        table.entries[low:high] = entries
        if table.bitmaps is not None:
            assert bitmaps is not None, "extended images have them"
            table.bitmaps[low:high] = bitmaps
        self._write_back.l2_changed(table, low, high)

    def changed(self, table: L2Table, low: int, high: int) -> None:
        """Entries [low, high) were changed; they refer to the same places."""
        self._write_back.l2_changed(table, low, high)

    def publish(self, table: L2Table, low: int, high: int) -> None:
        """Tells the engine of entries [low, high). What needs the chain or a decompression faults, and is looked up; so
        does what contradicts itself, for the request must not only fail.
        """
        units = self._units(table, low, high)
        kinds = units.kinds
        entries = np.zeros(kinds.size, np.uint64)
        data = kinds == Kind.DATA
        if not self.layout.data_file:
            data &= units.copied
        np.copyto(entries, places.DATA | units.offsets >> np.uint64(9), where=data)
        entries[kinds == Kind.ZERO] = places.ZERO
        if self.below is None:
            entries[kinds == Kind.UNALLOCATED] = places.ZERO
        geometry = self.layout.geometry
        first = table.index * geometry.l2_units + low * geometry.units_a_cluster
        self._install(first, _read_only(entries, self._guarded(first, entries.size)))

    def _units(self, table: L2Table, low: int, high: int) -> Units:
        """What entries [low, high) are."""
        return classify(
            table.entries[low:high],
            None if table.bitmaps is None else table.bitmaps[low:high],
            self.layout.geometry,
            version=self.layout.version,
            data_file=self.layout.data_file,
            end=self.image.data_end,
        )

    def hosts(self, low: int, high: int) -> Iterator[tuple[int, int, int]]:
        """(from, to, host offset) of guest bytes [low, high), all of which have a place of their own, a piece each."""
        bits = self.layout.geometry.unit_bits
        first, stop = low >> bits, -(-high >> bits)
        offsets = self.image.units(first, stop - first).offsets
        breaks = np.flatnonzero(np.diff(offsets) != 1 << bits) + 1
        for one, other in itertools.pairwise([0, *breaks.tolist(), stop - first]):
            start, end = max(low, first + one << bits), min(high, first + other << bits)
            yield start, end, int(offsets[one]) + start - (first + one << bits)

    def withdraw(self, first: int, count: int) -> bool:
        """Keeps the engine from writing to units before they are published again, if it could undo what is written to
        them here: its direct write of less than a block reads the block and writes all of it. Returns whether it could.
        """
        if self._quiet:
            for low in range(first, first + count, _AT_ONCE):
                self._install(low, np.zeros(min(_AT_ONCE, first + count - low), np.uint64))
            self._quiet()
        return self._quiet is not None

    def publish_run(self, index: L1Index, low: int, count: int, host: int) -> None:
        """Tells the engine that `count` clusters from entry `low` on lie at `host` and what follows it, all of them."""
        self.publish_places(index, low, self.places_from(host, count))

    def places_from(self, host: int, count: int) -> Words:
        """What the engine is told of `count` clusters that lie at `host` and what follows it: an entry a unit."""
        geometry = self.layout.geometry
        start = int(places.DATA) | host >> 9
        step = geometry.unit >> 9
        return np.arange(start, start + count * geometry.units_a_cluster * step, step, dtype=np.uint64)

    def publish_places(self, index: L1Index, low: int, entries: Words) -> None:
        """Tells the engine that these are the units from entry `low` of a table on (see `places_from`)."""
        first = index * self._l2_units + low * self._units_a_cluster
        if self._unseen:
            entries = _read_only(entries, self._unseen(first, entries.size))
        self._install(first, entries)


def _read_only(entries: Words, which: NDArray[np.bool_]) -> Words:
    """The same entries, but that writes to data fault where `which` says so."""
    if not which.any():
        return entries
    return np.where(which & (places.kinds(entries) == 1), entries ^ places.READ_ONLY_BIT, entries)
