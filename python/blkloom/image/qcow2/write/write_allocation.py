"""Write allocation: after it, every cluster of a write is allocated, may be written in place, and has its old contents
or already the new data.

A fault costs a few NumPy operations on a window of an L2 table. Only clusters that need a copy are handled one by one
in Python. One thread (the mapper's). May fail: CorruptImage, OSError (ENOSPC).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from blkloom.image.qcow2.format.geometry import SUBCLUSTERS, L1Index
from blkloom.image.qcow2.format.tables import (
    ALL_ALLOCATED,
    ALL_ZERO,
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    OFFSET_WORD,
    subcluster_bits,
)
from blkloom.image.qcow2.write import write_classification
from blkloom.image.qcow2.write.allocation import Run
from blkloom.image.qcow2.write.write_classification import classify_writes, touched_by
from blkloom.image.runs import runs_alike
from blkloom.image.storage import NO_ROOM
from blkloom.image.types import Words

if TYPE_CHECKING:
    from blkloom.image.qcow2.state.image import L2Table
    from blkloom.image.qcow2.state.overlap_check import OverlapCheck
    from blkloom.image.qcow2.write.cow import Copier, Payload
    from blkloom.image.qcow2.write.mapping import Mapping
    from blkloom.image.qcow2.write.preallocation import Preallocation

_COPIED: Final = np.uint64(COPIED)
_COMPRESSED: Final = np.uint64(COMPRESSED)
_OWN_OR_MADE: Final = np.uint64(COPIED | COMPRESSED | ALL_ZERO)
_NOT_ZERO: Final = ~np.uint64(ALL_ZERO)
_NONE: Final = np.uint64(0)
_HALF: Final = np.uint64(32)


class WriteAllocation:
    """Allocation for writes to `mapping`."""

    def __init__(self, mapping: Mapping, copier: Copier, preallocation: Preallocation, overlaps: OverlapCheck) -> None:
        self._mapping = mapping
        self._copier = copier
        self._preallocation = preallocation
        self._overlaps = overlaps
        geometry = mapping.layout.geometry
        self._bits: Final = geometry.cluster_bits
        self._unit_bits: Final = geometry.unit_bits
        self._per_table: Final = geometry.l2_entries

    def prepare(self, payload: Payload) -> bool:
        """Prepares the write of `payload`. Returns whether all of it has been written already."""
        done = True
        low, high = payload.offset >> self._bits, -(-payload.end >> self._bits)
        for index, first, end in self._mapping.pieces(low, high):
            done &= self._prepare(index, first, end, payload)
        return done

    def _prepare(self, index: L1Index, low: int, high: int, payload: Payload) -> bool:
        """Prepares a write to entries [low, high) of one table."""
        table = self._mapping.own(index)
        if high - low == 1 and self._relocated(table, low, payload):
            return payload.at_hand
        start, end = (low, high) if self._mapping.below else self._preallocation.around(index, low, high)
        places = self._places(table, start, end, payload)
        if self._mapping.below and (places == write_classification.ZEROS).any():
            start, end = self._preallocation.around(index, low, high)
            places = self._places(table, start, end, payload)
        done = True
        for how, first, stop in runs_alike(places):
            wide, far = first + start, stop + start
            first, stop = max(wide, low), min(far, high)
            if first >= stop:
                continue
            done &= how == write_classification.COPY and payload.at_hand
            if how == write_classification.ZEROS:
                self._give(table, wide, far, first, stop)
            elif how == write_classification.COPY:
                self._copy(table, first, stop, payload)
            elif how == write_classification.IN_PLACE:
                self._check(table, first, stop)
                self._complete(table, first, stop, payload)
            elif how == write_classification.READY:
                self._check(table, first, stop)
                self._mapping.publish(table, first, stop)
            else:
                raise self._mapping.contradiction(table, first)
        return done

    def _relocated(self, table: L2Table, number: int, payload: Payload) -> bool:
        """Fast path for the most frequent copy: of a data cluster that belongs to the backing chain or is shared, for a
        write to a part of it. Returns False in all other cases.
        """
        old = table.entries[number]
        if table.bitmaps is not None or old & _OWN_OR_MADE or (old and self._mapping.layout.data_file):
            return False
        cluster = table.index * self._per_table + number
        start = cluster << self._bits
        if payload.covers(start, start + (1 << self._bits)) or not self._copier.relocates(cluster):
            return False
        run = self._mapping.take(cluster, 1)
        host = run.first << self._bits
        try:
            relocated = self._copier.relocate(cluster, self._bits, host, payload)
        except OSError:
            self._mapping.take_back(run)
            raise
        if not relocated:
            self._mapping.take_back(run)
            return False
        self._mapping.replace(table, number, number + 1, host | COPIED, None)
        self._preallocation.used(table.index, number, number + 1)
        self._mapping.publish_run(table.index, number, 1, host)
        return True

    def _places(self, table: L2Table, low: int, high: int, payload: Payload) -> NDArray[np.uint8]:
        bitmaps = None if table.bitmaps is None else table.bitmaps[low:high]
        touched = None if bitmaps is None else self._touched(table.index, low, high, payload)
        zeros_below = self._mapping.zeros_below(table.index, low, high)
        end = self._mapping.image.data_end
        return classify_writes(self._mapping.layout, table.entries[low:high], bitmaps, touched, zeros_below, end)

    def _touched(self, index: L1Index, low: int, high: int, payload: Payload) -> NDArray[np.bool_]:
        first = index * self._per_table + low
        return touched_by(payload.offset >> self._unit_bits, -(-payload.end >> self._unit_bits), first, high - low)

    def _check(self, table: L2Table, low: int, high: int) -> None:
        """Checks that the guest is not about to write to metadata."""
        if self._mapping.layout.data_file:
            return
        hosts = (table.entries[low:high] & OFFSET_WORD) >> np.uint64(self._bits)
        wrong = self._overlaps.data(hosts)
        if wrong.any():
            number = int(wrong.argmax())
            raise self._mapping.image.corrupt(
                f"L2 table {table.index}: entry {low + number} puts data at"
                f" {int(hosts[number]) << self._bits:#x}, where metadata is"
            )

    def _give(self, table: L2Table, wide: int, far: int, low: int, high: int) -> None:
        """Allocates clusters for [wide, far), which reads as zeros; the write needs [low, high) of it."""
        if self._in_crumbs(far - wide):
            wide, far = low, high
        at = wide
        while at < far:
            try:
                if at >= high and self._in_crumbs(far - at):
                    return
                run = self._mapping.take(table.index * self._per_table + at, far - at)
            except OSError as error:
                if error.errno not in NO_ROOM or (at, far) == (low, high):
                    raise
                # Continue without the neighbours.
                if at >= high:
                    return
                at, far = max(at, low), high
                run = self._mapping.take(table.index * self._per_table + at, far - at)
            self._give_run(table, at, run, low, high)
            at += run.count

    def _in_crumbs(self, count: int) -> bool:
        """Whether less than half of so many clusters could be allocated in two runs: then neighbours are not
        preallocated.
        """
        return self._mapping.room(count) * 2 < count

    def _give_run(self, table: L2Table, at: int, run: Run, low: int, high: int) -> None:
        self._mapping.make_zeros(run)
        end = at + run.count
        self._mapping.replace(table, at, end, self._mapping.entries_for(run), ALL_ALLOCATED)
        self._preallocation.given(table.index, at, min(end, low))
        self._preallocation.used(table.index, max(at, low), min(end, high))
        self._preallocation.given(table.index, max(at, high), end)
        self._mapping.publish_run(table.index, at, run.count, run.first << self._bits)

    def _copy(self, table: L2Table, low: int, high: int, payload: Payload) -> None:
        """Allocates new clusters for [low, high) and copies the contents."""
        at = low
        while at < high:
            run = self._mapping.take(table.index * self._per_table + at, high - at)
            try:
                self._copy_run(table, at, run, payload)
            except OSError:
                self._mapping.take_back(run)
                raise
            at += run.count

    def _copy_run(self, table: L2Table, at: int, run: Run, payload: Payload) -> None:
        end = at + run.count
        first = table.index * self._per_table + at
        start, stop = first << self._bits, first + run.count << self._bits
        low, high = start, stop
        bitmaps: Words | None = None
        old = table.entries[at:end]
        if table.bitmaps is not None:
            # Data of this image moves as a whole; data of the backing chain is copied only where the write touches it.
            whole = ((old & _COMPRESSED) != _NONE) | ((old & OFFSET_WORD) != _NONE)
            touched = self._touched(table.index, at, end, payload)
            touched[whole] = True
            new = subcluster_bits(touched)
            kept = np.where(whole, _NONE, table.bitmaps[at:end]) >> _HALF & ~new
            bitmaps = new | kept << _HALF
            units = np.flatnonzero(touched.reshape(-1))
            low = start + (int(units[0]) << self._unit_bits)
            high = start + (int(units[-1]) + 1 << self._unit_bits)
        host = run.first << self._bits
        nothing = not old.any() and (table.bitmaps is None or not table.bitmaps[at:end].any())
        below = self._mapping.below if nothing else None
        self._copier.fill(low, high, host + low - start, payload, zeroed=run.zeroed, below=below)
        self._mapping.replace(table, at, end, self._mapping.entries_for(run), bitmaps)
        self._preallocation.used(table.index, at, end)
        if bitmaps is None:
            self._mapping.publish_run(table.index, at, run.count, host)
        else:
            self._mapping.publish(table, at, end)

    def _complete(self, table: L2Table, low: int, high: int, payload: Payload) -> None:
        """Completes allocated clusters that do not have the contents that they read as."""
        if table.bitmaps is None:
            hosts = table.entries[low:high] & OFFSET_WORD
            for first, count in _adjacent(hosts, 1 << self._bits):
                self._mapping.clear(int(hosts[first]), count << self._bits)
            table.entries[low:high] = (table.entries[low:high] & _NOT_ZERO) | _COPIED
        else:
            touched = self._touched(table.index, low, high, payload)
            for number in range(low, high):
                self._complete_cluster(table, number, touched[number - low], payload)
        self._mapping.changed(table, low, high)
        self._preallocation.used(table.index, low, high)
        self._mapping.publish(table, low, high)

    def _complete_cluster(self, table: L2Table, number: int, touched: NDArray[np.bool_], payload: Payload) -> None:
        """Completes the missing subclusters, and only those: the engine may be writing to the others."""
        assert table.bitmaps is not None, "the image is extended"
        bitmap = int(table.bitmaps[number])
        guest = table.index * self._per_table + number << self._bits
        host = int(table.entries[number]) & OFFSET_MASK
        missing = np.flatnonzero(touched & ((bitmap & 0xFFFF_FFFF) >> np.arange(SUBCLUSTERS) & 1 == 0))
        for part in np.split(missing, np.flatnonzero(np.diff(missing) != 1) + 1):
            low, high = int(part[0]) << self._unit_bits, int(part[-1]) + 1 << self._unit_bits
            self._copier.fill(guest + low, guest + high, host + low, payload, zeroed=False)
            done = (1 << part.size) - 1 << int(part[0])
            bitmap = (bitmap | done) & ~(done << SUBCLUSTERS)
        self._mapping.filled()
        table.bitmaps[number] = bitmap


def _adjacent(hosts: Words, step: int) -> list[tuple[int, int]]:
    """Contiguous runs (first, count) of entries."""
    cuts = [0, *(np.flatnonzero(np.diff(hosts) != step) + 1).tolist(), hosts.size]
    return [(low, high - low) for low, high in itertools.pairwise(cuts)]
