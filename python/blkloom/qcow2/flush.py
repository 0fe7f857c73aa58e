"""THE ORDER in which changed metadata reaches the disk, and why it is right.

What the disk must satisfy at every instant, whatever subset of the writes since the last sync it has seen:

 1. Whatever a table on disk refers to has a count on disk of at least as many references (else the next user of
    the image gives a cluster away twice). Counts that are too high only leak.
 2. Whatever an entry on disk refers to holds what it should: tables their contents, clusters the old data or the
    new (cow.py puts it there before the entry exists in memory).
 3. No cluster is used anew while anything on disk, or a request in flight, still refers to its old use.

So: [counts that grew, and blocks] - sync - [refcount table] - sync - [header, where that table moved] - sync -
[L2 tables] - sync - [L1 table] - sync; then what was given back is counted down in memory, punched and reusable.
Steps with nothing to do fall out together with their sync; a flush with new clusters under known tables takes two.

 - Counts before L2 and L1: 1 holds. The first sync also covers the guest's data and the fills: 2 holds. Guest data
   need not be ordered before that, nor after: a place not yet written holds what it held for the guest before.
 - A refcount block is durable before the table names it, the table before the header does: 2 holds for them. They
   are allocated from free clusters, so what names them late loses nothing.
 - L2 before L1: an L2 table that is new (or a copy of a snapshot's) is complete before anything leads to it. An
   entry of 8 bytes lies in one sector, so each is old or new.
 - What is given back is counted down only after the last sync: its counts, still in memory then, reach the disk with
   the next flush or at the end, so 1 holds; `synchronize` lets requests end that found the old place: 3 holds.
 - Only with lazy refcounts do counts stay behind; the dirty bit, durable since before the first change, says so.
   The refcount table moving is never lazy: the header would lead to clusters given back.

If any step fails, all of it remains to be done and is done again by the next flush. One thread (the mapper's).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from blkloom.qcow2.header import encode_fields
from blkloom.qcow2.tables import encode
from blkloom.qcow2.types import HostOffset, L1Index

if TYPE_CHECKING:
    from blkloom.qcow2.allocation import Allocator
    from blkloom.qcow2.image import Image, L2Table
    from blkloom.qcow2.refcounts import Refcounts

_WORD: Final = 8


class WriteBack:
    """What is changed in memory, and how it gets to the disk.

    synchronize: returns when no request is in flight that found a place before. sync_data: makes guest data durable
    that lies in another file than the image.
    """

    def __init__(
        self,
        image: Image,
        refcounts: Refcounts,
        allocator: Allocator,
        *,
        lazy: bool,
        synchronize: Callable[[], None],
        sync_data: Callable[[], None],
    ) -> None:
        self._image = image
        self._storage = image.storage
        self._refcounts = refcounts
        self._allocator = allocator
        self._lazy = lazy
        self._synchronize = synchronize
        self._sync_data = sync_data
        self._l2: dict[L1Index, tuple[int, int]] = {}
        self._l1: tuple[int, int] | None = None
        self._filled = False
        self.syncs = 0
        """How often the image was synced."""

    @property
    def dirty(self) -> bool:
        """Whether a flush has to write something. Counts that only fell do not matter to anybody."""
        return bool(self._l2) or self._l1 is not None

    @property
    def held(self) -> int:
        """Bytes of L2 tables that must be kept in memory."""
        return len(self._l2) << self._image.geometry.cluster_bits

    def l2_changed(self, table: L2Table, low: int, high: int) -> None:
        """Entries [low, high) of an L2 table, which is in the image's cache from now on."""
        if table.dirty and (known := self._l2.get(table.index)):
            self._l2[table.index] = min(known[0], low), max(known[1], high)
            return
        first, end = self._l2.get(table.index, (low, high))
        self._l2[table.index] = min(first, low), max(end, high)
        table.dirty = True
        self._image.keep_l2(table)

    def l1_changed(self, index: L1Index) -> None:
        """The entry of an L2 table."""
        low, high = self._l1 or (index, index + 1)
        self._l1 = min(low, index), max(high, index + 1)

    def filled(self) -> None:
        """Contents were put, or the file grew, where an entry will point."""
        self._filled = True

    def write_back(self) -> None:
        """All changes, in order; durable when it returns."""
        if not self.dirty:
            return
        if self._refcounts.dirty and (not self._lazy or self._refcounts.table_changed):
            self.write_refcounts()
        elif self._filled:
            self._sync_all()
        self._filled = False
        tables = self._image.dirty_l2()
        for table in tables:
            self._write_l2(table)
        if tables:
            self._sync()
        if self._l1:
            low, high = self._l1
            offset = self._image.header.l1_offset + low * _WORD
            self._storage.write(HostOffset(offset), encode(self._image.l1[low:high]))
            self._sync()
        for table in tables:
            table.dirty = False
        self._l2.clear()
        self._l1 = None
        if self._allocator.waiting:
            self._settle()

    def write_all(self) -> None:
        """`write_back`, and all counts too, so that the image is exact."""
        self.write_back()
        if self._refcounts.dirty:
            self.write_refcounts()
        if self._allocator.waiting:  # a refcount table that has moved, if nothing else was changed
            self._settle()
            self.write_refcounts()

    def write_refcounts(self) -> None:
        """All counts that are changed, and only them; syncs, the guest's data with it."""
        self._refcounts.write_blocks()
        if self._refcounts.table_changed:
            self._sync()
            self._refcounts.write_table()
        if self._refcounts.table_moved:
            self._sync()
            self._image.header = replace(
                self._image.header,
                refcount_table_offset=self._refcounts.table_offset,
                refcount_table_clusters=self._refcounts.table_clusters,
            )
            self._storage.write(HostOffset(0), encode_fields(self._image.header))
        self._sync_all()
        self._refcounts.written()

    def _settle(self) -> None:
        self._synchronize()
        self._allocator.settle()

    def _write_l2(self, table: L2Table) -> None:
        low, high = self._l2[table.index]
        words, each = table.entries[low:high], _WORD
        if table.bitmaps is not None:
            words, each = np.stack((words, table.bitmaps[low:high]), axis=1).reshape(-1), 2 * _WORD
        self._storage.write(HostOffset(table.offset + low * each), encode(words))

    def _sync_all(self) -> None:
        self._sync_data()
        self._sync()

    def _sync(self) -> None:
        self._storage.sync()
        self.syncs += 1
