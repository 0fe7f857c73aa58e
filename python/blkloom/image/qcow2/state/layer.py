"""One QCOW2 image as a layer of a chain.

The mapper's thread; jobs may run on any. May fail: CorruptImage, OSError.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
from typing_extensions import override

from blkloom.image import cluster_entries
from blkloom.image.layer import Job, Layer, Piece, Runs
from blkloom.image.qcow2.format.compressed import read_compressed
from blkloom.image.qcow2.format.geometry import L1Index
from blkloom.image.qcow2.format.tables import COMPRESSED, L1_RESERVED, OFFSET_MASK, Kind, Units
from blkloom.image.qcow2.state.bitmaps import Bitmaps, sound_bitmaps
from blkloom.image.types import HostOffset, Words

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from blkloom.image.errors import CorruptImage
    from blkloom.image.qcow2.state.image import Image

_DATA: Final = int(Kind.DATA)
_COMPRESSED: Final = int(Kind.COMPRESSED)
_UNALLOCATED: Final = int(Kind.UNALLOCATED)
_INVALID: Final = int(Kind.INVALID)
_L1_USED: Final = np.uint64(OFFSET_MASK | L1_RESERVED)
"""Bits of an entry that refers to a table or is invalid."""


class ImageLayer(Layer):
    """A QCOW2 image as a layer. snapshot: the id or name of the internal snapshot that is shown. writable: the engine
    may write to data with refcount 1. guarded: returns which units (first, count) it must not write to even then, so
    that the first write to them is noticed.
    """

    def __init__(self, number: int, image: Image, *, snapshot: str = "") -> None:
        geometry = image.geometry
        super().__init__(
            number,
            image.data_storage,
            size=image.size,
            unit_bits=geometry.unit_bits,
            cluster_bits=geometry.cluster_bits,
        )
        self.image: Final = image
        self.writable = False
        self.guarded: Callable[[int, int], NDArray[np.bool_]] | None = None
        self._snapshot = snapshot
        self._bitmaps: Bitmaps | None = None
        self._bitmaps_read = False
        tag = cluster_entries.file_field(number)
        self._meanings = np.array(
            [
                cluster_entries.SHOWS_THROUGH,
                cluster_entries.ZERO,
                cluster_entries.READ_ONLY | tag,
                cluster_entries.IN_MEMORY | tag,
                cluster_entries.CORRUPT | tag,
            ],
            np.uint64,
        )

    @property
    @override
    def path(self) -> str:
        return self.image.path

    @override
    def entries(self, first: int, count: int, unit_bits: int) -> Words:
        shift = self.unit_bits - unit_bits
        low, high = first >> shift, -(-(first + count) >> shift)
        found = cluster_entries.spread(self._own_entries(low, high - low), shift, unit_bits)
        found = found[first - (low << shift) :][:count]
        # The guest cannot read past the end of the top layer.
        return self._with_end(found, first, unit_bits) if self.number else found

    def _own_entries(self, low: int, count: int) -> Words:
        units = self.image.units(low, count)
        found = self._meanings[units.kinds]
        data = units.kinds == _DATA
        if not data.any():
            return found
        if self.writable:
            # Clusters of an external data file have one reference, for any value of the bit.
            free = data & (units.copied | self.image.header.has_data_file)
            if self.guarded:
                free &= ~self.guarded(low, count)
            found[free] = cluster_entries.DATA | cluster_entries.file_field(self.number)
        found[data] |= units.offsets[data] >> cluster_entries.SECTOR_SHIFT
        self._end_of_file(units, data, found, low)
        return found

    def _end_of_file(self, units: Units, data: NDArray[np.bool_], found: Words, low: int) -> None:
        """Units with data past the end of the file; an external data file may be shorter than the disk."""
        image = self.image
        size = image.data_storage.size()
        ends = units.offsets + np.uint64(image.geometry.unit)
        if self.number == 0:
            # The guest cannot read past the disk's end, and a raw data file has nothing there.
            whole, rest = divmod(self.size, image.geometry.unit)
            if rest and 0 <= whole - low < ends.size:
                ends[whole - low] -= np.uint64(image.geometry.unit - rest)
        cut = data & (ends > size)
        if not cut.any():
            return
        found[cut] = cluster_entries.IN_MEMORY | cluster_entries.file_field(self.number)
        if image.header.has_data_file:
            found[cut & (units.offsets >= size)] = cluster_entries.ZERO

    @override
    def fill(self, out: bytearray, origin: int, pieces: list[Piece]) -> list[Piece]:
        below: list[Piece] = []
        for low, high in pieces:
            end = min(high, self.size) if self.number else high
            if low < end:
                self._fill_piece(out, origin, low, end, below)
        return below

    def _fill_piece(self, out: bytearray, origin: int, low: int, high: int, below: list[Piece]) -> None:
        bits = self.unit_bits
        first, end = low >> bits, -(-high >> bits)
        units = self.image.units(first, end - first)
        for start, stop in _runs(units, 1 << bits):
            at, until = max(first + start << bits, low), min(first + stop << bits, high)
            kind = int(units.kinds[start])
            if kind == _DATA:
                skip = at - (first + start << bits)
                place = HostOffset(int(units.offsets[start]) + skip)
                out[at - origin : until - origin] = self.image.data_storage.read(place, until - at)
            elif kind == _COMPRESSED:
                self._fill_compressed(out, origin, at, until)
            elif kind == _INVALID:
                raise self.image.contradiction(first + start)
            elif kind == _UNALLOCATED:
                below.append((at, until))

    def _fill_compressed(self, out: bytearray, origin: int, low: int, high: int) -> None:
        bits = self.cluster_bits
        for cluster in range(low >> bits, -(-high >> bits)):
            job = self.compressed(cluster)
            assert job is not None, "its entry says so"
            at, until = max(cluster << bits, low), min(cluster + 1 << bits, high)
            out[at - origin : until - origin] = job()[at - (cluster << bits) :][: until - at]

    @override
    def holds(self, first: int, count: int, unit_bits: int) -> NDArray[np.bool_]:
        shift = self.unit_bits - unit_bits
        low, high = first >> shift, -(-(first + count) >> shift)
        own = self.image.units(low, high - low).kinds != _UNALLOCATED
        return np.repeat(own, 1 << shift)[first - (low << shift) :][:count]

    @override
    def unallocated(self, first: int, count: int, unit_bits: int) -> int:
        """Uses only the L1 table."""
        span = self.image.geometry.l2_units << self.unit_bits - unit_bits
        index = first // span
        entries = self.image.l1[index : -(-(first + count) // span)]
        used = np.flatnonzero(entries & _L1_USED)
        return max((index + int(used[0])) * span - first, 0) if used.size else count

    @override
    def compressed(self, cluster: int) -> Job | None:
        image, geometry = self.image, self.image.geometry
        index, number = divmod(cluster, geometry.l2_entries)
        table = image.l2(L1Index(index)) if index < len(image.l1) else None
        if table is None or not (entry := int(table.entries[number])) & COMPRESSED or image.header.has_data_file:
            return None
        storage, bits, compression = image.data_storage, geometry.cluster_bits, image.header.compression
        return lambda: read_compressed(storage, entry, bits, compression)

    @override
    def dirty_bitmaps(self) -> Mapping[str, Runs | None] | None:
        """None for a snapshot, because bitmaps describe another state. If there are several of the same name, the first
        one counts.
        """
        if not self._bitmaps_read:
            self.follow(None if self._snapshot else sound_bitmaps(self.image))
        if (bitmaps := self._bitmaps) is None:
            return None
        found: dict[str, Runs | None] = {}
        for bitmap in bitmaps.all:
            found.setdefault(bitmap.name, partial(bitmaps.runs, bitmap) if bitmap.readable else None)
        return found

    def follow(self, bitmaps: Bitmaps | None) -> None:
        """Uses the writer's dirty bitmaps from now on."""
        self._bitmaps, self._bitmaps_read = bitmaps, True

    @property
    @override
    def wants_check(self) -> bool:
        return self.image.wants_check

    @override
    def contradiction(self, unit: int) -> CorruptImage:
        return self.image.contradiction(unit)

    @override
    def report(self, error: CorruptImage) -> None:
        self.image.report(error)

    @override
    def on_report(self, told: Callable[[CorruptImage], None]) -> None:
        self.image.reported = told


def _runs(units: Units, step: int) -> list[tuple[int, int]]:
    """Runs of neighbouring units of one kind; data units only if they are contiguous."""
    kinds = units.kinds
    breaks = kinds[1:] != kinds[:-1]
    breaks |= (kinds[1:] == _DATA) & (units.offsets[1:] != units.offsets[:-1] + np.uint64(step))
    cuts = (np.flatnonzero(breaks) + 1).tolist()
    return list(zip([0, *cuts], [*cuts, kinds.size], strict=True))
