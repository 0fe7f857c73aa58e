"""`snapshot`: what a device contained at an instant, with changes of its own.

Source: Linux Documentation/admin-guide/device-mapper/snapshot.rst; dm-snap.c for the status and the rules. Unchanged
chunks are in the origin, changed ones in the store, see `snapshot_map.py` and `exception_store.py`. The target
`snapshot-origin` on the same origin copies chunks to the store before it changes them.

If the table is loaded again, the snapshot with the same store takes over the exceptions of the former one, as in the
kernel: a transient store has them only in memory.

A chunk that cannot be copied makes the snapshot invalid: all its I/O fails, and the origin continues. If a write to the
snapshot itself finds no space in a PO store, the snapshot has overflowed instead: writes fail, and reads continue.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable, Sequence
from typing import ClassVar, Final

from typing_extensions import override

from blkloom._engine import Device, Extent
from blkloom.errors import BackingError, FaultError
from blkloom.targets.exception_store import ExceptionStore, PersistentStore, StoreFull, TransientStore, read_header
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import RETRY, LoadedTarget, Mapped, Retry
from blkloom.targets.origin_group import Keeper, group_of
from blkloom.targets.snapshot_map import SnapshotMap
from blkloom.targets.snapshot_spec import SnapshotSpec
from blkloom.units import Bytes

_log = logging.getLogger(__name__)

_LOG_START: Final = Bytes(4096)
"""Where the exceptions of a transient store begin in the memory that the next process gets. Byte 0 is the state."""
_ACTIVE, _INVALID = b"\1", b"\2"


class Snapshot(SnapshotSpec):
    """A snapshot of `origin`; changes are in `cow`."""

    name: ClassVar[str] = "snapshot"
    summary: ClassVar[str] = "a writable snapshot of a device; changed chunks are in a store"

    @override
    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        return _LoadedSnapshot(self, context, length)


class _LoadedSnapshot(LoadedTarget, Keeper):
    """Active from its first resume on: the store is read then, and chunks are copied to it, also while the device is
    suspended.
    """

    spec: Snapshot
    writes = True
    prepares_writes = True

    def __init__(self, spec: Snapshot, context: LoadContext, length: Bytes) -> None:
        size = spec.check(context)
        self._read_only = context.read_only
        self._group = group_of(spec.origin, context)
        self._segment = context.segment()
        passes_discards = spec.discard_passdown_origin and not context.read_only
        self._origin = context.lower(spec.origin.extent(context, length, read_only=not passes_discards), length)
        cow = context.lower(spec.cow.extent(context, size), size)
        self._check_transient(spec, context)
        self.chunk = spec.chunk_of(cow, context)
        self._notes, store = open_store(spec, context, cow, self.chunk)
        clients_cow = context.lower(Extent.device(cow, 0, read_only=context.read_only), size)
        origin = context.lower(Extent.device(self._origin, 0, read_only=True), length)
        self._map = SnapshotMap(origin, cow, clients_cow, store, length)
        self.is_valid = True
        self._overflowed = False
        self._active = False
        super().__init__(spec, [(Bytes(0), length, self._map.extent())])
        if self._notes.pread(1, 0) != b"\0":
            # A former process has had it active, maybe suspended. Its origin may be written to before the next resume.
            self._begin()
            self._group.add(self)
        else:
            self._group.announce(self)

    def _check_transient(self, spec: Snapshot, context: LoadContext) -> None:
        """Raises TableError if exceptions of the active table that are only in memory would be lost."""
        for former in self._group.active:
            if isinstance(former, _LoadedSnapshot) and former.spec.cow == spec.cow:
                kinds = {former.spec.kind, spec.kind}
                if "N" in kinds and (len(kinds) > 1 or former.spec.chunk != spec.chunk):
                    what = "the exceptions of the snapshot that has this store would be lost"
                    words = f"{former.spec.kind} {former.spec.chunk}"
                    raise context.refuse(what, value=spec.cow.path, cure=f"write {words}, as in the live table")

    # its life

    @override
    def preresume(self) -> Mapped | None:
        if not self._active:
            self._begin()
            self._group.add(self)
        return None

    def _begin(self) -> None:
        """Reads the store, or makes it. Raises BackingError."""
        if self._read_only and self._group.has_writers:
            what = "a read-only snapshot cannot keep what its origin overwrites"
            raise BackingError(what, path=self.spec.cow.path, errno=errno.EROFS, cure="load it for writing")
        with self.spec.opening_store("used", "name the store of this origin"):
            header = None if self.spec.kind == "N" else read_header(self._map.cow)
            if self._notes.pread(1, 0) == _INVALID or (header is not None and not header.valid):
                self.is_valid = False
                self._map.fail_all()
            else:
                self._map.add(self._map.store.begin())
                self._notes.pwrite(_ACTIVE, 0)
        self._active = True

    @override
    def succeeds(self, former: Keeper) -> bool:
        return isinstance(former, _LoadedSnapshot) and former.spec.cow == self.spec.cow

    @override
    def take_over(self, former: Keeper) -> None:
        assert isinstance(former, _LoadedSnapshot), "`succeeds` says so"
        try:
            own, store = self._map.store, former._map.store
            if isinstance(own, TransientStore) and isinstance(store, TransientStore):
                own.copy_log(store)
                self._notes.pwrite(former._notes.pread(1, 0), 0)
            self._begin()
        except (BackingError, OSError) as error:
            self._invalidate(str(error))

    @override
    def close(self) -> None:
        self._group.remove(self)

    # what the origin overwrites

    @override
    def copy_before(self, ranges: Iterable[tuple[Bytes, Bytes]]) -> None:
        try:
            chunks = list(self._map.chunks(ranges))
            if chunks and self._read_only:
                raise FaultError(errno.EROFS, "it is read-only")
            if chunks:
                self._map.copy(chunks)
                self._segment.synchronize()  # reads that found the chunks in the origin
        except OSError as error:
            self._invalidate(f"{error.strerror or error}")

    def _invalidate(self, why: str) -> None:
        """Makes all I/O fail, for good. With the lock of the group."""
        self.is_valid = False
        try:
            self._notes.pwrite(_INVALID, 0)
            self._map.store.invalidate()
        except OSError as error:
            _log.error("%s: the snapshot could not be marked as invalid: %s", self.spec.cow.path, error)
        self._map.fail_all()
        self._segment.event(f"snapshot {self.spec.cow.path} is invalid now: {why}")

    # its own changes

    def _copy(self, ranges: Sequence[tuple[Bytes, Bytes]], offset: int = 0, data: bytes = b"") -> int:
        """Has chunks copied that are unchanged, before a write to the snapshot. Returns their number. Raises
        FaultError.
        """
        with self._group.lock:
            if not self.is_valid or self._overflowed:
                raise FaultError(errno.EIO, "the snapshot is invalid, or has overflowed")
            chunks = list(self._map.chunks(ranges))
            try:
                self._map.copy(chunks, offset=offset, data=data)
            except StoreFull:
                if self.spec.kind != "PO":
                    self._invalidate("the exception store is full")
                else:
                    self._overflowed = True
                    self._map.refuse_writes()
                    self._segment.event(f"snapshot {self.spec.cow.path} has overflowed: its exception store is full")
                raise
            except OSError as error:
                self._invalidate(f"{error.strerror or error}")
                raise
            self._segment.synchronize()  # reads that found the chunks in the origin, which may change from now on
            return len(chunks)

    @override
    def prepare_writes(self, writes: Sequence[tuple[Bytes, Bytes]]) -> Sequence[int]:
        self._copy(writes)
        return range(len(writes))

    @override
    def write(self, offset: Bytes, data: bytes, *, fua: bool) -> Retry | None:
        copied = self._copy([(offset, Bytes(len(data)))], offset, data)
        whole = not offset % self.chunk and copied * self.chunk == len(data)
        return None if whole and not fua else RETRY

    @override
    def write_zeroes(self, offset: Bytes, length: Bytes, *, may_unmap: bool, fast: bool) -> Retry:
        self._copy([(offset, length)])
        return RETRY

    @override
    def discard(self, offset: Bytes, length: Bytes) -> None:
        """Discards of unchanged chunks; others go to the store without Python."""
        if not self.is_valid or self._overflowed:
            raise FaultError(errno.EIO, "the snapshot is invalid, or has overflowed")
        if self.spec.discard_passdown_origin:
            self._origin.discard(offset, length)

    @override
    def status(self) -> str:
        if not self.is_valid:
            return "Invalid"
        return "Overflow" if self._overflowed else str(self._map.store.usage())


def open_store(spec: SnapshotSpec, context: LoadContext, cow: Device, chunk: Bytes) -> tuple[Device, ExceptionStore]:
    """The store on `cow`, and the memory that the next process of the device gets: its first byte is the state, zero at
    first.
    """
    transient = spec.kind == "N"
    size = Bytes(_LOG_START + (TransientStore.log_size(Bytes(cow.size), chunk) if transient else 0))
    # A persistent store has all that a snapshot needs, but for whether it was in use.
    if_lost = None if transient else _ACTIVE if context.was_active else b""
    notes = context.lower(Extent.memory(context.region(size, if_lost=if_lost), 0), size)
    if transient:
        return notes, TransientStore(cow, chunk, notes, _LOG_START)
    return notes, PersistentStore(cow, chunk, read_only=context.read_only)
