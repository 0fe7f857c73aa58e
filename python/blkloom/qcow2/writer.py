"""An image that is written to: what the target calls when the engine asks.

Needs no engine: it is given callables, so that tests may run it against a recording storage. Guest data goes straight
from the engine to where the table says; here are the changes of the table, and what must be true before them.

Obligations of the caller: all calls from one thread; `flush` when the engine's own files have been synced; `close`
when no request is in flight. After `close` the image is exact and others may change it; make a new Image and Writer
then. May fail: CorruptImage (the image is marked so, and only read from then on), OSError (ENOSPC).
"""

from __future__ import annotations

import errno
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from blkloom.errors import FaultError
from blkloom.qcow2.ahead import Ahead
from blkloom.qcow2.allocation import Allocator
from blkloom.qcow2.background_check import BackgroundCheck
from blkloom.qcow2.batch_allocation import BatchAllocation
from blkloom.qcow2.bitmaps import open_bitmaps
from blkloom.qcow2.cow import Below, Copier, Payload, Relocation
from blkloom.qcow2.discard import Discarder
from blkloom.qcow2.errors import CorruptImage
from blkloom.qcow2.flush import WriteBack
from blkloom.qcow2.header import Autoclear, Incompatible, encode_fields
from blkloom.qcow2.l2_checks import L2Checks
from blkloom.qcow2.mapping import Install, Mapping
from blkloom.qcow2.overlap_check import Metadata, OverlapCheck
from blkloom.qcow2.preparing import Preparer
from blkloom.qcow2.refcounts import Refcounts
from blkloom.qcow2.snapshots import read_snapshots
from blkloom.qcow2.tables import Kind
from blkloom.qcow2.types import GuestOffset, HostOffset

if TYPE_CHECKING:
    from blkloom.qcow2.image import Image

_log = logging.getLogger(__name__)

_DIRTY_LIMIT: Final = 32 << 20
"""Bytes of changed L2 tables at which they are written without being asked."""


@dataclass(frozen=True, slots=True)
class Options:
    """preallocate: bytes around a write that may be given places with it, more when writing goes on and on, 0 for
    none. direct: see `Allocator`. discard: whether discards free clusters. compact_zeroes: writes of nothing but
    zeros, as far as they come here, free clusters too. dirty_limit: bytes of changed L2 tables kept.
    """

    preallocate: int = 4 << 20
    direct: bool = False
    discard: bool = True
    compact_zeroes: bool = False
    dirty_limit: int = _DIRTY_LIMIT


