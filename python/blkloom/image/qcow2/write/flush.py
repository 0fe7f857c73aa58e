"""The order in which changed metadata is written to disk, and why it is right.

Whatever subset of the writes since the last sync is on disk, at every instant these rules must hold:

 1. A cluster that a table on disk refers to has, on disk, a refcount of at least the number of references. (Else the
    next user of the image allocates it a second time.) A refcount that is too high only leaks a cluster.
 2. What an entry on disk refers to is complete: a table has its contents, a cluster has the old data or the new (cow.py
    fills it before the entry exists in memory).
 3. No cluster is used again while anything on disk, or a request in flight, still refers to its old use.

The order is: [refcounts that grew, and refcount blocks] - sync - [refcount table] - sync - [header, if that table
moved] - sync - [L2 tables] - sync - [L1 table] - sync. Then the refcounts of freed clusters are decremented in memory,
holes are punched, and the clusters may be allocated again. A step that has nothing to write is left out, with its sync.
A flush of new clusters under existing tables takes two syncs, after the engine's own sync of the files.

 - Refcounts before L2 and L1 tables: rule 1. The last sync before the L2 tables also covers the copies, in the image
   file or in an external data file: rule 2. Guest data needs no order of its own: a cluster that is not written yet
   contains what the guest read there before.
 - A refcount block is durable before the refcount table refers to it, and that table before the header does: rule 2.
   They are in clusters that were free, so nothing is lost if the reference is not written.
 - L2 tables before the L1 table: a new L2 table (or the copy of a snapshot's) is complete before anything refers to it.
   An entry of 8 bytes lies in one sector, so each entry is old or new.
 - The refcount of a freed cluster is decremented only after the last sync, in memory. The next flush, or the end of the
   session, writes it: rule 1. `synchronize` waits for requests that looked up the old cluster: rule 3.
 - Only with lazy refcounts may refcounts on disk be too low. The dirty bit says so; it is durable before the first
   change. Moving the refcount table is never lazy: the header would refer to freed clusters.

If a step fails, the next flush does all of them again. One thread (the mapper's).

Until a flush, a redo log has the changes, too, if the writer was given one (redo_log.py): `log_changes` before anything
depends on a change that the next process must know. A flush begins with it: otherwise older records could be written
over newer metadata.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from blkloom.image.qcow2.format.geometry import L1Index
from blkloom.image.qcow2.format.header import encode_fields, encode_refcount_table
from blkloom.image.qcow2.format.tables import encode
from blkloom.image.redo_log import Step
from blkloom.image.types import HostOffset

if TYPE_CHECKING:
    from blkloom.image.qcow2.state.image import Image, L2Table
    from blkloom.image.qcow2.state.refcounts import Refcounts
    from blkloom.image.qcow2.write.allocation import Allocator
    from blkloom.image.redo_log import RedoLog

_WORD: Final = 8


class WriteBack:
    """Writes changed metadata of an image to disk. synchronize: returns when no request is in flight that looked up an
    entry before.
    """

    def __init__(
        self,
        image: Image,
        refcounts: Refcounts,
        allocator: Allocator,
        synchronize: Callable[[], None],
        log: RedoLog | None = None,
    ) -> None:
        self._log = log
        refcounts.logs = log is not None
        self._unlogged_l2: dict[L1Index, tuple[L2Table, int, int]] = {}
        self._unlogged_l1: tuple[int, int] | None = None
        self._image = image
        self._storage = image.storage
        self._refcounts = refcounts
        self._allocator = allocator
        self._synchronize = synchronize
        self._l2: dict[L1Index, tuple[int, int]] = {}
        self._l1: tuple[int, int] | None = None
        self._filled = False

    @property
    def dirty(self) -> bool:
        """Whether a flush has to write something. Refcounts that only decreased need not be written."""
        return bool(self._l2) or self._l1 is not None

    @property
    def held(self) -> int:
        """Bytes of L2 tables that must stay in memory."""
        return len(self._l2) << self._image.geometry.cluster_bits

    def l2_changed(self, table: L2Table, low: int, high: int) -> None:
        """Records a change of the entries [low, high) of an L2 table, which is in the image's cache from now on."""
        if self._log:
            _, first, end = self._unlogged_l2.get(table.index, (table, low, high))
            self._unlogged_l2[table.index] = table, min(first, low), max(end, high)
        if table.dirty and (known := self._l2.get(table.index)):
            self._l2[table.index] = min(known[0], low), max(known[1], high)
            return
        first, end = self._l2.get(table.index, (low, high))
        self._l2[table.index] = min(first, low), max(end, high)
        table.dirty = True
        self._image.keep_l2(table)

    def l1_changed(self, index: L1Index) -> None:
        """Records a change of the L1 entry of an L2 table."""
        self._l1 = _with(self._l1, index)
        self._unlogged_l1 = _with(self._unlogged_l1, index)

    def filled(self) -> None:
        """Records that contents were written, or the file grew, where a new entry will refer to."""
        self._filled = True

    def log_changes(self) -> None:
        """Stores all changes in the redo log."""
        log, refcounts = self._log, self._refcounts
        if log is None:
            return
        for offset, data in refcounts.unlogged_blocks():
            log.add(Step.REFCOUNTS, offset, data)
        if (entries := refcounts.unlogged_table()) is not None:
            log.add(Step.REFCOUNT_TABLE, *entries)
            if refcounts.table_moved:
                log.add(Step.HEADER, *encode_refcount_table(refcounts.table_offset, refcounts.table_clusters))
        for table, low, high in self._unlogged_l2.values():
            log.add(Step.L2, *_l2_bytes(table, low, high))
        self._unlogged_l2.clear()
        if self._unlogged_l1:
            low, high = self._unlogged_l1
            log.add(Step.L1, self._image.header.l1_offset + low * _WORD, encode(self._image.l1[low:high]))
            self._unlogged_l1 = None
        log.commit()

    def forget(self) -> None:
        """Empties the redo log: all is durable, or nothing may be written any more."""
        if self._log:
            self._log.clear()

    @property
    def log_is_large(self) -> bool:
        """Whether a flush should empty the redo log."""
        return self._log is not None and self._log.is_large

    def write_back(self) -> None:
        """Writes all changes in order; they are durable when it returns."""
        self.log_changes()
        if not self.dirty:
            return
        if self._refcounts.dirty and (not self._image.lazy_refcounts or self._refcounts.table_changed):
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
        self.forget()
        if self._allocator.waiting:
            self._settle()

    def write_all(self) -> None:
        """`write_back`, and all refcounts, so that the image is exact."""
        self.write_back()
        if self._refcounts.dirty:
            self.write_refcounts()
        if self._allocator.waiting:  # a refcount table that has moved, if nothing else was changed
            self._settle()
            self.write_refcounts()
        self.forget()

    def write_refcounts(self) -> None:
        """Writes all changed refcounts, and nothing else; syncs them together with the guest's data."""
        self.log_changes()
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
        offset, data = _l2_bytes(table, *self._l2[table.index])
        self._storage.write(HostOffset(offset), data)

    def _sync_all(self) -> None:
        if self._image.header.has_data_file:
            self._image.data_storage.sync()
        self._sync()

    def _sync(self) -> None:
        self._storage.sync()


def _with(found: tuple[int, int] | None, index: int) -> tuple[int, int]:
    low, high = found or (index, index + 1)
    return min(low, index), max(high, index + 1)


def _l2_bytes(table: L2Table, low: int, high: int) -> tuple[int, bytes]:
    """Offset in the file, and the entries [low, high) as they are there."""
    words, each = table.entries[low:high], _WORD
    if table.bitmaps is not None:
        words, each = np.stack((words, table.bitmaps[low:high]), axis=1).reshape(-1), 2 * _WORD
    return table.offset + low * each, encode(words)
