"""`snapshot-origin`: a device with snapshots; old contents are copied to them before they are overwritten.

Source: Linux Documentation/admin-guide/device-mapper/snapshot.rst. Reads go straight to the origin. While there are
snapshots, the segment is a cluster table whose entries are read-only, so that the first write, discard or write-zeroes
to a cluster faults. All snapshots copy it then, and the entry becomes writable. A new snapshot begins with a new table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from typing_extensions import override

from blkloom import entries
from blkloom._engine import ClusterTable, Extent
from blkloom.table.syntax import Syntax
from blkloom.targets.device_ref import DeviceRef, whole_device
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import RETRY, LoadedTarget, Mapped, Retry
from blkloom.targets.origin_group import Writer, group_of
from blkloom.targets.snapshot_map import unchanged
from blkloom.targets.spec import TargetSpec
from blkloom.units import Bytes

_FREE: Final = 4096
"""Clusters that become writable together when no snapshot is left."""


class SnapshotOrigin(TargetSpec):
    """A segment that maps to `origin`, which has snapshots."""

    origin: DeviceRef

    name: ClassVar[str] = "snapshot-origin"
    arguments: ClassVar[Syntax] = (whole_device("origin", "origin"),)
    summary: ClassVar[str] = "a device with snapshots"
    singleton: ClassVar[bool] = True

    @override
    def device_refs(self) -> Sequence[DeviceRef]:
        return (self.origin,)

    @override
    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        return _LoadedOrigin(self, context, length)


class _LoadedOrigin(LoadedTarget, Writer):
    spec: SnapshotOrigin
    writes = True
    prepares_writes = True

    def __init__(self, spec: SnapshotOrigin, context: LoadContext, length: Bytes) -> None:
        self._read_only = context.read_only
        self._length = length
        self._group = group_of(spec.origin, context)
        self._segment = context.segment()
        self._lower = context.lower(spec.origin.extent(context, length), length)
        self._chunk = Bytes(0)
        self._table: ClusterTable | None = None
        super().__init__(spec, self._mapped())

    def _mapped(self) -> Mapped:
        """The map for the present snapshots."""
        chunk = None if self._read_only else self._group.smallest_chunk
        if chunk is None:
            self._table = None
            extent = Extent.device(self._lower, 0, read_only=self._read_only)
        else:
            self._chunk = chunk
            self._table = unchanged(self._length, chunk, [self._lower])
            extent = Extent.table(self._table)
        return [(Bytes(0), self._length, extent)]

    @override
    def preresume(self) -> Mapped | None:
        if self._read_only:
            return None
        self._group.add_writer(self)
        return self._mapped()

    @override
    def snapshots_changed(self) -> None:
        mapped: Mapped = []
        self._segment.remap(mapped, drained=lambda: mapped.extend(self._mapped()))

    @override
    def close(self) -> None:
        self._group.remove_writer(self)

    @override
    def prepare_writes(self, writes: Sequence[tuple[Bytes, Bytes]]) -> Sequence[int]:
        if (table := self._table) is None:
            return range(len(writes))
        clusters = [range(offset // self._chunk, -(-(offset + length) // self._chunk)) for offset, length in writes]
        with self._group.lock:
            kept = self._group.copy_before(
                [(Bytes(part.start * self._chunk), Bytes(len(part) * self._chunk)) for part in clusters]
            )
            last = -(-self._length // self._chunk)
            for part in clusters:
                first, end = part.start, part.stop
                if not kept:
                    first, end = first // _FREE * _FREE, min(-(-end // _FREE) * _FREE, last)
                table.fill(first, end - first, entries.data(first * self._chunk))
        return range(len(writes))

    @override
    def write(self, offset: Bytes, data: bytes, *, fua: bool) -> Retry:
        self.prepare_writes([(offset, Bytes(len(data)))])
        return RETRY

    @override
    def write_zeroes(self, offset: Bytes, length: Bytes, *, may_unmap: bool, fast: bool) -> Retry:
        self.prepare_writes([(offset, length)])
        return RETRY

    @override
    def discard(self, offset: Bytes, length: Bytes) -> Retry:
        self.prepare_writes([(offset, length)])
        return RETRY
