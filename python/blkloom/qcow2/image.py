"""One open image: its header, its L1 table, and L2 tables as they are asked for.

What is here is what the image says, in memory: the L1 table whole, L2 tables in a cache. A writer changes header,
`l1` and L2 tables in place and marks tables `dirty`; a dirty table stays in the cache until flush.py has written it.
Reading never changes the file. One thread (the mapper's). May fail: CorruptImage, UnsupportedImage, OSError of the
storage; every number of the file is checked against the file before it is used.

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

from blkloom.qcow2.errors import CorruptImage
from blkloom.qcow2.header import Compatible, Header, Incompatible, read_header
from blkloom.qcow2.tables import L1_RESERVED, OFFSET_MASK, Kind, Units, classify, contradiction, decode
from blkloom.qcow2.types import GuestOffset, HostOffset, L1Index, Words

if TYPE_CHECKING:
    from blkloom.qcow2.snapshots import Snapshot
    from blkloom.qcow2.storage import Storage

_log = logging.getLogger(__name__)

L2_CACHE: Final = 16 << 20
"""Bytes of L2 tables kept, dirty ones beyond that."""

_MOST_REPORTS: Final = 16


@dataclass(slots=True, eq=False)
class L2Table:
    """One L2 table. entries: a word a cluster. bitmaps: the subcluster allocation bitmaps, with extended entries.
    offset: where it is in the file. dirty: the file does not have it like this.
    """

    index: L1Index
    offset: HostOffset
    entries: Words
    bitmaps: Words | None = None
    dirty: bool = False

    def words(self) -> Words:
        """As `tables.encode` wants it for the file."""
        if self.bitmaps is None:
            return self.entries
        return np.stack((self.entries, self.bitmaps), axis=1).reshape(-1)


class Image:
    """storage: the image file. data_storage: where guest data is: the same, or the external data file.
    size: of the guest's disk, bytes. l1: the entries as they are, COPIED bit included. snapshot: what is looked at
    instead of the active disk; never writable.
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
        """Made by `open`; tests may make one of parts."""
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
        """Called by `report` with what was found wrong."""
        self.wants_check = bool(header.incompatible & (Incompatible.DIRTY | Incompatible.CORRUPT))
        """Something is wrong with it, by its own word or by what was found."""

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
        """Reads header and L1 table. data_storage: needed for guest data where the header has_data_file. header: if it
        has been read already. A writable image may still be *dirty* (`needs_repair`): that is the writer's to see to.
        Raises CorruptImage, UnsupportedImage, OSError.
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
            raise self.corrupt(f"an L1 table of {count} entries for a disk of {size} bytes")
        return self

    @property
    def path(self) -> str:
        """Of the image file."""
        return self.storage.path

    @property
    def needs_repair(self) -> bool:
        """Refcounts may be wrong; they must be put right before anything is written."""
        return bool(self.header.incompatible & Incompatible.DIRTY)

    @property
    def lazy_refcounts(self) -> bool:
        """Refcounts may be left behind while the image is marked dirty."""
        return bool(self.header.compatible & Compatible.LAZY_REFCOUNTS)

    def corrupt(self, what: str) -> CorruptImage:
        """An error about this image, to raise."""
        return CorruptImage(what, path=self.path)

    def place_of(self, offset: GuestOffset) -> tuple[L1Index, int]:
        """The L2 table that describes the byte, and the entry in it."""
        cluster = offset >> self.geometry.cluster_bits
        return L1Index(cluster // self.geometry.l2_entries), cluster % self.geometry.l2_entries

    def l2(self, index: L1Index) -> L2Table | None:
        """The L2 table; None where there is none and everything is unallocated. Raises CorruptImage, OSError."""
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
        """The L2 table if it is in the cache, where it stays as long as it would have."""
        return self._l2.get(index)

    def keep_l2(self, table: L2Table) -> None:
        """Puts a table into the cache (a writer's new one), and lets others go if there are too many."""
        self._l2[table.index] = table
        self._l2.move_to_end(table.index)
        most = max(L2_CACHE >> self.geometry.cluster_bits, 2)
        if len(self._l2) > most:
            clean = (index for index, kept in self._l2.items() if not kept.dirty and kept is not table)
            for index in list(itertools.islice(clean, len(self._l2) - most)):
                del self._l2[index]

    def dirty_l2(self) -> list[L2Table]:
        """Tables that the file does not have like this, by index."""
        return sorted((table for table in self._l2.values() if table.dirty), key=lambda table: table.index)

    @property
    def data_end(self) -> int | None:
        """Bytes of the file that the data is in, which must be there; None for an external data file, which reads as
        zeros past its end.
        """
        return None if self.header.has_data_file else self.data_storage.size()

    def units(self, first: int, count: int) -> Units:
        """What `count` units from unit `first` of the disk on are, over as many L2 tables as that takes. Past the
        L1 table's end they are UNALLOCATED. What corrupt metadata says nothing of is INVALID: a request that needs it
        fails with its `contradiction`. Raises OSError of the storage.
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
        """What is wrong with a unit that is INVALID, or that may not be written to as it is. Raises OSError."""
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
        """Names what of header, L1 table, refcount table, snapshot table and known L2 tables lies in `count` host
        clusters from `first` on; "" for nothing.
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

    def forget(self) -> None:
        """Drops every L2 table. None may be dirty."""
        assert not self.dirty_l2(), "what is dirty is written first"
        self._l2.clear()

    def report(self, error: CorruptImage) -> None:
        """Says in the log what was found wrong, the first times."""
        self._reports += 1
        self.wants_check = True
        if self.reported:
            self.reported(error)
        if self._reports <= _MOST_REPORTS:
            last = "; no more of this image will be logged" if self._reports == _MOST_REPORTS else ""
            _log.error("%s%s", error, last)

    def _pieces(self, first: int, count: int) -> Iterator[tuple[L1Index, int, int]]:
        """(L2 table, first unit in it, end) that make up the run."""
        span = self.geometry.l2_units
        end = first + count
        while first < end:
            index, low = divmod(first, span)
            high = min(span, low + end - first)
            yield L1Index(index), low, high
            first += high - low

    def _units_of(self, index: L1Index, low: int, high: int) -> Units:
        """Units `low` to `high` of one table."""
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
            raise self.corrupt(f"L1 entry {index} is {entry:#x}, which is no place of an L2 table")
        if offset >= self.storage.size():
            raise self.corrupt(f"L2 table {index} begins at {offset:#x}, past the end of the file")
        words = decode(self.storage.read(HostOffset(offset), self.geometry.cluster))
        if not self.geometry.extended:
            return L2Table(index, HostOffset(offset), words)
        pairs = words.reshape(-1, 2)
        return L2Table(index, HostOffset(offset), pairs[:, 0].copy(), pairs[:, 1].copy())


def _read_l1(storage: Storage, offset: HostOffset, count: int, header: Header) -> Words:
    """The file may end inside the table's last cluster, as it does in a fresh image."""
    if not count:
        return np.empty(0, np.uint64)
    cluster = 1 << header.cluster_bits
    if offset + count * 8 > -(-storage.size() // cluster) * cluster:
        raise CorruptImage(
            f"the L1 table of {count} entries at {offset:#x} reaches past the end of the file", path=storage.path
        )
    return decode(storage.read(offset, count * 8))


def _all(kind: Kind, count: int) -> Units:
    return Units(np.full(count, kind, np.uint8), np.zeros(count, np.uint64), np.zeros(count, np.bool_))
