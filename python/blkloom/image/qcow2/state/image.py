"""One open image: its header, its L1 table, and a cache of L2 tables.

The L1 table is in memory as a whole, L2 tables are read when they are needed. A writer changes the header, `l1` and L2
tables in place and marks tables `dirty`; a dirty table stays in the cache until flush.py has written it. Reading never
changes the file. Every number that the file gives is checked against the file before it is used. One thread (the
mapper's). May fail: CorruptImage, UnsupportedImage, OSError of the storage.

Source: QEMU docs/interop/qcow2.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import numpy as np

from blkloom.image.errors import CorruptImage
from blkloom.image.qcow2.format.geometry import L1Index
from blkloom.image.qcow2.format.header import Compatible, Header, Incompatible, read_header
from blkloom.image.qcow2.format.tables import L1_RESERVED, OFFSET_MASK, Kind, Units, classify, contradiction, decode
from blkloom.image.types import HostOffset, Words

if TYPE_CHECKING:
    from blkloom.image.qcow2.format.snapshots import Snapshot
    from blkloom.image.storage import Storage

_log = logging.getLogger(__name__)

L2_CACHE: Final = 16 << 20
"""Bytes of L2 tables in the cache, without dirty ones."""

_MOST_REPORTS: Final = 16


@dataclass(slots=True, eq=False)
class L2Table:
    """One L2 table. entries: one word per cluster. bitmaps: the subcluster allocation bitmaps, with extended entries.
    offset: in the file. dirty: the file has other contents.
    """

    index: L1Index
    offset: HostOffset
    entries: Words
    bitmaps: Words | None = None
    dirty: bool = False

    def words(self) -> Words:
        """The table in the form for `tables.encode`."""
        if self.bitmaps is None:
            return self.entries
        return np.stack((self.entries, self.bitmaps), axis=1).reshape(-1)


class Image:
    """An open image. storage: the image file. data_storage: the file with the guest data: the same, or the external
    data file. size: of the guest's disk, bytes. l1: the entries, including the COPIED bit. snapshot: shown in place of
    the active disk; never writable.
    """

    def __init__(
        self,
        storage: Storage,
        header: Header,
        l1: Words,
        *,
        writable: bool,
        data_storage: Storage | None = None,
        size: int | None = None,
    ) -> None:
        """Used by `open`, and by tests."""
        self.storage: Final = storage
        self.data_storage: Final = data_storage or storage
        self.header = header
        self.geometry: Final = header.geometry
        self.writable: Final = writable
        self.size: Final = header.size if size is None else size
        self.l1 = l1
        self._l2: OrderedDict[L1Index, L2Table] = OrderedDict()
        self._reports = 0
        self.on_l2_read: Callable[[L2Table], None] | None = None
        """Called with each L2 table that is read from the file for the cache."""
        self.reported: Callable[[CorruptImage], None] | None = None
        """Called by `report` with the error."""
        self.wants_check = bool(header.incompatible & (Incompatible.DIRTY | Incompatible.CORRUPT))
        """The image needs a check, by its own flags or after an error."""

    @classmethod
    def open(
        cls,
        storage: Storage,
        *,
        writable: bool,
        data_storage: Storage | None = None,
        header: Header | None = None,
        snapshot: Snapshot | None = None,
    ) -> Self:
        """Reads header and L1 table. data_storage: needed for guest data if the header has_data_file. header: if it was
        read before. A writable image may still be *dirty* (`needs_repair`); the writer handles this. Raises
        CorruptImage, UnsupportedImage, OSError.
        """
        header = header or read_header(storage)
        if writable and header.incompatible & Incompatible.CORRUPT:
            raise CorruptImage(
                "the image is marked corrupt; it may only be read",
                path=storage.path,
                cure="repair it (qemu-img check -r all), or attach it read_only",
            )
        assert not (writable and snapshot), "a snapshot is not written to"
        count, offset, size = header.l1_size, header.l1_offset, header.size
        if snapshot:
            count, offset, size = snapshot.l1_size, snapshot.l1_offset, snapshot.disk_size or header.size
        self = cls(
            storage,
            header,
            _read_l1(storage, offset, count, header),
            writable=writable,
            data_storage=data_storage,
            size=size,
        )
        if self.geometry.l1_entries(size) > count:
            raise self.corrupt(
                f"an L1 table of {count} entries for a disk of {size} bytes, which needs "
                f"{self.geometry.l1_entries(size)}"
            )
        return self

    @property
    def path(self) -> str:
        """Path of the image file."""
        return self.storage.path

    @property
    def needs_repair(self) -> bool:
        """Whether refcounts may be wrong, and must be corrected."""
        return bool(self.header.incompatible & Incompatible.DIRTY)

    @property
    def lazy_refcounts(self) -> bool:
        """Whether refcounts on disk may be out of date while the image is marked dirty."""
        return bool(self.header.compatible & Compatible.LAZY_REFCOUNTS)

    def corrupt(self, what: str) -> CorruptImage:
        """An error about this image, to raise."""
        return CorruptImage(what, path=self.path)

    def l2(self, index: L1Index) -> L2Table | None:
        """The L2 table; None if there is none and everything is unallocated. Raises CorruptImage, OSError."""
        if (table := self._l2.get(index)) is not None:
            self._l2.move_to_end(index)
            return table
        entry = int(self.l1[index])
        if not entry & OFFSET_MASK and not entry & L1_RESERVED:
            return None
        table = self._read_l2(index, entry)
        self.keep_l2(table)
        if self.on_l2_read:
            self.on_l2_read(table)
        return table

    def cached_l2(self, index: L1Index) -> L2Table | None:
        """The L2 table if it is in the cache; does not change its position in the LRU order."""
        return self._l2.get(index)

    def keep_l2(self, table: L2Table) -> None:
        """Puts a table into the cache (a new one of a writer), and evicts others if there are too many."""
        self._l2[table.index] = table
        self._l2.move_to_end(table.index)
        most = max(L2_CACHE >> self.geometry.cluster_bits, 2)
        if len(self._l2) > most:
            clean = (index for index, kept in self._l2.items() if not kept.dirty and kept is not table)
            for index in list(itertools.islice(clean, len(self._l2) - most)):
                del self._l2[index]

    def dirty_l2(self) -> list[L2Table]:
        """Tables that differ from the file, by index."""
        return sorted((table for table in self._l2.values() if table.dirty), key=lambda table: table.index)

    @property
    def data_end(self) -> int | None:
        """Size of the file with the data, in bytes, which entries must not exceed; None for an external data file,
        which reads as zeros past its end.
        """
        return None if self.header.has_data_file else self.data_storage.size()

    def units(self, first: int, count: int) -> Units:
        """Kinds of `count` units from unit `first` of the disk on, over as many L2 tables as needed. Past the L1
        table's end they are UNALLOCATED. Units of corrupt metadata are INVALID: a request for one fails with its
        `contradiction`. Raises OSError of the storage.
        """
        parts = [self._units_of(index, low, high) for index, low, high in self._pieces(first, count)]
        if len(parts) == 1:
            return parts[0]
        return Units(
            np.concatenate([part.kinds for part in parts]),
            np.concatenate([part.offsets for part in parts]),
            np.concatenate([part.copied for part in parts]),
        )

    def contradiction(self, unit: int) -> CorruptImage:
        """A description of the inconsistency of a unit that is INVALID, or that must not be written to. Raises
        OSError.
        """
        index, within = divmod(unit, self.geometry.l2_units)
        number = within // self.geometry.units_a_cluster
        try:
            table = self.l2(L1Index(index))
        except CorruptImage as error:
            return error
        assert table is not None, "what is unallocated is not wrong"
        entry = int(table.entries[number])
        what = contradiction(
            entry,
            None if table.bitmaps is None else int(table.bitmaps[number]),
            self.geometry,
            version=self.header.version,
            data_file=self.header.has_data_file,
            end=self.data_end,
        )
        return self.corrupt(f"L2 table {index}: entry {number} is {entry:#x}, {what}")

    def metadata_in(self, first: int, count: int) -> str:
        """Name of the metadata (header, L1 table, refcount table, snapshot table, known L2 tables) in `count` host
        clusters from `first` on; "" for none.
        """
        bits, header = self.geometry.cluster_bits, self.header
        low, high = first << bits, first + count << bits
        places: list[tuple[str, int, int]] = [
            ("the header", 0, 1 << bits),
            ("the L1 table", header.l1_offset, header.l1_size * 8),
            ("the refcount table", header.refcount_table_offset, header.refcount_table_clusters << bits),
            ("the snapshot table", header.snapshot_offset, 1 if header.snapshot_count else 0),
        ]
        for what, offset, length in places:
            if length and offset < high and offset + length > low:
                return what
        tables = self.l1 & np.uint64(OFFSET_MASK)
        inside = np.flatnonzero((tables >= low) & (tables < high) & (tables != 0))
        return f"L2 table {inside[0]}" if inside.size else ""

    def report(self, error: CorruptImage) -> None:
        """Logs an error in the metadata, up to a maximum number of times."""
        self._reports += 1
        self.wants_check = True
        if self.reported:
            self.reported(error)
        if self._reports <= _MOST_REPORTS:
            last = "; no more of this image will be logged" if self._reports == _MOST_REPORTS else ""
            _log.error("%s%s", error, last)

    def _pieces(self, first: int, count: int) -> Iterator[tuple[L1Index, int, int]]:
        """(L2 table, first unit in it, end) of the parts of the run."""
        span = self.geometry.l2_units
        end = first + count
        while first < end:
            index, low = divmod(first, span)
            high = min(span, low + end - first)
            yield L1Index(index), low, high
            first += high - low

    def _units_of(self, index: L1Index, low: int, high: int) -> Units:
        """Kinds of the units `low` to `high` of one table."""
        try:
            table = self.l2(index) if index < len(self.l1) else None
        except CorruptImage:
            return _all(Kind.INVALID, high - low)
        if table is None:
            return _all(Kind.UNALLOCATED, high - low)
        per = self.geometry.units_a_cluster
        first, end = low // per, -(-high // per)
        bitmaps = None if table.bitmaps is None else table.bitmaps[first:end]
        found = classify(
            table.entries[first:end],
            bitmaps,
            self.geometry,
            version=self.header.version,
            data_file=self.header.has_data_file,
            end=self.data_end,
        )
        if per == 1:
            return found
        cut = slice(low - first * per, high - first * per)
        return Units(found.kinds[cut], found.offsets[cut], found.copied[cut])

    def _read_l2(self, index: L1Index, entry: int) -> L2Table:
        offset = entry & OFFSET_MASK
        if entry & L1_RESERVED or offset % self.geometry.cluster:
            raise self.corrupt(
                f"L1 entry {index} is {entry:#x}: an L2 table begins at a multiple of {self.geometry.cluster:#x}, and "
                "reserved bits are 0"
            )
        if offset >= self.storage.size():
            raise self.corrupt(
                f"L2 table {index} begins at {offset:#x}, past the end of the file ({self.storage.size():#x})"
            )
        words = decode(self.storage.read(HostOffset(offset), self.geometry.cluster))
        if not self.geometry.extended:
            return L2Table(index, HostOffset(offset), words)
        pairs = words.reshape(-1, 2)
        return L2Table(index, HostOffset(offset), pairs[:, 0].copy(), pairs[:, 1].copy())


def _read_l1(storage: Storage, offset: HostOffset, count: int, header: Header) -> Words:
    """Reads the L1 table. The file may end inside the last cluster of the table, as in a fresh image."""
    if not count:
        return np.empty(0, np.uint64)
    cluster = 1 << header.cluster_bits
    if offset + count * 8 > -(-storage.size() // cluster) * cluster:
        raise CorruptImage(
            f"the L1 table of {count} entries at {offset:#x} reaches past the end of the file ({storage.size():#x})",
            path=storage.path,
        )
    return decode(storage.read(offset, count * 8))


def _all(kind: Kind, count: int) -> Units:
    return Units(np.full(count, kind, np.uint8), np.zeros(count, np.uint64), np.zeros(count, np.bool_))
