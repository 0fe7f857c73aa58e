"""The registry of devices: their names, uuids and minor numbers, and which device is stacked on which.

Pure: no I/O, no event loop; one thread. Its rules: names, uuids and minor numbers are unique; no device is stacked on
itself; a device below another one cannot be removed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

import msgspec

from blkloom.control.messages import DeviceKey, Selector
from blkloom.control.states import (
    DeviceInfo,
    DeviceState,
    ExportState,
    FailedSync,
    Loaded,
    LoopNotes,
    NodeOptions,
    NodeState,
    file_path,
)
from blkloom.device_names import check_new_name, check_uuid
from blkloom.errors import DeviceBusy, DeviceExists, NoSuchDevice, ResourceError, TableError, UsageError

if TYPE_CHECKING:
    from blkloom.supervisor.group import Group

MOST_MINORS: Final = 1 << 20
"""Number of minor numbers, as in the kernel (MINORBITS)."""


class Entry(msgspec.Struct):
    """A device. below: minors of the devices below it, by slot. suspended: by a verb for this device. suspended_for:
    the lower device whose suspend has suspended this one too.
    """

    name: str
    minor: int
    group: Group
    uuid: str = ""
    active: Loaded | None = None
    inactive: Loaded | None = None
    suspended: bool = False
    suspended_for: int | None = None
    event: int = 0
    exports: list[ExportState] = msgspec.field(default_factory=list)
    connections: int = 0
    waiting: str = ""
    """What a verb for it waits for."""
    node: NodeState | None = None
    node_options: NodeOptions = msgspec.field(default_factory=NodeOptions)
    size: int = 0
    block_size: int = 512
    targets: int = 0
    types: list[str] = msgspec.field(default_factory=list)
    deps: list[str] = msgspec.field(default_factory=list)
    inactive_deps: list[str] = msgspec.field(default_factory=list)
    below_active: frozenset[int] = frozenset()
    below_inactive: frozenset[int] = frozenset()
    memory_active: int = 0
    memory_inactive: int = 0
    memory_loading: int = 0
    """Memory of a table that is being loaded into the inactive slot."""
    failed: str = ""
    restarts: int = 0
    deferred: bool = False
    making: bool = False
    autoclear: bool = False
    opened: bool = False
    """Whether it has had a client, or a device above it that is not its partition."""
    loop: LoopNotes | None = None
    failed_syncs: list[FailedSync] = msgspec.field(default_factory=list)
    io_errors: int = 0
    last_io_error: str = ""

    @property
    def key(self) -> Selector:
        """Selects it in a call."""
        return Selector(minor=self.minor)

    @property
    def below(self) -> frozenset[int]:
        """Devices below either of its tables."""
        return self.below_active | self.below_inactive

    @property
    def is_partition(self) -> bool:
        """Whether it is a partition of the one device below it."""
        return self.loop is not None and self.loop.partition > 0

    @property
    def loads(self) -> frozenset[int]:
        """Load numbers of the tables in its slots."""
        return frozenset(loaded.load for loaded in (self.active, self.inactive) if loaded is not None)

    def state(self) -> DeviceState:
        """The state that a worker needs to start the device."""
        return DeviceState(
            name=self.name,
            minor=self.minor,
            uuid=self.uuid,
            active=self.active,
            inactive=self.inactive,
            suspended=self.suspended or self.suspended_for is not None,
            event=self.event,
            exports=list(self.exports),
            autoclear=self.autoclear,
            opened=self.opened,
            loop=self.loop,
            failed_syncs=[failed for failed in self.failed_syncs if failed.label.load in self.loads],
            io_errors=self.io_errors,
            last_io_error=self.last_io_error,
        )


class Registry:
    """Entries by minor number, found by name and uuid."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: dict[int, Entry] = {}
        self._names: dict[str, Entry] = {}
        self._uuids: dict[str, Entry] = {}
        self._users: dict[int, set[int]] = {}
        self._next_minor = 0
        self._next_load = 1

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        """Entries in the order of their minor numbers."""
        return iter([self._entries[minor] for minor in sorted(self._entries)])

    def get(self, minor: int) -> Entry | None:
        """Finds a device by its minor number."""
        return self._entries.get(minor)

    def named(self, name: str) -> Entry | None:
        """Finds a device by its name."""
        return self._names.get(name)

    def find(self, device: DeviceKey) -> Entry:
        """Finds the device of a selector. Raises NoSuchDevice, UsageError."""
        if isinstance(device, str):
            entry = self._names.get(device)
        elif bool(device.uuid) == (device.minor is not None):
            raise UsageError("a selector has either a uuid or a minor number", cure="give one of both")
        else:
            entry = self._uuids.get(device.uuid) if device.minor is None else self._entries.get(device.minor)
        if entry is None:
            raise NoSuchDevice(f"Device {device} not found", cure="`blkloom ls` lists the devices")
        return entry

    def new_load(self) -> int:
        """A new load number."""
        self._next_load += 1
        return self._next_load - 1

    def seen_load(self, load: int) -> None:
        """Notes a load number of a former supervisor: new ones will be higher."""
        self._next_load = max(self._next_load, load + 1)

    def check_new(self, name: str, uuid: str, minor: int | None) -> int:
        """Checks a new device and returns its minor number. Raises DeviceExists, ResourceError, UsageError."""
        check_new_name(name)
        check_uuid(uuid)
        if name in self._names:
            raise DeviceExists(f"a device '{name}' exists", cure="choose another name, or remove that one")
        if uuid and uuid in self._uuids:
            raise DeviceExists(f"device '{self._uuids[uuid].name}' has the uuid '{uuid}'", cure="give another uuid")
        if minor is not None and minor in self._entries:
            raise DeviceExists(f"device '{self._entries[minor].name}' has minor number {minor}", cure="leave it out")
        if minor is not None and not 0 <= minor < MOST_MINORS:
            raise UsageError(
                f"{minor} is not a minor number", cure=f"take one from 0 to {MOST_MINORS - 1}, or leave it out"
            )
        if len(self._entries) >= self._limit:
            raise ResourceError(
                f"there are {len(self._entries)} devices, the most this supervisor takes",
                cure="remove some, or start it with a higher --max-devices",
                errno=errno.ENOSPC,
            )
        return self._free_minor() if minor is None else minor

    def _free_minor(self) -> int:
        while self._next_minor in self._entries:
            self._next_minor += 1
        return self._next_minor

    def add(self, entry: Entry) -> None:
        """Adds a device that `check_new` or a former supervisor has checked."""
        self._entries[entry.minor] = entry
        self._names[entry.name] = entry
        if entry.uuid:
            self._uuids[entry.uuid] = entry
        self._stand(entry, frozenset(), entry.below)

    def remove(self, entry: Entry) -> None:
        """Removes a device."""
        del self._entries[entry.minor]
        del self._names[entry.name]
        if entry.uuid:
            del self._uuids[entry.uuid]
        self._stand(entry, entry.below, frozenset())
        self._next_minor = min(self._next_minor, entry.minor)

    def rename(self, entry: Entry, name: str) -> None:
        """Raises DeviceExists, UsageError."""
        check_new_name(name, what="new name")
        if name in self._names:
            raise DeviceExists(f"a device '{name}' exists", cure="choose another name, or remove that one")
        del self._names[entry.name]
        entry.name = name
        self._names[name] = entry

    def set_uuid(self, entry: Entry, uuid: str) -> None:
        """Sets the uuid of a device; this is possible only once. Raises DeviceExists, UsageError."""
        check_uuid(uuid)
        if entry.uuid:
            raise UsageError(
                f"device '{entry.name}' has the uuid '{entry.uuid}' already", cure="it stays", errno=errno.EINVAL
            )
        if uuid in self._uuids:
            raise DeviceExists(f"device '{self._uuids[uuid].name}' has the uuid '{uuid}'", cure="give another uuid")
        entry.uuid = uuid
        self._uuids[uuid] = entry

    def unset_uuid(self, entry: Entry) -> None:
        """Undoes `set_uuid`."""
        del self._uuids[entry.uuid]
        entry.uuid = ""

    # stacking

    def set_below(
        self, entry: Entry, *, active: frozenset[int] | None = None, inactive: frozenset[int] | None = None
    ) -> None:
        """Sets the devices below each slot; None leaves a slot as it is."""
        before = entry.below
        if active is not None:
            entry.below_active = active
        if inactive is not None:
            entry.below_inactive = inactive
        self._stand(entry, before, entry.below)

    def _stand(self, entry: Entry, before: frozenset[int], after: frozenset[int]) -> None:
        for minor in before - after:
            users = self._users[minor]
            users.discard(entry.minor)
            if not users:
                del self._users[minor]
        for minor in after - before:
            self._users.setdefault(minor, set()).add(entry.minor)
            if (lower := self._entries.get(minor)) and not entry.is_partition:
                lower.opened = True

    def holders(self, entry: Entry) -> list[Entry]:
        """Devices directly above it, by minor number."""
        return [self._entries[minor] for minor in sorted(self._users.get(entry.minor, ()))]

    def whole(self, entry: Entry) -> Entry:
        """The whole device of a partition; any other device itself."""
        lowers = [lower for minor in entry.below if (lower := self._entries.get(minor))]
        return lowers[0] if entry.is_partition and len(lowers) == 1 else entry

    def family(self, whole: Entry) -> list[Entry]:
        """A device and its partitions; the partitions come first."""
        return [*(holder for holder in self.holders(whole) if holder.is_partition), whole]

    def same_data(self, entry: Entry) -> list[Entry]:
        """The other devices with the same data: the partition devices of a disk, or the disk of a partition."""
        whole = self.whole(entry)
        return [whole] if whole is not entry else self.family(entry)[:-1]

    def family_count(self, whole: Entry) -> int:
        """Number of clients of a device and of its partitions, plus the devices above them."""
        family = self.family(whole)
        return sum(map(self.open_count, family)) - (len(family) - 1)

    def lost_clients(self, entry: Entry) -> None:
        """Resets the clients: they have not left, but their worker has ended."""
        entry.connections = 0
        entry.opened = any(not holder.is_partition for holder in self.holders(entry))

    def above(self, entry: Entry) -> list[Entry]:
        """All devices above it, directly or indirectly; each comes before the devices below it."""
        *above, _ = _each_after([entry.minor], lambda minor: self._users.get(minor, ()))
        return [self._entries[minor] for minor in above]

    def all_below(self, entry: Entry) -> list[Entry]:
        """All devices below it, directly or indirectly; each comes after the devices below it."""
        *below, _ = _each_after([entry.minor], self._below_of)
        return [self._entries[minor] for minor in below]

    def _below_of(self, minor: int) -> frozenset[int]:
        return self._entries[minor].below & self._entries.keys()

    def check_stack(self, entry: Entry, below: frozenset[int]) -> None:
        """Raises TableError if `entry` would be stacked on itself."""
        pending, seen = set(below), set[int]()
        while pending:
            minor = pending.pop()
            if minor == entry.minor:
                raise TableError(
                    f"device '{entry.name}' would be stacked on itself", value=entry.name, cure="break the cycle"
                )
            if minor not in seen and (lower := self._entries.get(minor)):
                seen.add(minor)
                pending |= lower.below

    def lower_first(self, minors: set[int]) -> list[Entry]:
        """Sorts devices: each comes after the devices below it."""
        ordered = _each_after(minors, lambda minor: self._entries[minor].below & minors)
        return [self._entries[minor] for minor in ordered]

    # checks

    def open_count(self, entry: Entry) -> int:
        """Number of connected clients plus devices above it."""
        return self.clients(entry) + len(self._users.get(entry.minor, ()))

    def clients(self, entry: Entry) -> int:
        """Number of connected clients, without the kernel that holds a node's file open."""
        held = entry.node is not None and entry.node.holds_open and not entry.node.lazy
        return max(0, entry.connections - held)

    def check_unused(self, entry: Entry, *, forced: bool = False, partitions: bool = True) -> None:
        """Raises DeviceBusy, which names the users. forced: all I/O of the device already fails. partitions: partition
        devices count as users.
        """
        holders = [holder for holder in self.holders(entry) if partitions or not holder.is_partition]
        users = [f"device '{holder.name}' is stacked on it" for holder in holders]
        if clients := self.clients(entry):
            users.append(f"{_count(clients)} {'are' if clients > 1 else 'is'} connected")
        if users:
            raise DeviceBusy(
                f"Device {entry.name} is in use: {', '.join(users)}" + ("; all its I/O fails from now on" * forced),
                cure="end that first, or remove it with --deferred" + (" or --force" * (not forced)),
            )

    def check_no_clients(self) -> None:
        """Raises DeviceBusy, which names the devices whose clients would be disconnected."""
        used = [f"'{entry.name}' ({_count(clients)})" for entry in self if (clients := self.clients(entry))]
        if used:
            raise DeviceBusy(
                f"{'a device is' if len(used) == 1 else f'{len(used)} devices are'} in use: {', '.join(used)}",
                cure="unmount and disconnect first, or cut all clients off with --force",
            )

    def memory(self) -> int:
        """Bytes of all RAM devices, in active and inactive tables."""
        return sum(
            entry.memory_active + entry.memory_inactive + entry.memory_loading for entry in self._entries.values()
        )

    def info(self, entry: Entry) -> DeviceInfo:
        """The public state of a device."""
        stopped = entry.suspended or entry.suspended_for is not None
        return DeviceInfo(
            name=entry.name,
            minor=entry.minor,
            uuid=entry.uuid,
            state="FAILED" if entry.failed else "SUSPENDED" if stopped else "ACTIVE",
            fault=entry.active.fault if entry.active is not None else "",
            reason=entry.failed or entry.group.waiting or entry.waiting,
            read_only=entry.active is not None and entry.active.read_only,
            shared=entry.active is not None and entry.active.shared,
            live=entry.active is not None,
            inactive=entry.inactive is not None,
            open_count=self.open_count(entry),
            connections=self.clients(entry),
            event=entry.event,
            targets=entry.targets,
            types=entry.types,
            size=entry.size,
            block_size=entry.block_size,
            worker=entry.group.pid,
            restarts=entry.restarts,
            deferred=entry.deferred,
            exports=entry.exports,
            node=entry.node,
            node_options=entry.node_options,
            deps=entry.deps,
            holders=[holder.name for holder in self.holders(entry)],
            autoclear=entry.autoclear,
            loop=entry.loop,
            sync_errors=self.sync_errors(entry),
            io_errors=entry.io_errors,
            last_io_error=entry.last_io_error,
        )

    def sync_errors(self, entry: Entry) -> list[str]:
        """The files below its live table that could not be synced, and why."""
        below = _each_after([entry.minor], lambda minor: self._entries[minor].below_active & self._entries.keys())
        found: dict[str, str] = {}
        for lower in (self._entries[minor] for minor in reversed(below)):
            for failed in lower.failed_syncs:
                if lower.active is not None and failed.label.load == lower.active.load:
                    found.setdefault(file_path(failed.label), os.strerror(failed.errno))
        return [f"{path} had failed: {why}" for path, why in found.items()]


def _count(connections: int) -> str:
    return f"{connections} client{'s' if connections > 1 else ''}"


def _each_after(first: Iterable[int], before: Callable[[int], Iterable[int]]) -> list[int]:
    """Topological order: `first` and everything that `before` returns, each once and after its predecessors. Not
    recursive: a stack of devices may be deeper than Python's recursion limit.
    """
    done: dict[int, None] = {}
    entered = set[int]()
    pending = sorted(first, reverse=True)
    while pending:
        minor = pending[-1]
        if minor in entered:
            done.setdefault(pending.pop())
        else:
            entered.add(minor)
            pending += sorted((other for other in before(minor) if other not in entered), reverse=True)
    return list(done)
