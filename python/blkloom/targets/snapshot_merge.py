"""`snapshot-merge`: an origin into which the changes of a snapshot are merged while it is used.

Source: Linux Documentation/admin-guide/device-mapper/snapshot.rst; dm-snap.c for the order and the status. Chunks in
the store are read and written there until they are merged. Merging begins with the last exceptions: a run of them is
copied to the origin and flushed, and then the exceptions are removed durably. So a merge that was killed continues with
the same run. It is complete when the status says as many sectors in use as of metadata.

The step of `work` runs between faults, on the mapper's thread: requests to the chunks that are being merged wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from typing_extensions import override

from blkloom import entries
from blkloom.targets.exception_store import ChunkMove, PersistentStore, read_header
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import RETRY, LoadedTarget, Mapped, Retry
from blkloom.targets.origin_group import Writer, group_of
from blkloom.targets.snapshot_map import SnapshotMap, move_bytes
from blkloom.targets.snapshot_spec import SnapshotSpec
from blkloom.units import Bytes

_TOGETHER: Final = 1 << 20
"""Bytes that are merged in one step, unless a chunk is larger."""


class SnapshotMerge(SnapshotSpec):
    """`origin`, with the changes in `cow`, which are merged into it."""

    name: ClassVar[str] = "snapshot-merge"
    summary: ClassVar[str] = "a device into which the changes of a snapshot are merged"

    @override
    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        if self.kind == "N":
            what = "Snapshot exception store does not support snapshot-merge"
            raise context.refuse(what, value="N", cure="only persistent stores (P or PO) can be merged")
        if context.read_only:
            raise context.refuse("a merge writes to its origin", cure="load the table for writing")
        return _LoadedMerge(self, context, length)


class _LoadedMerge(LoadedTarget, Writer):
    spec: SnapshotMerge
    writes = True
    prepares_writes = True

    def __init__(self, spec: SnapshotMerge, context: LoadContext, length: Bytes) -> None:
        size = spec.check(context)
        self._length = length
        self._group = group_of(spec.origin, context)
        self._segment = context.segment()
        self._origin = context.lower(spec.origin.extent(context, length), length)
        self._cow = context.lower(spec.cow.extent(context, size), size)
        self._store = PersistentStore(self._cow, spec.chunk_of(self._cow, context))
        self._map = SnapshotMap(self._origin, self._cow, self._cow, self._store, length)
        self._started = False
        self._paused = True
        self._invalid = False
        self._failed = False
        super().__init__(spec, [(Bytes(0), length, self._map.extent())])

    @override
    def preresume(self) -> Mapped | None:
        if not self._started:
            self._begin()
        self._group.add_writer(self)
        self._paused = False
        self._segment.has_work()
        return None

    def _begin(self) -> None:
        """Reads the store. Raises BackingError."""
        with self.spec.opening_store("merged", "name the store of a snapshot"):
            header = read_header(self._cow)
            self._invalid = header is not None and not header.valid
            if header is None:
                raise ValueError("it has no header")
            if not self._invalid:  # otherwise only the origin counts
                self._map.add(self._store.begin())
        self._started = True

    @override
    def postsuspend(self) -> None:
        self._paused = True

    @override
    def close(self) -> None:
        self._group.remove_writer(self)

    @override
    def snapshots_changed(self) -> None:
        mapped: Mapped = []

        def drained() -> None:
            with self._group.lock:  # a step of the merge may be running
                self._map.reset(self._store.moves())
            mapped.append((Bytes(0), self._length, self._map.extent()))

        self._segment.remap(mapped, drained=drained)

    # the merge

    @override
    def work(self) -> bool:
        if self._paused or self._failed or self._invalid or not self._started:
            return False
        try:
            return self._merge_some()
        except OSError as error:
            self._failed = True
            self._segment.event(f"the merge of {self.spec.cow.path} failed: {error.strerror or error}")
            return False

    def _merge_some(self) -> bool:
        """Merges the last run of exceptions. Returns whether there may be more. Raises OSError."""
        chunk = self._store.chunk
        found = self._store.last_run(max(1, _TOGETHER // chunk))
        if found is None:
            self._segment.event(f"the merge of {self.spec.cow.path} is complete")
            return False
        first, count = found
        at = first.old * chunk
        size = min(count * chunk, self._length - at)
        with self._group.lock:
            self._map.table.fill(first.old, count, entries.FAULT)
            self._segment.synchronize()
            try:
                self._group.copy_before([(Bytes(at), Bytes(size))])
                buffer = bytearray(size)
                move_bytes(self._cow, [("r", buffer, first.new * chunk)])
                move_bytes(self._origin, [("w", buffer, at)])
                self._origin.flush()
                self._store.drop_last(count)
            except BaseException:
                self._map.add(ChunkMove(first.old + index, first.new + index) for index in range(count))
                raise
            self._map.table.fill(first.old, count, entries.data(at))
        return True

    # requests

    def _copy(self, writes: Sequence[tuple[Bytes, Bytes]]) -> None:
        """Has other snapshots copy unchanged chunks before a write to them, and makes them writable."""
        chunk = self._store.chunk
        with self._group.lock:
            chunks = list(self._map.chunks(writes))
            self._group.copy_before([(Bytes(number * chunk), chunk) for number in chunks])
            for number in chunks:
                if self._map.table.entry(number) != entries.FAULT:
                    self._map.table.fill(number, 1, entries.data(number * chunk))

    @override
    def read(self, offset: Bytes, length: Bytes) -> Retry:
        return RETRY  # it waited for the end of a step

    @override
    def prepare_writes(self, writes: Sequence[tuple[Bytes, Bytes]]) -> Sequence[int]:
        self._copy(writes)
        return range(len(writes))

    @override
    def write(self, offset: Bytes, data: bytes, *, fua: bool) -> Retry:
        self._copy([(offset, Bytes(len(data)))])
        return RETRY

    @override
    def write_zeroes(self, offset: Bytes, length: Bytes, *, may_unmap: bool, fast: bool) -> Retry:
        self._copy([(offset, length)])
        return RETRY

    @override
    def discard(self, offset: Bytes, length: Bytes) -> Retry:
        self._copy([(offset, length)])
        return RETRY

    @override
    def status(self) -> str:
        if self._invalid:
            return "Invalid"
        return "Merge failed" if self._failed else str(self._store.usage())
