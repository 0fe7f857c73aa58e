"""The targets that share an origin: its snapshots, and the targets that write to it.

The group of a device is among its `shared` objects; all devices of a stack are in one process. The targets
`snapshot-origin` and `snapshot-merge` are the writers: before they change a chunk of the origin, they call
`copy_before`.

`lock` protects the list of snapshots, their stores and their tables. Mapper threads of several devices take it. While a
thread has it, it does I/O to the origin's lower device and the stores, and waits for no handler of another device. A
thread that replaces the map of a writer (`add`) must not have it, because that waits for the writer's handlers.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, Protocol

from blkloom.units import Bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from blkloom.targets.device_ref import DeviceRef
    from blkloom.targets.load_context import LoadContext

_SHARED: Final = "snapshots"


class Keeper(Protocol):
    """A snapshot that keeps what its origin overwrites. chunk: bytes. is_valid: False: it keeps nothing any more."""

    chunk: Bytes
    is_valid: bool

    def copy_before(self, ranges: Iterable[tuple[Bytes, Bytes]]) -> None:
        """Copies what the ranges (offset, length) of the origin contain, before they change. If that fails, the
        snapshot becomes invalid. With the lock of the group; must not raise.
        """

    def succeeds(self, former: Keeper) -> bool:
        """Whether this snapshot, which is loaded and not active yet, has the store of `former`."""

    def take_over(self, former: Keeper) -> None:
        """Becomes active in place of `former`, which is closing. With the lock of the group; must not raise."""


class Writer(Protocol):
    """A live target that writes to the origin."""

    def snapshots_changed(self) -> None:
        """Makes every chunk of the map fault at its first write again. Without the lock of the group."""


class OriginGroup:
    """Snapshots and writers of one origin."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._snapshots: list[Keeper] = []
        self._writers: list[Writer] = []
        self._loaded: list[Keeper] = []
        """Snapshots that are not active yet."""

    @property
    def smallest_chunk(self) -> Bytes | None:
        """The smallest chunk of the valid snapshots; None: there are none."""
        with self.lock:
            return min((snapshot.chunk for snapshot in self._snapshots if snapshot.is_valid), default=None)

    @property
    def has_writers(self) -> bool:
        """Whether a writer is loaded."""
        with self.lock:
            return bool(self._writers)

    @property
    def active(self) -> list[Keeper]:
        """The snapshots that are active."""
        with self.lock:
            return list(self._snapshots)

    def announce(self, snapshot: Keeper) -> None:
        """Notes a snapshot that is loaded. If a snapshot with the same store closes, it becomes active at once, so that
        the writers change nothing between the two.
        """
        with self.lock:
            self._loaded.append(snapshot)

    def add(self, snapshot: Keeper) -> None:
        """Adds a snapshot: from now on every first write to a chunk is copied to it. Waits for the writes that the
        writers have in flight. Raises DrainError.
        """
        with self.lock:
            self._loaded = [known for known in self._loaded if known is not snapshot]
            self._snapshots.append(snapshot)
            writers = list(self._writers)
        try:
            for writer in writers:
                writer.snapshots_changed()
        except BaseException:
            self.remove(snapshot)
            raise

    def remove(self, snapshot: Keeper) -> None:
        """Removes a snapshot, if it is there. One that was loaded with its store takes over."""
        with self.lock:
            was_active = snapshot in self._snapshots
            self._snapshots = [known for known in self._snapshots if known is not snapshot]
            self._loaded = [known for known in self._loaded if known is not snapshot]
            for successor in [known for known in self._loaded if was_active and known.succeeds(snapshot)]:
                self._loaded.remove(successor)
                self._snapshots.append(successor)
                successor.take_over(snapshot)

    def add_writer(self, writer: Writer) -> None:
        """Adds a writer, once."""
        with self.lock:
            if writer not in self._writers:
                self._writers.append(writer)

    def remove_writer(self, writer: Writer) -> None:
        """Removes a writer, if it is there."""
        with self.lock:
            self._writers = [known for known in self._writers if known is not writer]

    def copy_before(self, ranges: list[tuple[Bytes, Bytes]]) -> bool:
        """Has every snapshot copy what the ranges contain. Returns whether there are valid snapshots afterwards. With
        the lock.
        """
        for snapshot in self._snapshots:
            if snapshot.is_valid:
                snapshot.copy_before(ranges)
        return any(snapshot.is_valid for snapshot in self._snapshots)


def group_of(origin: DeviceRef, context: LoadContext) -> OriginGroup:
    """The group of an origin. Only a blkloom device has one that targets of several devices can share: a file that is
    written to belongs to one device, whose tables share its group.
    """
    name = origin.device_name(context.device_folder)
    if name is not None:
        group = context.device(name).shared.setdefault(_SHARED, OriginGroup())
    else:
        group = context.shared(f"{_SHARED} of {origin.path}", OriginGroup())
    assert isinstance(group, OriginGroup), "no other target shares that"
    return group
