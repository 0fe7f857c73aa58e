"""Writer of a QCOW2 image, an `ImageWriter`.

It needs no engine: its context consists of callables, so that tests can run it on a recording storage.

Obligations of the caller: all calls from one thread; `flush` after the engine's own files have been synced; `close`
when no request is in flight. After `close` the image is exact, and other programs may change it; make a new Image and
Writer then. May fail: CorruptImage (the image is marked corrupt, and is read-only from then on), OSError (ENOSPC).
"""

from __future__ import annotations

import errno
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from blkloom.errors import FaultError
from blkloom.image.errors import CorruptImage
from blkloom.image.qcow2.format.header import Autoclear, Incompatible
from blkloom.image.qcow2.format.snapshots import read_snapshots
from blkloom.image.qcow2.state.bitmaps import open_bitmaps
from blkloom.image.qcow2.state.l2_checks import L2Checks
from blkloom.image.qcow2.state.overlap_check import OverlapCheck
from blkloom.image.qcow2.state.refcounts import Refcounts
from blkloom.image.qcow2.write.allocation import Allocator
from blkloom.image.qcow2.write.background_check import BackgroundCheck
from blkloom.image.qcow2.write.batch_allocation import BatchAllocation
from blkloom.image.qcow2.write.cow import Copier, Payload
from blkloom.image.qcow2.write.discard import Discarder
from blkloom.image.qcow2.write.flush import WriteBack
from blkloom.image.qcow2.write.mapping import Mapping
from blkloom.image.qcow2.write.preallocation import Preallocation
from blkloom.image.qcow2.write.writability import Writability
from blkloom.image.qcow2.write.write_allocation import WriteAllocation
from blkloom.image.types import GuestOffset, HostOffset

if TYPE_CHECKING:
    from blkloom.image.format import WriteContext
    from blkloom.image.qcow2.state.image import Image


_DIRTY_LIMIT: Final = 32 << 20
"""Bytes of changed L2 tables at which they are written without a flush."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a writer. preallocate: bytes around a write in which clusters are preallocated, more for sequential
    writes, 0 for none. discard: whether discards free clusters. compact_zeroes: writes of only zeros, as far as they
    reach Python, free clusters, too. dirty_limit: maximum bytes of changed L2 tables.
    """

    preallocate: int = 4 << 20
    discard: bool = True
    compact_zeroes: bool = False
    dirty_limit: int = _DIRTY_LIMIT