class Writer:
    """Writes to `image`, which is open for that."""

    def __init__(
        self,
        image: Image,
        *,
        read: Callable[[GuestOffset, int], bytes],
        install: Install,
        synchronize: Callable[[], None],
        below: Below | None = None,
        relocation: Relocation | None = None,
        sync_data: Callable[[], None] | None = None,
        options: Options | None = None,
        reserve: Callable[[HostOffset, int], None] | None = None,
        secure: Callable[[HostOffset, int], None] | None = None,
        broke: Callable[[], None] | None = None,
        wants_work: Callable[[], None] = lambda: None,
        checked: Callable[[int], None] = lambda _changed: None,
    ) -> None:
        """Raises CorruptImage, OSError.

        read: what the disk holds now, zeros past its end. install: tells the engine of entries, in units of the
        image. synchronize: see `_engine.Device.synchronize`. below: the backing chain. relocation: how to
        copy clusters quickly, if there is a way. sync_data: makes guest data durable, if it is in another file.
        reserve, secure: see `Allocator`.
        broke: the image is `broken`; from then on all units are `guarded`, and the engine should know.
        wants_work: `work` has something to do from now on. checked: all refcounts are right now; how many were not.
        """
        assert image.writable, "it was opened so"
        self._image = image
        self._options = options or Options()
        self.broken: OSError | None = None
        """Why nothing is written any more: the image is corrupt, or a sync of it failed."""
        self._changed = False
        """Something may have to be written."""
        self._said_so = False
        """The image says that it is being changed."""
        self._broke = broke
        self._lazy = image.lazy_refcounts and image.header.version >= 3
        geometry, header = image.geometry, image.header
        snapshots = read_snapshots(image.storage, header)
        self.bitmaps: Final = open_bitmaps(image)
        self._refcounts = Refcounts(
            image.storage,
            cluster_bits=geometry.cluster_bits,
            order=header.refcount_order,
            table_offset=header.refcount_table_offset,
            table_clusters=header.refcount_table_clusters,
        )
        self._overlaps = OverlapCheck(image, self._refcounts, snapshots, self.bitmaps)
        me = weakref.proxy(self)  # in a circle all of this would outlive its use
        self._refcounts.before_change = lambda number, cluster: me._block_changes(number, cluster)
        self._l2_checks = L2Checks(image, self._refcounts, self._overlaps, lambda error: me.mark_corrupt(error))
        image.on_l2_read = lambda table: me._l2_checks.read(table)
        self.allocator: Final = Allocator(
            self._refcounts,
            image.storage,
            cluster_bits=geometry.cluster_bits,
            metadata_in=self._overlaps.allocation,
            frees=self._overlaps.frees,
            check_end=lambda: me._check_end(),
            reserve=reserve,
            secure=secure,
            direct=self._options.direct and not header.has_data_file,
            doubtful=True,
        )
        self._write_back = WriteBack(
            image,
            self._refcounts,
            self.allocator,
            lazy=self._lazy,
            synchronize=synchronize,
            sync_data=sync_data or (image.data_storage.sync if header.has_data_file else _nothing),
        )
        self._mapping = mapping = Mapping(
            image,
            self.allocator,
            self._write_back,
            self._overlaps,
            self._l2_checks,
            below=below,
            install=install,
            guarded=lambda first, count: me.guarded(first, count),
            unseen=self.bitmaps.unseen if self.bitmaps.tracking else None,
            quiet=synchronize if self._options.direct else None,
        )
        self.copier: Final = Copier(image.data_storage, read, relocation)
        self.ahead: Final = Ahead(mapping, self._options.preallocate)
        self._preparer = Preparer(mapping, self.copier, self.ahead, self._overlaps)
        self._batch = BatchAllocation(mapping, self.copier, self.ahead)
        self._discarder = Discarder(mapping, self._preparer, self.ahead)
        self._wants_work = wants_work
        self._tell_checked = checked
        self._check = BackgroundCheck(
            image,
            self._refcounts,
            self._overlaps,
            self._l2_checks,
            snapshots,
            self.allocator,
            self._write_back,
            ended=lambda changed: me._checked(changed),
        )
        self._attach()
        if self._check.running:
            wants_work()

    # what the engine asks for

    def prepare_write(self, offset: int, length: int, payload: Callable[[], bytes] | None = None) -> bool:
        """Makes [offset, offset + length) writable where it is: the engine may look again. payload: fetches the
        write's bytes; they are then written along with what is copied. Returns whether that was all of the write.
        """
        if payload and self._options.compact_zeroes:
            data = payload()
            if data.count(0) == length:
                self.write_zeroes(offset, length, may_unmap=True)
                return True
        with self._changing((offset, length)):
            done = self._preparer.prepare(Payload(GuestOffset(offset), length, payload))
        self._limit()
        return done

    def prepare_writes(self, writes: Sequence[tuple[int, int]]) -> list[int]:
        """`prepare_write`, of several (offset, length) at once and without their bytes. Returns the numbers of those
        that the engine may look up again; the others, and what is wrong with them, are for `prepare_write`.
        """
        if self.broken is not None or self._options.compact_zeroes:
            return []
        with self._changing(*writes):
            ready = self._batch.prepare(writes)
        self._limit()
        return ready

    def write(self, offset: int, data: bytes) -> None:
        """Writes to where `prepare_write` made room for all of it, in the engine's place."""
        with self._changing((offset, len(data))):
            for start, end, host in self._mapping.hosts(offset, offset + len(data)):
                self._image.data_storage.write(HostOffset(host), data[start - offset : end - offset])

    def discard(self, offset: int, length: int) -> None:
        """The contents are not needed any more."""
        if self._options.discard:
            with self._changing((offset, length)):
                self._discarder.discard(offset, length)
            self._limit()

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool, fast: bool = False) -> None:
        """The range reads as zeros. Raises FaultError (EOPNOTSUPP) for what cannot be done fast."""
        with self._changing((offset, length)):
            keep = not (may_unmap and self._options.discard)
            self._discarder.write_zeroes(offset, length, keep=keep, fast=fast)
        self._limit()

    def flush(self) -> None:
        """Everything that was written before is durable when this returns. Raises FaultError (EIO) when some of it
        never will be.
        """
        if self.broken is None:
            with self._finding_corruption():
                self._write_back.write_back()
            if self.allocator.freed_inside:
                self._look_for_space()
        elif self._write_back.dirty:
            raise FaultError(errno.EIO, f"what was not flushed before is lost: {self.broken}")

    @property
    def checking(self) -> bool:
        """Whether tables are being looked at, after which clusters inside the file are used."""
        return self._check.running

    def work(self) -> bool:
        """A step of the background check, a few milliseconds; whether there is more. Raises CorruptImage."""
        if self.broken is not None:
            return False
        with self._finding_corruption():
            return self._check.step()

    def guarded(self, first: int, count: int) -> NDArray[np.bool_]:
        """Of `count` units from `first` on, those that the engine may not write to by itself, though they are the
        guest's own: a dirty bitmap would miss it, or metadata is there too.
        """
        found = self.bitmaps.unseen(first, count) if self.bitmaps.tracking else np.zeros(count, np.bool_)
        if self.broken is not None:
            found[:] = True
        elif not self._image.header.has_data_file:
            units = self._image.units(first, count)
            data = units.kinds == Kind.DATA
            found[data] |= self._overlaps.data(units.offsets[data] >> np.uint64(self._image.geometry.cluster_bits))
        return found

    def close(self) -> None:
        """Writes everything, takes out what was given ahead in vain, cuts the file, and says that all is well."""
        if self.broken is None:
            with self._finding_corruption():
                self._check.end()
        if self.broken is not None or not self._changed:
            return
        self._said_so = False  # nor, for certain, if this fails half-way
        with self._finding_corruption():
            self._write_back.write_back()
            self.ahead.take_out()
            self._write_back.write_back()
            self._store_bitmaps()
            self._write_back.write_all()
            self.allocator.trim_file()
            if self._image.header.incompatible & Incompatible.DIRTY and not self._check.unfinished:
                self._set_header(incompatible=self._image.header.incompatible & ~Incompatible.DIRTY)
            else:
                self._image.storage.sync()
            # Last, for whoever writes on after a failure relies on them; from here on that begins anew.
            self._changed = False
            if self.bitmaps.end():
                self._image.storage.sync()

    def mark_corrupt(self, error: CorruptImage) -> None:
        """The image's metadata is wrong: says so in the log and in the image, and only reads from now on."""
        if self.broken is not None:
            return
        self.broken = error
        self._image.report(error)
        _log.error("%s: marked corrupt; nothing is written to the image any more", self._image.path)
        try:
            if self._image.header.version >= 3:
                self._set_header(incompatible=self._image.header.incompatible | Incompatible.CORRUPT)
        finally:
            if self._broke:
                self._broke()

    def fail(self, error: OSError) -> None:
        """A sync of one of its files failed. What was written before may be lost, tables may lead to it, and what is on
        disk now is not known any more: only reads from now on. The image is not marked, for nothing that would be
        written could be relied on.
        """
        if self.broken is None:
            self.broken = error
            if self._broke:
                self._broke()

    # below: the beginning and the end

    def _look_for_space(self) -> None:
        self._check.look_for_space()
        if self._check.running:
            self._wants_work()

    def _check_end(self) -> None:
        """Before the file grows for the first time: where counts go past its end, it may have been cut short. Counts of
        an image that was not closed say nothing; there the background check finds it.
        """
        if not self._check.unfinished and self.allocator.end > self.allocator.file_end:
            self._check.finish()

    def _checked(self, changed: int) -> None:
        """The background check has ended, and all counts are on disk."""
        dirty = self._image.header.incompatible & Incompatible.DIRTY
        if dirty and not (self._lazy and self._said_so):
            self._set_header(incompatible=self._image.header.incompatible & ~Incompatible.DIRTY)
        self._image.wants_check = False
        self._tell_checked(changed)

    def _attach(self) -> None:
        """What must be so before anybody writes anything."""
        image = self._image
        if self.bitmaps.lost:
            with suppress(CorruptImage), self._finding_corruption():
                self._overlaps.bitmap_writes()
                self.bitmaps.give_up()
                image.storage.sync()
        unknown = image.header.autoclear & ~sum(Autoclear)
        if unknown:
            self._set_header(autoclear=image.header.autoclear & ~unknown)

    @contextmanager
    def _changing(self, *ranges: tuple[int, int]) -> Iterator[None]:
        if self.broken is not None:
            corrupt = "corrupt and " if isinstance(self.broken, CorruptImage) else ""
            raise FaultError(errno.EIO, f"the image is {corrupt}only read: {self.broken}")
        with self._finding_corruption():
            if not self._said_so:
                self._first_change()
            if self.bitmaps.tracking:
                for offset, length in ranges:
                    self.bitmaps.mark(offset, length)
            yield

    def _first_change(self) -> None:
        self._overlaps.structures()
        if self.bitmaps.tracking:
            self._overlaps.bitmap_writes()
        self._lengthen()
        begun = self.bitmaps.begin()
        if self._lazy:
            self._set_header(incompatible=self._image.header.incompatible | Incompatible.DIRTY)
        elif begun:
            self._image.storage.sync()
        self._changed = self._said_so = True
        self._look_for_space()

    def _block_changes(self, number: int, cluster: int) -> None:
        self._overlaps.writes(Metadata.REFCOUNT_BLOCK, cluster, f"refcount block {number}")

    def _lengthen(self) -> None:
        """Data that the file ends in front of or within may be written to from now on."""
        image, cluster = self._image, self._image.geometry.cluster
        if image.header.has_data_file:
            if image.data_storage.size() < image.size:
                image.data_storage.truncate(image.size)
        elif image.storage.size() % cluster:
            image.storage.truncate(-(-image.storage.size() // cluster) * cluster)

    @contextmanager
    def _finding_corruption(self) -> Iterator[None]:
        try:
            yield
        except CorruptImage as error:
            if error.path == self._image.path:  # and not a backing file's
                self.mark_corrupt(error)
            raise

    def _limit(self) -> None:
        if self._write_back.held > self._options.dirty_limit:
            self.flush()

    def _store_bitmaps(self) -> None:
        def allocate() -> HostOffset:
            return HostOffset(self.allocator.take(1).first << self._image.geometry.cluster_bits)

        write_tables = self.bitmaps.store_bits(allocate)
        if write_tables is not None:
            self._write_back.write_all()
            self._image.storage.sync()
            write_tables()

    def _set_header(self, *, incompatible: int | None = None, autoclear: int | None = None) -> None:
        """Fields only, in one sector; durable when it returns."""
        header = self._image.header
        self._image.header = replace(
            header,
            incompatible=header.incompatible if incompatible is None else incompatible,
            autoclear=header.autoclear if autoclear is None else autoclear,
        )
        self._image.storage.write(HostOffset(0), encode_fields(self._image.header))
        self._image.storage.sync()


def _nothing() -> None:
    """Guest data is in the image's own file."""
