"""One layer of a chain: an image or a raw file, and what it holds of the guest's disk.

A layer answers in entries of the engine's table (`places`), in Python bytes (`fill`), and gives jobs that make what
the engine cannot read by itself (`job`). Where it holds nothing, the layer below shows through; past its own end it
reads as zeros. The mapper's thread; jobs may run on any. May fail: CorruptImage, OSError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from blkloom.qcow2 import places
from blkloom.qcow2.compressed import read_compressed
from blkloom.qcow2.tables import COMPRESSED, L1_RESERVED, OFFSET_MASK, Kind, Units
from blkloom.qcow2.types import HostOffset, L1Index, Words

if TYPE_CHECKING:
    from blkloom.qcow2.image import Image
    from blkloom.qcow2.storage import Storage

Job: TypeAlias = Callable[[], bytes]
Piece: TypeAlias = tuple[int, int]
"""(guest offset, end), bytes."""

_DATA: Final = int(Kind.DATA)
_COMPRESSED: Final = int(Kind.COMPRESSED)
_UNALLOCATED: Final = int(Kind.UNALLOCATED)
_INVALID: Final = int(Kind.INVALID)
_L1_USED: Final = np.uint64(OFFSET_MASK | L1_RESERVED)
"""Of an entry that leads somewhere, or cannot be."""


class Layer(Protocol):
    """number: which layer, from the top; also the number of its file in the engine's table. size: bytes of the disk
    it holds. unit_bits: the finest it maps. cluster_bits: how much of it is made in memory at once.
    """

    number: int
    size: int
    unit_bits: int
    cluster_bits: int

    @property
    def path(self) -> str:
        """Of its file."""

    def places(self, first: int, count: int, unit_bits: int) -> Words:
        """Entries of `count` units of `1 << unit_bits` bytes from unit `first` on."""

    def fill(self, out: bytearray, origin: int, pieces: list[Piece]) -> list[Piece]:
        """Puts what it holds of the pieces into `out`, which begins at `origin` and is zeros, and returns those that
        show through. Raises CorruptImage, OSError.
        """

    def holds(self, first: int, count: int, unit_bits: int) -> NDArray[np.bool_]:
        """Of units as of `places`, those that it says something of, were it zeros: nothing below shows through."""

    def unallocated(self, first: int, count: int, unit_bits: int) -> int:
        """How many of `count` units from `first` on it certainly says nothing of, 0 where that takes a closer look."""

    @property
    def data(self) -> Storage:
        """What entries of `places` lead to."""

    def compressed(self, cluster: int) -> Job | None:
        """What makes the cluster, if it is compressed."""


class RawLayer:
    """A raw file at the bottom of a chain."""

    def __init__(self, number: int, storage: Storage) -> None:
        self.number = number
        self._storage = storage
        self.size = storage.size()
        self.unit_bits = 21
        self.cluster_bits = 9

    @property
    def path(self) -> str:
        """Of the file."""
        return self._storage.path

    def places(self, first: int, count: int, unit_bits: int) -> Words:
        """See `Layer.places`."""
        numbers = np.arange(first, first + count, dtype=np.uint64)
        found = (numbers << np.uint64(unit_bits - 9)) | places.READ_ONLY | places.file_field(self.number)
        return _ended(found, first, self.size, unit_bits, self.number)

    def fill(self, out: bytearray, origin: int, pieces: list[Piece]) -> list[Piece]:
        """See `Layer.fill`."""
        for low, high in pieces:
            end = min(high, self.size)
            if low < end:
                out[low - origin : end - origin] = self._storage.read(HostOffset(low), end - low)
        return []

    def holds(self, first: int, count: int, unit_bits: int) -> NDArray[np.bool_]:
        """See `Layer.holds`."""
        return np.ones(count, np.bool_)

    def unallocated(self, first: int, count: int, unit_bits: int) -> int:
        """See `Layer.unallocated`."""
        return 0

    @property
    def data(self) -> Storage:
        """See `Layer.data`."""
        return self._storage

    def compressed(self, cluster: int) -> Job | None:
        """Nothing is."""
        return None


class ImageLayer:
    """A QCOW2 image. writable: data that is used once may be written by the engine. guarded: given units (first,
    count) of the image, those that must not be even so, so that the first write to them is noticed.
    """

    def __init__(self, number: int, image: Image) -> None:
        self.number = number
        self.image: Final = image
        self.size = image.size
        self.unit_bits = image.geometry.unit_bits
        self.cluster_bits = image.geometry.cluster_bits
        self.writable = False
        tag = places.file_field(number)
        self._meanings = np.array(
            [
                places.SHOWS_THROUGH,
                places.ZERO,
                places.READ_ONLY | tag,
                places.IN_MEMORY | tag,
                places.CORRUPT | tag,
            ],
            np.uint64,
        )
        self.guarded: Callable[[int, int], NDArray[np.bool_]] | None = None

    @property
    def path(self) -> str:
        """Of the image file."""
        return self.image.path

    def places(self, first: int, count: int, unit_bits: int) -> Words:
        """See `Layer.places`."""
        shift = self.unit_bits - unit_bits
        low, high = first >> shift, -(-(first + count) >> shift)
        found = places.spread(self._own_places(low, high - low), shift, unit_bits)
        found = found[first - (low << shift) :][:count]
        # The guest cannot ask past the end of the top layer.
        return _ended(found, first, self.size, unit_bits, self.number) if self.number else found

    def _own_places(self, low: int, count: int) -> Words:
        units = self.image.units(low, count)
        found = self._meanings[units.kinds]
        data = units.kinds == _DATA
        if not data.any():
            return found
        if self.writable:
            # An external data file is nobody else's, whatever the bit says.
            free = data & (units.copied | self.image.header.has_data_file)
            if self.guarded:
                free &= ~self.guarded(low, count)
            found[free] = places.DATA | places.file_field(self.number)
        found[data] |= units.offsets[data] >> places.SECTOR_SHIFT
        self._end_of_file(units, data, found, low)
        return found

    def _end_of_file(self, units: Units, data: NDArray[np.bool_], found: Words, low: int) -> None:
        """Data that the file does not have all of; an external data file may have none of it."""
        image = self.image
        size = image.data_storage.size()
        ends = units.offsets + np.uint64(image.geometry.unit)
        if self.number == 0:
            # The guest cannot ask past the disk's end, and a raw data file has nothing there.
            whole, rest = divmod(self.size, image.geometry.unit)
            if rest and 0 <= whole - low < ends.size:
                ends[whole - low] -= np.uint64(image.geometry.unit - rest)
        cut = data & (ends > size)
        if not cut.any():
            return
        found[cut] = places.IN_MEMORY | places.file_field(self.number)
        if image.header.has_data_file:
            found[cut & (units.offsets >= size)] = places.ZERO

    def fill(self, out: bytearray, origin: int, pieces: list[Piece]) -> list[Piece]:
        """See `Layer.fill`."""
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

    def holds(self, first: int, count: int, unit_bits: int) -> NDArray[np.bool_]:
        """See `Layer.holds`."""
        shift = self.unit_bits - unit_bits
        low, high = first >> shift, -(-(first + count) >> shift)
        own = self.image.units(low, high - low).kinds != _UNALLOCATED
        return np.repeat(own, 1 << shift)[first - (low << shift) :][:count]

    def unallocated(self, first: int, count: int, unit_bits: int) -> int:
        """See `Layer.unallocated`. Looks at the L1 table only."""
        span = self.image.geometry.l2_units << self.unit_bits - unit_bits
        index = first // span
        entries = self.image.l1[index : -(-(first + count) // span)]
        used = np.flatnonzero(entries & _L1_USED)
        return max((index + int(used[0])) * span - first, 0) if used.size else count

    @property
    def data(self) -> Storage:
        """See `Layer.data`."""
        return self.image.data_storage

    def compressed(self, cluster: int) -> Job | None:
        """See `Layer.compressed`."""
        image, geometry = self.image, self.image.geometry
        index, number = divmod(cluster, geometry.l2_entries)
        table = image.l2(L1Index(index)) if index < len(image.l1) else None
        if table is None or not (entry := int(table.entries[number])) & COMPRESSED or image.header.has_data_file:
            return None
        storage, bits, compression = image.data_storage, geometry.cluster_bits, image.header.compression
        return lambda: read_compressed(storage, entry, bits, compression)


def _ended(found: Words, first: int, size: int, unit_bits: int, number: int) -> Words:
    """Past the layer's end are zeros, and a unit that it ends in is made in memory."""
    whole, rest = divmod(size, 1 << unit_bits)
    if first + found.size > whole:
        found[max(whole - first, 0) :] = places.ZERO
        if rest and whole >= first:
            found[whole - first] = places.IN_MEMORY | places.file_field(number)
    return found


def _runs(units: Units, step: int) -> list[tuple[int, int]]:
    """Neighbours of one kind, data only as far as it is in one piece."""
    kinds = units.kinds
    breaks = kinds[1:] != kinds[:-1]
    breaks |= (kinds[1:] == _DATA) & (units.offsets[1:] != units.offsets[:-1] + np.uint64(step))
    cuts = (np.flatnonzero(breaks) + 1).tolist()
    return list(zip([0, *cuts], [*cuts, kinds.size], strict=True))
