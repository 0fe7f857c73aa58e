"""Discards, and writes of zeros that write no data, for whole tables at once with NumPy.

Both work on *units* (clusters, or subclusters in images with extended L2 entries). A unit that a discard covers only
partly is not changed; the part of a unit that zeros cover is written as data. Discarded ranges read as zeros: the
backing file must not become visible. Version 2 has no entry for zeros over a backing file; there a discard does
nothing. One thread (the mapper's). May fail: CorruptImage, OSError, FaultError (EOPNOTSUPP: fast zeros are not
possible).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from blkloom.errors import FaultError
from blkloom.image.qcow2.format.geometry import L1Index
from blkloom.image.qcow2.format.tables import ALL_ZERO, ALL_ZEROS, COMPRESSED, COPIED, OFFSET_WORD, Kind
from blkloom.image.qcow2.write.cow import Payload
from blkloom.image.runs import runs_alike
from blkloom.image.types import GuestOffset, HostOffset, Words

if TYPE_CHECKING:
    from blkloom.image.qcow2.state.image import L2Table
    from blkloom.image.qcow2.write.mapping import Mapping
    from blkloom.image.qcow2.write.preallocation import Preallocation
    from blkloom.image.qcow2.write.write_allocation import WriteAllocation

_COPIED: Final = np.uint64(COPIED)
_COMPRESSED: Final = np.uint64(COMPRESSED)
_ALL_ZERO: Final = np.uint64(ALL_ZERO)
_NONE: Final = np.uint64(0)
_HALF: Final = 32
_PIECE: Final = 1 << 20


class Discarder:
    """Discards and zeroes guest ranges of `mapping`."""

    def __init__(self, mapping: Mapping, allocation: WriteAllocation, preallocation: Preallocation) -> None:
        self._mapping = mapping
        self._allocation = allocation
        self._preallocation = preallocation
        self._layout = mapping.layout
        self._geometry = mapping.layout.geometry
        self._size = mapping.image.size
        self._raw = mapping.image.header.raw_data_file
        self._says_zero = mapping.layout.version >= 3 or mapping.below is None
        """Whether the format has an entry for a cluster that reads as zeros."""

    def discard(self, offset: int, length: int) -> None:
        """Discards a range: its contents are not needed any more."""
        low, high = self._whole_units(offset, length)
        if low >= high or not self._says_zero:
            return
        if self._raw:
            self._clear_data(low, high)
        else:
            self._zero_units(low, high, keep=False, partly=False)

    def write_zeroes(self, offset: int, length: int, *, keep: bool, fast: bool) -> None:
        """Makes the range read as zeros. keep: allocated clusters stay allocated. fast: fail rather than write data."""
        low, high = self._whole_units(offset, length)
        bits = self._geometry.unit_bits
        if low >= high:
            self._write_zeroes(offset, offset + length)
            return
        in_place = not self._says_zero or (keep and self._layout.version < 3)
        if in_place and fast and not self._raw:
            raise FaultError(errno.EOPNOTSUPP, "zeros must be written here")
        start, end = low << bits, min(high << bits, self._size)
        if offset < start:
            self._write_zeroes(offset, start)
        if self._raw:
            self._clear_data(low, high, keep=keep)
        elif in_place:
            self._write_zeroes(start, end)
        else:
            self._zero_units(low, high, keep=keep, partly=True)
        if end < offset + length:
            self._write_zeroes(end, offset + length)

    def _whole_units(self, offset: int, length: int) -> tuple[int, int]:
        """Units that the range covers completely; the last unit of the disk may be incomplete."""
        bits, end = self._geometry.unit_bits, offset + length
        return -(-offset >> bits), -(-end >> bits) if end >= self._size else end >> bits

    def _zero_units(self, low: int, high: int, *, keep: bool, partly: bool) -> None:
        """Zeroes units [low, high). partly: also units of compressed clusters of which other units remain."""
        per = self._geometry.units_a_cluster
        first, end = -(-low // per), high // per
        if high << self._geometry.unit_bits >= self._size:
            end = -(-high // per)
        if first > end:
            self._zero_subclusters(low // per, low % per, high % per, partly=partly)
            return
        if low < first * per:
            self._zero_subclusters(first - 1, low % per, per, partly=partly)
        for index, start, stop in self._mapping.pieces(first, end):
            self._zero_clusters(index, start, stop, keep=keep)
        if end * per < high:
            self._zero_subclusters(end, 0, high - end * per, partly=partly)

    def _zero_clusters(self, index: L1Index, low: int, high: int, *, keep: bool) -> None:
        """Zeroes entries [low, high) of a table."""
        mapping = self._mapping
        table = mapping.image.l2(index)
        if table is None:
            below = mapping.zeros_below(index, low, high)
            if below is None or below.all():
                return
            table = mapping.own(index)
        entries = table.entries[low:high]
        if entries.any():
            mapping.check(table, low, high)
        compressed = (entries & _COMPRESSED) != _NONE
        hosted = ((entries & OFFSET_WORD) != _NONE) | compressed
        if self._layout.data_file:
            hosted |= (entries & _COPIED) != _NONE
        says_zero = (entries & _ALL_ZERO != _NONE) if table.bitmaps is None else table.bitmaps[low:high] == ALL_ZEROS
        kept = np.zeros(entries.size, np.bool_)
        if keep:
            own = (entries & _COPIED) != _NONE
            kept = hosted & (own | self._layout.data_file) & ~compressed
            change = ~(kept & says_zero) if mapping.below else hosted & ~(kept & says_zero)
            change &= ~(says_zero & ~hosted & ~compressed)
        else:
            change = hosted if mapping.below is None else hosted | ~says_zero
        numbers = np.flatnonzero(change)
        if not numbers.size:
            return
        table = mapping.own(index)
        cut = slice(int(numbers[0]), int(numbers[-1]) + 1)
        low, high = low + cut.start, low + cut.stop
        change, kept, entries = change[cut], kept[cut] & change[cut], table.entries[low:high].copy()
        flag = _ALL_ZERO if self._layout.version >= 3 and table.bitmaps is None else _NONE
        new = np.where(change, np.where(kept, entries | flag, flag), entries)
        bitmaps = None if table.bitmaps is None else np.where(change, ALL_ZEROS, table.bitmaps[low:high])
        self._put(table, low, high, new, bitmaps, released=change & ~kept)

    def _put(
        self, table: L2Table, low: int, high: int, new: Words, bitmaps: Words | None, *, released: NDArray[np.bool_]
    ) -> None:
        """Replaces the entries [low, high) by `new`, and frees the clusters of the entries in `released`."""
        mapping = self._mapping
        old = table.entries[low:high].copy()
        mapping.give_back(table, old[released])
        table.entries[low:high] = new
        if table.bitmaps is not None and bitmaps is not None:
            table.bitmaps[low:high] = bitmaps
        mapping.changed(table, low, high)
        self._preallocation.used(table.index, low, high)
        mapping.publish(table, low, high)
        if self._layout.data_file:
            first = table.index * self._geometry.l2_entries + low
            for value, start, stop in runs_alike((released & (old != _NONE)).astype(np.uint8)):
                if value:
                    bits = self._geometry.cluster_bits
                    mapping.clear(first + start << bits, stop - start << bits)

    def _zero_subclusters(self, cluster: int, low: int, high: int, *, partly: bool) -> None:
        """Zeroes subclusters [low, high) of one cluster."""
        mapping = self._mapping
        index, number = divmod(cluster, self._geometry.l2_entries)
        bits = ((1 << high - low) - 1) << low
        per = self._geometry.units_a_cluster
        first = cluster * per + low
        units = mapping.image.units(first, high - low)
        below = mapping.below
        quiet = units.kinds == Kind.ZERO
        quiet |= (units.kinds == Kind.UNALLOCATED) if below is None else False
        if quiet.all():
            return
        if (units.kinds == Kind.INVALID).any():
            raise mapping.image.contradiction(first + int((units.kinds == Kind.INVALID).argmax()))
        if (units.kinds == Kind.COMPRESSED).any():
            if partly:
                self._write_zeroes(first << self._geometry.unit_bits, first + high - low << self._geometry.unit_bits)
            return
        table = mapping.own(L1Index(index))
        assert table.bitmaps is not None, "only extended images have subclusters"
        bitmap = (int(table.bitmaps[number]) & ~bits) | bits << _HALF
        if bitmap & 0xFFFF_FFFF:
            table.bitmaps[number] = bitmap
            mapping.changed(table, number, number + 1)
        else:
            mapping.replace(table, number, number + 1, 0, np.uint64(bitmap))
        self._preallocation.used(table.index, number, number + 1)
        mapping.publish(table, number, number + 1)

    def _write_zeroes(self, low: int, high: int) -> None:
        """Writes zeros to bytes [low, high) that do not already read as zeros."""
        bits = self._geometry.unit_bits
        high = min(high, self._size)
        for start in range(low, high, _PIECE):
            end = min(start + _PIECE, high)
            first, stop = start >> bits, -(-end >> bits)
            units = self._mapping.image.units(first, stop - first)
            zero = units.kinds == Kind.ZERO
            nothing = units.kinds == Kind.UNALLOCATED
            if self._mapping.below is not None:
                nothing &= self._mapping.below.zeros(first, stop - first)
            for value, one, other in runs_alike((zero | nothing).astype(np.uint8)):
                if not value:
                    self._write_zeroes_at(max(start, first + one << bits), min(end, first + other << bits))

    def _write_zeroes_at(self, low: int, high: int) -> None:
        """Writes zeros to bytes [low, high), none of which is in a unit that reads as zeros."""
        zeroes = Payload(GuestOffset(low), high - low, lambda: bytes(high - low))
        if self._allocation.prepare(zeroes):
            return
        bits = self._geometry.unit_bits
        first, stop = low >> bits, -(-high >> bits)
        withdrawn = self._mapping.withdraw(first, stop - first)
        try:
            for start, end, host in self._mapping.hosts(low, high):
                self._mapping.data.zero(HostOffset(host), end - start)
            self._mapping.filled()
        finally:
            if withdrawn:
                self._publish(first, stop)

    def _clear_data(self, low: int, high: int, *, keep: bool = False) -> None:
        """Zeroes the range in a raw data file, which alone must have the contents of the disk."""
        bits = self._geometry.unit_bits
        start, end = low << bits, min(high << bits, self._size)
        self._mapping.withdraw(low, high - low)
        try:
            if keep:
                self._mapping.data.zero(HostOffset(start), end - start)
                self._mapping.filled()
            else:
                self._mapping.clear(start, end - start)
        finally:
            self._publish(low, high)

    def _publish(self, low: int, high: int) -> None:
        """Updates units [low, high) in the engine's table, which may refer to a copy in memory, or may be withdrawn."""
        per = self._geometry.units_a_cluster
        for index, first, end in self._mapping.pieces(low // per, -(-high // per)):
            if table := self._mapping.image.l2(index):
                self._mapping.publish(table, first, end)
