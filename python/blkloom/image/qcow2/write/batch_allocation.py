"""Allocation for several writes at once: plans what they need, allocates it in as few runs as possible, and updates the
tables.

It handles two kinds of writes, which are most of the faults while an image fills up: writes to unallocated clusters
that read as zeros (their neighbours are allocated, too: preallocation.py), and writes to a part of one cluster that the
engine can copy. write_allocation.py handles all others, and those that find no space or whose copy fails: it has all
rules and raises the errors. Writes to the same cluster, or to the same window, share its allocation.

The rules are those of a single write: a cluster is zeroed or copied before its entry is in memory, and the entry is in
memory before the engine is told. One thread (the mapper's). May fail: CorruptImage, OSError; entries that are already
in tables stay valid then, and no cluster is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from blkloom.image.qcow2.format.geometry import L1Index
from blkloom.image.qcow2.format.tables import ALL_ALLOCATED, ALL_ZERO, COMPRESSED, COPIED
from blkloom.image.qcow2.write.allocation import Run
from blkloom.image.qcow2.write.cow import Payload
from blkloom.image.storage import NO_ROOM
from blkloom.image.types import GuestOffset

if TYPE_CHECKING:
    from blkloom.image.qcow2.state.image import L2Table
    from blkloom.image.qcow2.write.cow import Copier
    from blkloom.image.qcow2.write.mapping import Mapping
    from blkloom.image.qcow2.write.preallocation import Preallocation

_KEPT_IN_PLACE: Final = COPIED | COMPRESSED | ALL_ZERO


@dataclass(slots=True)
class _Window:
    """Entries [low, high) of a table that are to be allocated; [at, high) still are to be. writes: (number, first
    entry, end) of the writes that need some of them.
    """

    table: L2Table
    low: int
    high: int
    at: int
    writes: list[tuple[int, int, int]]


@dataclass(slots=True)
class _Copy:
    """An entry of a table whose cluster is to be copied. writes: the numbers of the writes that need it."""

    table: L2Table
    entry: int
    writes: list[int]


@dataclass(slots=True)
class _Plan:
    """windows: by the number of each smallest window (see `Preallocation.least`) that they cover. copies: by guest
    cluster.
    """

    tables: dict[int, L2Table] = field(default_factory=dict)
    windows: dict[int, _Window] = field(default_factory=dict)
    copies: dict[int, _Copy] = field(default_factory=dict)
    order: list[_Window] = field(default_factory=list)


class BatchAllocation:
    """Batch allocation for writes to `mapping`."""

    def __init__(self, mapping: Mapping, copier: Copier, preallocation: Preallocation) -> None:
        self._mapping = mapping
        self._copier = copier
        self._preallocation = preallocation
        geometry = mapping.layout.geometry
        self._bits: Final = geometry.cluster_bits
        self._units: Final = geometry.units_a_cluster
        self._per_table: Final = geometry.l2_entries
        self._parts: Final = -(-geometry.l2_entries // preallocation.least)
        """Number of smallest windows in a table."""

    def prepare(self, writes: Sequence[tuple[int, int]]) -> list[int]:
        """Prepares writes of (offset, length) bytes. Returns the numbers of the prepared ones."""
        if self._mapping.layout.data_file:  # guest clusters have fixed offsets there
            return []
        plan, ready = _Plan(), list[int]()
        try:
            for number, (offset, length) in enumerate(writes):
                self._add(plan, number, offset, length)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
        self._give(plan.order, ready)
        self._copy(plan.copies, ready)
        return ready

    def _add(self, plan: _Plan, number: int, offset: int, length: int) -> None:
        """Plans a write, if it is of one of the two kinds. Raises CorruptImage, ENOSPC for an L2 table."""
        cluster, end = offset >> self._bits, -(-(offset + length) >> self._bits)
        index, low = divmod(cluster, self._per_table)
        high, least = low + end - cluster, self._preallocation.least
        if (high - 1) // least != low // least or high > self._per_table:
            return
        if (window := plan.windows.get(index * self._parts + low // least)) is not None:
            if window.low <= low and high <= window.high:
                window.writes.append((number, low, high))
            return
        part_of_one = high - low == 1 and length < 1 << self._bits
        if part_of_one and (copy := plan.copies.get(cluster)) is not None:
            copy.writes.append(number)
            return
        if (table := plan.tables.get(index)) is None:
            table = plan.tables[index] = self._mapping.own(L1Index(index))
        if part_of_one and self._is_copied(table, cluster, low):
            plan.copies[cluster] = _Copy(table, low, [number])
        elif self._is_free(table, low, high):
            self._add_window(plan, table, (number, low, high))

    def _is_copied(self, table: L2Table, cluster: int, entry: int) -> bool:
        """Whether a write to a part of the cluster needs a copy, and the fast copy can be used."""
        old = int(table.entries[entry])
        if table.bitmaps is not None or old & _KEPT_IN_PLACE or not (old or self._mapping.below):
            return False
        return self._copier.relocates(cluster)

    def _add_window(self, plan: _Plan, table: L2Table, write: tuple[int, int, int]) -> None:
        """Plans clusters for free entries that a write needs, and for the free ones around them."""
        _, low, high = write
        start, stop = self._preallocation.around(table.index, low, high)
        first, least = table.index * self._parts, self._preallocation.least
        # A window that has grown may overlap a planned one.
        for part in range(low // least - 1, start // least - 1, -1):
            if (other := plan.windows.get(first + part)) is not None:
                start = other.high
                break
        for part in range(low // least + 1, -(-stop // least)):
            if (other := plan.windows.get(first + part)) is not None:
                stop = other.low
                break
        free = self._free(table, start, stop)
        if not free.all():
            taken = np.flatnonzero(~free) + start
            after = int(np.searchsorted(taken, low))
            start = int(taken[after - 1]) + 1 if after else start
            stop = int(taken[after]) if after < taken.size else stop
        window = _Window(table, start, stop, start, [write])
        for part in range(start // least, -(-stop // least)):
            plan.windows[first + part] = window
        plan.order.append(window)

    def _is_free(self, table: L2Table, low: int, high: int) -> bool:
        """Whether all of the entries are free. One entry is checked without NumPy if possible."""
        if high - low == 1 and (self._mapping.below is None or table.entries[low]) and table.bitmaps is None:
            return not table.entries[low]
        return bool(self._free(table, low, high).all())

    def _free(self, table: L2Table, low: int, high: int) -> NDArray[np.bool_]:
        """Which of the entries [low, high) refer to no cluster and read as zeros."""
        free: NDArray[np.bool_] = table.entries[low:high] == 0
        if table.bitmaps is not None:
            free &= table.bitmaps[low:high] == 0
        if (zeros := self._mapping.zeros_below(table.index, low, high)) is not None:
            free &= zeros.reshape(-1, self._units).all(axis=1)
        return free

    def _give(self, windows: list[_Window], ready: list[int]) -> None:
        """Allocates clusters for the windows, in order, while there are long enough runs; adds the writes that have all
        their clusters.
        """
        left = sum(window.high - window.low for window in windows)
        at = 0
        while at < len(windows):
            window = windows[at]
            try:
                if self._mapping.room(left) * 2 < window.high - window.at:
                    return
                run = self._mapping.take(0, left)
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                return
            end = at
            count = 0
            while end < len(windows) and count < run.count:
                count += windows[end].high - windows[end].at
                end += 1
            self._give_run(run, windows[at:end])
            left -= run.count
            while at < end and windows[at].at == windows[at].high:
                ready.extend(number for number, _, _ in windows[at].writes)
                at += 1

    def _give_run(self, run: Run, windows: list[_Window]) -> None:
        """Uses a run for as much of the windows as it can hold."""
        self._mapping.make_zeros(run)
        entries = self._mapping.entries_for(run)
        given: list[tuple[_Window, int, int]] = []
        used = 0
        for window in windows:
            low, high = window.at, min(window.high, window.at + run.count - used)
            self._mapping.replace(window.table, low, high, entries[used : used + high - low], ALL_ALLOCATED)
            self._preallocation.given(window.table.index, low, high)
            given.append((window, low, used))
            used += high - low
            window.at = high
        told = self._mapping.places_from(run.first << self._bits, run.count)
        for window, low, at in given:
            for _, first, end in window.writes:
                self._preallocation.used(window.table.index, first, end)
            part = told[at * self._units : (at + window.at - low) * self._units]
            self._mapping.publish_places(window.table.index, low, part)

    def _copy(self, copies: dict[int, _Copy], ready: list[int]) -> None:
        """Allocates clusters and copies the old contents; adds the writes whose clusters were copied."""
        waiting = list(copies.items())
        while waiting:
            try:
                run = self._mapping.take(0, len(waiting))
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                return
            part, waiting = waiting[: run.count], waiting[run.count :]
            tried = 0
            try:
                for cluster, copy in part:
                    tried += 1
                    if self._copy_one(cluster, copy, run.first + tried - 1):
                        ready.extend(copy.writes)
            finally:
                if tried < run.count:
                    self._mapping.take_back(Run(run.first + tried, run.count - tried, False))

    def _copy_one(self, cluster: int, copy: _Copy, place: int) -> bool:
        """Copies a cluster to host cluster `place`. If that fails, frees `place` and returns False."""
        table, entry, host = copy.table, copy.entry, place << self._bits
        try:
            nothing = Payload(GuestOffset(cluster << self._bits), 0, None)
            copied = self._copier.relocate(cluster, self._bits, host, nothing)
        except OSError:  # the write meets the error again
            copied = False
        if not copied:
            self._mapping.take_back(Run(place, 1, False))
            return False
        self._mapping.replace(table, entry, entry + 1, host | COPIED, None)
        self._preallocation.used(table.index, entry, entry + 1)
        self._mapping.publish_run(table.index, entry, 1, host)
        return True
