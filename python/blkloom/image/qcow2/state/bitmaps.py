"""Persistent dirty bitmaps: read, kept up to date while the image is written, or marked as not up to date.

A bitmap with the *auto* flag records every change of the disk. Before the first write it is marked *in_use* on disk
(`begin`). Its bits are then kept in memory; `store_bits` writes them and `end` removes the mark. After a crash the mark
stays, so that no program relies on the bitmap. To notice writes by the engine, `unseen` ranges are installed as
read-only until their bits are set. A bitmap that is already in use, disabled, has unknown extra data, or is too large
for memory is not changed, but a large enabled one is marked in_use, too. `readable` and `runs` use the bits in memory
if there are any. One thread (the mapper's). May fail: CorruptImage, OSError.

Source: QEMU docs/interop/qcow2, "Bitmaps extension" and "Bitmaps".
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from blkloom.image.errors import CorruptImage
from blkloom.image.qcow2.format.header import BITMAPS, BITMAPS_LIMIT, Autoclear, ExtensionKind
from blkloom.image.qcow2.format.tables import OFFSET_WORD
from blkloom.image.runs import runs_alike
from blkloom.image.types import HostOffset

if TYPE_CHECKING:
    from blkloom.image.qcow2.state.image import Image
    from blkloom.image.storage import Storage

IN_USE: Final = 1
AUTO: Final = 2
EXTRA_DATA_COMPATIBLE: Final = 4

_ENTRY: Final = struct.Struct(">QIIBBHI")
_FLAGS_AT: Final = 12
_DIRECTORY_LIMIT: Final = BITMAPS_LIMIT * (_ENTRY.size + 1023)
_TABLE_LIMIT: Final = 0x8000000 // 8
_TABLES_LIMIT: Final = 2 * 0x8000000
"""Maximum bytes of all tables; QEMU has this limit for each."""
_MEMORY_LIMIT: Final = 64 << 20
"""Maximum bytes of bits in memory, for all bitmaps together."""
_MOST_LOOKED_AT: Final = 1 << 24
"""Maximum number of granules examined for one query, because other requests wait for it."""

_SECTOR_MASK: Final = 511
_ALL_ONES: Final = np.uint64(1)


@dataclass(slots=True)
class Bitmap:
    """One entry of the bitmap directory. `at`: offset of the entry in the file."""

    name: str
    at: int
    table_offset: HostOffset
    table_size: int
    flags: int
    granularity_bits: int
    extra_data_size: int
    bits: NDArray[np.uint8] | None = field(default=None, repr=False)
    """Eight granules per byte, least significant first, if the bits are in memory."""

    @property
    def usable(self) -> bool:
        """Whether its contents on disk are valid."""
        return not self.flags & IN_USE and (not self.extra_data_size or bool(self.flags & EXTRA_DATA_COMPATIBLE))

    @property
    def readable(self) -> bool:
        """Whether the known contents of the bitmap are valid: on disk, or in memory."""
        return self.usable or self.bits is not None

    @property
    def enabled(self) -> bool:
        """Whether it records changes."""
        return bool(self.flags & AUTO)


def read_directory(storage: Storage, extension: bytes, *, cluster_bits: int, disk_size: int) -> list[Bitmap]:
    """Reads the bitmaps that the header extension `extension` (0x23852875) refers to; the header parser has checked its
    numbers. Raises CorruptImage.
    """

    def corrupt(what: str) -> CorruptImage:
        return CorruptImage(f"bitmaps: {what}", path=storage.path)

    count, _, size, offset = BITMAPS.unpack(extension)
    if size > _DIRECTORY_LIMIT or offset + size > storage.size():
        raise corrupt(
            f"{count} bitmaps in a directory of {size} bytes at {offset:#x}; {_DIRECTORY_LIMIT} bytes are most, and "
            f"the file has {storage.size()}"
        )
    directory = storage.read(HostOffset(offset), size)
    found: list[Bitmap] = []
    at = tables = 0
    for _ in range(count):
        if at + _ENTRY.size > size:
            raise corrupt(f"the directory of {size} bytes ends within entry {len(found)}, which begins at byte {at}")
        table_offset, table_size, flags, kind, granularity_bits, name_size, extra = _ENTRY.unpack_from(directory, at)
        name_at = at + _ENTRY.size + extra
        if name_at + name_size > size or not 0 < name_size <= 1023:
            raise corrupt(
                f"entry {len(found)} has a name of {name_size} bytes (1 to 1023) and ends at byte "
                f"{name_at + name_size} of a directory of {size}"
            )
        name = directory[name_at : name_at + name_size].decode("utf-8", "backslashreplace")
        bitmap = Bitmap(name, offset + at, HostOffset(table_offset), table_size, flags, granularity_bits, extra)
        if kind != 1 or flags & ~7 or not 9 <= granularity_bits <= 31:
            raise corrupt(
                f"'{name}' has type {kind}, flags {flags:#x}, granularity 2^{granularity_bits}; the type is 1, flags "
                "are 0 to 0x7, the granularity is 2^9 to 2^31"
            )
        if table_offset % (1 << cluster_bits) or not table_offset or not 0 < table_size <= _TABLE_LIMIT:
            raise corrupt(
                f"'{name}' has a table of {table_size} entries at {table_offset:#x}; 1 to {_TABLE_LIMIT} can be, at a "
                f"multiple of {1 << cluster_bits:#x} that is not 0"
            )
        if table_offset + table_size * 8 > storage.size():
            raise corrupt(
                f"the table of '{name}' ends at {table_offset + table_size * 8:#x}, past the end of the file "
                f"({storage.size():#x})"
            )
        tables += table_size * 8
        if tables > _TABLES_LIMIT:
            raise corrupt(f"the tables of the first {len(found) + 1} take {tables} bytes; {_TABLES_LIMIT} are most")
        if bitmap.usable and table_size << cluster_bits < _bytes_of(disk_size, granularity_bits):
            raise corrupt(
                f"'{name}' has {table_size << cluster_bits} bytes of bits; the disk of {disk_size} bytes needs "
                f"{_bytes_of(disk_size, granularity_bits)}"
            )
        found.append(bitmap)
        at += -(-(_ENTRY.size + extra + name_size) // 8) * 8
    return found


def open_bitmaps(image: Image) -> Bitmaps:
    """Bitmaps of `image`; none if the header does not have the autoclear bit for them. Raises CorruptImage, OSError."""
    geometry, header = image.geometry, image.header
    extension = header.extension(ExtensionKind.BITMAPS)
    found = []
    if extension is not None and header.autoclear & Autoclear.BITMAPS:
        found = read_directory(image.storage, extension, cluster_bits=geometry.cluster_bits, disk_size=image.size)
    return Bitmaps(
        image.storage,
        found,
        cluster_bits=geometry.cluster_bits,
        unit_bits=geometry.unit_bits,
        disk_size=image.size,
    )


def sound_bitmaps(image: Image) -> Bitmaps | None:
    """As `open_bitmaps`, but None for invalid bitmaps, which are logged: the disk is still readable."""
    try:
        return open_bitmaps(image)
    except CorruptImage as error:
        image.report(error)
        return None


class Bitmaps:
    """The bitmaps of an image, in units of `1 << unit_bits` bytes. They change only after `begin`."""

    def __init__(
        self, storage: Storage, bitmaps: list[Bitmap], *, cluster_bits: int, unit_bits: int, disk_size: int
    ) -> None:
        self._storage = storage
        self._cluster_bits = cluster_bits
        self._unit_bits = unit_bits
        self._disk_size = disk_size
        self.all: Final = bitmaps
        self._tracked: list[Bitmap] = []
        self._begun = False
        self._placed: dict[tuple[str, int], HostOffset] = {}
        """Clusters allocated for bits that no table refers to yet."""
        left = _MEMORY_LIMIT
        for bitmap in bitmaps:
            size = _bytes_of(disk_size, bitmap.granularity_bits)
            if bitmap.enabled and bitmap.usable and size <= left:
                left -= size
                self._tracked.append(bitmap)

    @property
    def tracking(self) -> bool:
        """Whether changes are recorded."""
        return bool(self._tracked)

    def runs(self, bitmap: Bitmap, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """(length, 1 for dirty) runs of a range in their current state: clean past the disk's end; neighbours may be
        equal. They end early after _MOST_LOOKED_AT granules. Raises CorruptImage, OSError.
        """
        shift = bitmap.granularity_bits
        inside = min(offset + length, self._disk_size + _SECTOR_MASK & ~_SECTOR_MASK)
        first = offset >> shift
        last = -(-inside >> shift) if inside > offset else first
        end = min(last, first + _MOST_LOOKED_AT)
        step = 8 << self._cluster_bits
        at = offset
        while first < end:
            stop = min(first // step * step + step, end)
            bits = self._window(bitmap, first >> 3, -(-stop // 8))
            granules = np.unpackbits(bits, bitorder="little")[first & 7 :][: stop - first]
            for bit, _, high in runs_alike(granules):
                until = min(first + high << shift, inside)
                yield until - at, bit
                at = until
            first = stop
        if end >= last and at < offset + length:
            yield offset + length - at, 0

    def _window(self, bitmap: Bitmap, low: int, high: int) -> NDArray[np.uint8]:
        """Bytes [low, high) of the current bits, within one cluster of them."""
        if bitmap.bits is not None:
            return bitmap.bits[low:high]
        number = low >> self._cluster_bits
        entry = int(self._table(bitmap, number, number + 1)[0])
        if not (offset := entry & int(OFFSET_WORD)):
            return np.full(high - low, 0xFF if entry else 0, np.uint8)
        within = low - (number << self._cluster_bits)
        return np.frombuffer(self._storage.read(HostOffset(offset + within), high - low), np.uint8)

    @property
    def lost(self) -> list[Bitmap]:
        """Bitmaps that record changes, are not kept in memory, and are not marked in_use yet."""
        lost = [bitmap for bitmap in self.all if bitmap.enabled and bitmap not in self._tracked]
        return [bitmap for bitmap in lost if not bitmap.flags & IN_USE]

    def give_up(self) -> None:
        """Marks the `lost` bitmaps in_use. The caller syncs."""
        for bitmap in self.lost:
            self._set_flags(bitmap, bitmap.flags | IN_USE)

    def begin(self) -> bool:
        """Before the first change: read the bits and mark the bitmaps in_use. Returns whether there are any; then the
        caller syncs.
        """
        for bitmap in self._tracked:
            if bitmap.bits is None:
                bitmap.bits = self.bits_of(bitmap)
            self._set_flags(bitmap, bitmap.flags | IN_USE)
        self._begun = True
        return bool(self._tracked)

    def mark(self, offset: int, length: int) -> None:
        """Sets the bits of a range that is about to be changed. Whole units are marked, because the engine may then
        write to all of a unit.
        """
        unit = self._unit_bits
        start, end = offset >> unit << unit, min((offset + length - 1 >> unit) + 1 << unit, self._disk_size)
        for bitmap in self._tracked:
            assert bitmap.bits is not None, "begin() comes first"
            _set_bits(bitmap.bits, start >> bitmap.granularity_bits, (end - 1 >> bitmap.granularity_bits) + 1)

    def unseen(self, first: int, count: int) -> NDArray[np.bool_]:
        """Which of `count` units from `first` on have unset bits, so that their change must be noticed. Nothing is
        needed past the disk's end, where parts of its last cluster or unit may be.
        """
        found = np.zeros(count, np.bool_)
        for bitmap in self._tracked:
            if bitmap.bits is None:
                found[:] = True
                continue
            shift = bitmap.granularity_bits - self._unit_bits
            if shift >= 0:
                inside = min(count, max((self._granules(bitmap) << shift) - first, 0))
                granules = np.arange(first, first + inside, dtype=np.int64) >> shift
                found[:inside] |= bitmap.bits[granules >> 3] >> (granules & 7).astype(np.uint8) & 1 == 0
            else:
                each = 1 << -shift
                low, high = first * each, min((first + count) * each, self._granules(bitmap))
                bits = np.unpackbits(bitmap.bits[low >> 3 : -(-high // 8)], bitorder="little")[low & 7 :]
                whole = np.ones(count * each, np.uint8)
                whole[: max(high - low, 0)] = bits[: max(high - low, 0)]
                found |= ~whole.reshape(count, each).astype(np.bool_).all(axis=1)
        return found

    def _granules(self, bitmap: Bitmap) -> int:
        """Number of bits for the disk."""
        return -(-self._disk_size >> bitmap.granularity_bits)

    def bits_of(self, bitmap: Bitmap) -> NDArray[np.uint8]:
        """The bits on disk, eight granules per byte. Raises CorruptImage."""
        size = _bytes_of(self._disk_size, bitmap.granularity_bits)
        bits = np.zeros(size, np.uint8)
        cluster = 1 << self._cluster_bits
        for number, entry in enumerate(self._table(bitmap).tolist()):
            low = number << self._cluster_bits
            if low >= size:
                break
            if offset := entry & int(OFFSET_WORD):
                raw = self._storage.read(HostOffset(offset), min(cluster, size - low))
                bits[low : low + cluster] = np.frombuffer(raw, np.uint8)
            elif entry:
                bits[low : low + cluster] = 0xFF
        return bits

    def store_bits(self, allocate: Callable[[], HostOffset]) -> Callable[[], None] | None:
        """Writes the bits in memory, to new clusters where there were none. Returns a function to call when these and
        their refcounts are durable: it writes the tables. None: there were no bits in memory.
        """
        if not self._begun:
            return None
        tables: list[tuple[HostOffset, bytes]] = []
        cluster = 1 << self._cluster_bits
        for bitmap in self._tracked:
            assert bitmap.bits is not None, "begin() comes first"
            table = self._table(bitmap)
            for number in range(min(table.size, -(-bitmap.bits.size // cluster))):
                bits = bitmap.bits[number * cluster : (number + 1) * cluster]
                offset = int(table[number] & OFFSET_WORD)
                if not offset:
                    if not bits.any():
                        table[number] = 0
                        continue
                    key = (bitmap.name, number)
                    if key not in self._placed:
                        self._placed[key] = allocate()
                    table[number] = offset = self._placed[key]
                self._storage.write(HostOffset(offset), bits.tobytes().ljust(cluster, b"\0"))
            tables.append((bitmap.table_offset, table.astype(">u8").tobytes()))

        def write_tables() -> None:
            for offset, table in tables:
                self._storage.write(offset, table)

        return write_tables

    def end(self) -> bool:
        """Removes the mark in_use, after the result of `store_bits` is durable. Returns whether there were any bitmaps;
        then the caller syncs.
        """
        if not self._begun:
            return False
        for bitmap in self._tracked:
            self._set_flags(bitmap, bitmap.flags & ~IN_USE)
        for bitmap in self._tracked:
            bitmap.bits = None
        self._placed.clear()
        self._begun = False
        return bool(self._tracked)

    @property
    def tracked(self) -> list[Bitmap]:
        """Bitmaps that record changes and are kept in memory."""
        return self._tracked

    def clusters(self, bitmaps: list[Bitmap]) -> NDArray[np.uint64]:
        """Host clusters of their tables and bits (the directory belongs to the header), once for each reference."""
        found = [np.zeros(0, np.uint64)]
        bits = np.uint64(self._cluster_bits)
        for bitmap in bitmaps:
            first = bitmap.table_offset >> self._cluster_bits
            count = -(-bitmap.table_size * 8 >> self._cluster_bits)
            found.append(np.arange(first, first + count, dtype=np.uint64))
            offsets = self._table(bitmap) & OFFSET_WORD
            found.append(offsets[offsets != 0] >> bits)
        return np.concatenate(found)

    def _table(self, bitmap: Bitmap, first: int = 0, end: int | None = None) -> NDArray[np.uint64]:
        """Entries [first, end) of the bitmap's table, checked."""
        end = bitmap.table_size if end is None else end
        raw = self._storage.read(HostOffset(bitmap.table_offset + first * 8), (end - first) * 8)
        table = np.frombuffer(raw, ">u8").astype(np.uint64)
        offsets = table & OFFSET_WORD
        wrong = (table & ~(OFFSET_WORD | _ALL_ONES)) != 0
        wrong |= (offsets & np.uint64((1 << self._cluster_bits) - 1)) != 0
        wrong |= (offsets != 0) & ((table & _ALL_ONES) != 0)
        wrong |= offsets >= np.uint64(self._storage.size())
        if wrong.any():
            number = int(wrong.argmax())
            raise CorruptImage(
                f"bitmap '{bitmap.name}': table entry {first + number} is {int(table[number]):#x}; it must be 0, 1, "
                f"or the offset of a cluster below {self._storage.size():#x}",
                path=self._storage.path,
            )
        return table

    def _set_flags(self, bitmap: Bitmap, flags: int) -> None:
        self._storage.write(HostOffset(bitmap.at + _FLAGS_AT), flags.to_bytes(4, "big"))
        bitmap.flags = flags


def _bytes_of(disk_size: int, granularity_bits: int) -> int:
    """Number of bytes for the bits of a disk."""
    granules = -(-disk_size >> granularity_bits)
    return -(-granules // 8)


def _set_bits(bits: NDArray[np.uint8], low: int, high: int) -> None:
    """Sets the bits [low, high), least significant first."""
    first, last = low >> 3, high - 1 >> 3
    head, tail = 0xFF << (low & 7) & 0xFF, 0xFF >> (7 - (high - 1 & 7))
    if first == last:
        bits[first] |= head & tail
    else:
        bits[first] |= head
        bits[first + 1 : last] = 0xFF
        bits[last] |= tail