class Writer:
    """Writer of `image`, which was opened for writing."""

    def __init__(self, image: Image, context: WriteContext, options: Options) -> None:
        """Raises CorruptImage, OSError."""
        assert image.writable, "it was opened so"
        self._image = image
        self._options = options
        self._context = context
        self._changed = False
        """Whether there may be something to write."""
        self._said_so = False
        """Whether the header is marked for changes."""
        snapshots = read_snapshots(image.storage, image.header)
        self.bitmaps: Final = open_bitmaps(image)
        self._refcounts = Refcounts.of(image)
        self._writability = Writability(image, context.broke)
        self._overlaps = OverlapCheck(image, self._refcounts, snapshots, self.bitmaps)
        checks = L2Checks(image, self._refcounts, self._overlaps, self._writability.mark_corrupt)
        self.allocator: Final = Allocator.of(image, self._refcounts, self._overlaps, context)
        self._write_back = WriteBack(image, self._refcounts, self.allocator, context.synchronize, context.redo)
        self._mapping = Mapping(
            image, self.allocator, self._write_back, self._overlaps, checks, self.bitmaps, self._writability, context
        )
        self.copier: Final = Copier(image.data_storage, context.read, context.relocation)
        self.preallocation: Final = Preallocation(self._mapping, options.preallocate)
        self._allocation = WriteAllocation(self._mapping, self.copier, self.preallocation, self._overlaps)
        self._batch = BatchAllocation(self._mapping, self.copier, self.preallocation)
        self._discarder = Discarder(self._mapping, self._allocation, self.preallocation)
        me = weakref.proxy(self)  # a reference cycle would keep all of this in memory
        self._check = BackgroundCheck(
            image,
            self._refcounts,
            self._overlaps,
            checks,
            snapshots,
            self.allocator,
            self._write_back,
            ended=lambda changed: me._checked(changed),
        )
        self._give_up_unknown()
        if self._check.running:
            context.wants_work()

    @property
    def broken(self) -> OSError | None:
        """The reason why nothing is written any more: the image is corrupt, or a sync of it failed."""
        return self._writability.broken

    # calls of the engine

    def prepare_write(self, offset: int, length: int, payload: Callable[[], bytes] | None = None) -> bool:
        """See `ImageWriter.prepare_write`."""
        if payload and self._options.compact_zeroes:
            data = payload()
            if data.count(0) == length:
                self.write_zeroes(offset, length, may_unmap=True)
                return True
        with self._changing((offset, length)):
            done = self._allocation.prepare(Payload(GuestOffset(offset), length, payload))
        self._limit()
        return done

    def prepare_writes(self, writes: Sequence[tuple[int, int]]) -> list[int]:
        """See `ImageWriter.prepare_writes`."""
        if self.broken is not None or self._options.compact_zeroes:
            return []
        with self._changing(*writes):
            ready = self._batch.prepare(writes)
        self._limit()
        return ready

    def write(self, offset: int, data: bytes) -> None:
        """See `ImageWriter.write`."""
        with self._changing((offset, len(data))):
            for start, end, host in self._mapping.hosts(offset, offset + len(data)):
                self._image.data_storage.write(HostOffset(host), data[start - offset : end - offset])

    def discard(self, offset: int, length: int) -> None:
        """See `ImageWriter.discard`."""
        if self._options.discard:
            with self._changing((offset, length)):
                self._discarder.discard(offset, length)
            self._limit()

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool, fast: bool = False) -> None:
        """See `ImageWriter.write_zeroes`."""
        with self._changing((offset, length)):
            keep = not (may_unmap and self._options.discard)
            self._discarder.write_zeroes(offset, length, keep=keep, fast=fast)
        self._limit()

    def flush(self) -> None:
        """See `ImageWriter.flush`."""
        if self.broken is None:
            with self._writability.finding_corruption():
                self._write_back.write_back()
            if self.allocator.freed_inside:
                self._look_for_space()
        elif self._write_back.dirty:
            raise FaultError(errno.EIO, f"what was not flushed before is lost: {self.broken}")

    @property
    def frees_at_flush(self) -> bool:
        """Whether the next flush makes space usable, because nothing on disk refers to it then."""
        return self.allocator.waiting

    @property
    def checking(self) -> bool:
        """Whether a background check is running, after which clusters inside the file can be used."""
        return self._check.running

    def work(self) -> bool:
        """Runs a step of the background check, a few milliseconds; returns whether there is more. Raises
        CorruptImage.
        """
        if self.broken is not None:
            return False
        with self._writability.finding_corruption():
            more = self._check.step()
            self._write_back.log_changes()
            return more

    def guarded(self, first: int, count: int) -> NDArray[np.bool_]:
        """See `Mapping.guarded`."""
        return self._mapping.guarded(first, count)

    def close(self) -> None:
        """Writes everything, removes unused preallocated clusters, truncates the file, and clears the dirty bit."""
        if self.broken is None:
            with self._writability.finding_corruption():
                self._check.end()
        if self.broken is not None or not self._changed:
            self._write_back.forget()
            return
        self._said_so = False  # nor, for certain, if this fails in the middle
        with self._writability.finding_corruption():
            self._write_back.write_back()
            self.preallocation.take_out()
            self._write_back.write_back()
            self._store_bitmaps()
            self._write_back.write_all()
            self.allocator.trim_file()
            if self._image.header.incompatible & Incompatible.DIRTY and not self._check.unfinished:
                self._writability.set_header(incompatible=self._image.header.incompatible & ~Incompatible.DIRTY)
            else:
                self._image.storage.sync()
            # Last: if anything before fails, the session continues with its bitmaps.
            self._changed = False
            if self.bitmaps.end():
                self._image.storage.sync()

    def mark_corrupt(self, error: CorruptImage) -> None:
        """Marks the image corrupt; see `Writability`."""
        self._writability.mark_corrupt(error)
        self._write_back.forget()

    def fail(self, error: OSError) -> None:
        """Only reads the image from now on, because a sync of one of its files failed; see `Writability`."""
        self._writability.fail(error)
        self._write_back.forget()

    # below: the beginning and the end

    def _look_for_space(self) -> None:
        self._check.look_for_space()
        if self._check.running:
            self._context.wants_work()

    def _checked(self, changed: int) -> None:
        """Called when the background check has ended, and all refcounts are on disk."""
        dirty = self._image.header.incompatible & Incompatible.DIRTY
        if dirty and not (self._image.lazy_refcounts and self._said_so):
            self._writability.set_header(incompatible=self._image.header.incompatible & ~Incompatible.DIRTY)
        self._image.wants_check = False
        self._context.checked(changed)

    def _give_up_unknown(self) -> None:
        """Prepares the image before the first write: gives up lost bitmaps, and features that blkloom does not know."""
        image = self._image
        if self.bitmaps.lost:
            with suppress(CorruptImage), self._writability.finding_corruption():
                self._overlaps.bitmap_writes()
                self.bitmaps.give_up()
                image.storage.sync()
        unknown = image.header.autoclear & ~sum(Autoclear)
        if unknown:
            self._writability.set_header(autoclear=image.header.autoclear & ~unknown)

    @contextmanager
    def _changing(self, *ranges: tuple[int, int]) -> Iterator[None]:
        self._writability.check()
        with self._writability.finding_corruption():
            if not self._said_so:
                self._first_change()
            if self.bitmaps.tracking:
                for offset, length in ranges:
                    self.bitmaps.mark(offset, length)
            try:
                yield
            finally:
                self._write_back.log_changes()

    def _first_change(self) -> None:
        self._overlaps.structures()
        if self.bitmaps.tracking:
            self._overlaps.bitmap_writes()
        self._lengthen()
        begun = self.bitmaps.begin()
        if self._image.lazy_refcounts:
            self._writability.set_header(incompatible=self._image.header.incompatible | Incompatible.DIRTY)
        elif begun:
            self._image.storage.sync()
        self._changed = self._said_so = True
        self._look_for_space()

    def _lengthen(self) -> None:
        """Extends a file that ends before or within data, so that the engine may write there."""
        image, cluster = self._image, self._image.geometry.cluster
        if image.header.has_data_file:
            if image.data_storage.size() < image.size:
                image.data_storage.truncate(image.size)
        elif image.storage.size() % cluster:
            image.storage.truncate(-(-image.storage.size() // cluster) * cluster)

    def _limit(self) -> None:
        if self._write_back.held > self._options.dirty_limit or self._write_back.log_is_large:
            self.flush()

    def _store_bitmaps(self) -> None:
        def allocate() -> HostOffset:
            return HostOffset(self.allocator.take(1).first << self._image.geometry.cluster_bits)

        write_tables = self.bitmaps.store_bits(allocate)
        if write_tables is not None:
            self._write_back.write_all()
            self._image.storage.sync()
            write_tables()
