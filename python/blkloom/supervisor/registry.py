"""Which devices there are, what they are called, and which stands on which.

Pure: no I/O, no event loop; one thread. The rules here are the registry's only: names, uuids and minor
numbers are unique, nothing stands on itself, and who stands on a device keeps it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

import msgspec

from blkloom.control.messages import DeviceKey
from blkloom.control.states import DeviceInfo, DeviceState, ExportState, FailedSync, Loaded, LoopNotes
from blkloom.dm.names import check_new_name, check_uuid
from blkloom.errors import DeviceBusy, DeviceExists, NoSuchDevice, ResourceError, TableError, UsageError

if TYPE_CHECKING:
    from blkloom.supervisor.group import Group

MOST_MINORS: Final = 1 << 20
"""Numbers there are for devices, as in the kernel (MINORBITS)."""


class Entry(msgspec.Struct):
    """A device. below: minors it stands on, by slot. suspended: as its own verbs left it; suspended_for:
    the lower device that was suspended and took this one along.
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
    size: int = 0
    targets: int = 0
    types: list[str] = msgspec.field(default_factory=list)
    deps: list[str] = msgspec.field(default_factory=list)
    inactive_deps: list[str] = msgspec.field(default_factory=list)
    below_active: frozenset[int] = frozenset()
    below_inactive: frozenset[int] = frozenset()
    memory_active: int = 0
    memory_inactive: int = 0
    memory_loading: int = 0
    """Of a table on its way into the inactive slot."""
    failed: str = ""
    restarts: int = 0
    deferred: bool = False
    making: bool = False
    autoclear: bool = False
    opened: bool = False
    """It has had a client, or a device on it that is not its partition."""
    loop: LoopNotes | None = None
    failed_syncs: list[FailedSync] = msgspec.field(default_factory=list)
    io_errors: int = 0
    last_io_error: str = ""

    @property
    def below(self) -> frozenset[int]:
        """What either of its tables stands on."""
        return self.below_active | self.below_inactive

    @property
    def is_partition(self) -> bool:
        """Whether it is a partition of the one device it stands on."""
        return self.loop is not None and self.loop.partition > 0

    @property
    def loads(self) -> frozenset[int]:
        """Numbers of the loads in its slots."""
        return frozenset(loaded.load for loaded in (self.active, self.inactive) if loaded is not None)

    def state(self) -> DeviceState:
        """What a worker is given to bring it up."""
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
        """By minor number."""
        return iter([self._entries[minor] for minor in sorted(self._entries)])

    def get(self, minor: int) -> Entry | None:
        """The device of that number."""
        return self._entries.get(minor)

    def named(self, name: str) -> Entry | None:
        """The device of that name."""
        return self._names.get(name)

    def find(self, device: DeviceKey) -> Entry:
        """The one that is meant. Raises NoSuchDevice, UsageError."""
        if isinstance(device, str):
            entry = self._names.get(device)
        elif bool(device.uuid) == (device.minor is not None):
            raise UsageError("a selector has either a uuid or a minor number", cure="give one of both")
        else:
            entry = self._uuids.get(device.uuid) if device.minor is None else self._entries.get(device.minor)
        if entry is None:
            raise NoSuchDevice(f"Device {device} not found", cure="`blkloom ls` lists those there are")
        return entry

    def new_load(self) -> int:
        """A number no load has had."""
        self._next_load += 1
        return self._next_load - 1

    def seen_load(self, load: int) -> None:
        """A load of a former supervisor's: later ones are higher."""
        self._next_load = max(self._next_load, load + 1)

    def check_new(self, name: str, uuid: str, minor: int | None) -> int:
        """The minor number a new device gets. Raises DeviceExists, ResourceError, UsageError."""
        check_new_name(name)
        check_uuid(uuid)
        if name in self._names:
            raise DeviceExists(f"a device {name!r} exists", cure="choose another name, or remove that one")
        if uuid and uuid in self._uuids:
            raise DeviceExists(f"device {self._uuids[uuid].name!r} has the uuid {uuid!r}", cure="uuids are unique")
        if minor is not None and minor in self._entries:
            raise DeviceExists(f"device {self._entries[minor].name!r} has minor number {minor}", cure="leave it out")
        if minor is not None and not 0 <= minor < MOST_MINORS:
            raise UsageError(
                f"{minor} is no minor number", cure=f"take one from 0 to {MOST_MINORS - 1}, or leave it out"
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
        """Registers it; `check_new` or a former supervisor has let it in."""
        self._entries[entry.minor] = entry
        self._names[entry.name] = entry
        if entry.uuid:
            self._uuids[entry.uuid] = entry
        self._stand(entry, frozenset(), entry.below)

    def remove(self, entry: Entry) -> None:
        """Forgets it."""
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
            raise DeviceExists(f"a device {name!r} exists", cure="choose another name, or remove that one")
        del self._names[entry.name]
        entry.name = name
        self._names[name] = entry

    def set_uuid(self, entry: Entry, uuid: str) -> None:
        """A device gets a uuid once. Raises DeviceExists, UsageError."""
        check_uuid(uuid)
        if entry.uuid:
            raise UsageError(
                f"device {entry.name!r} has the uuid {entry.uuid!r} already", cure="it stays", errno=errno.EINVAL
            )
        if uuid in self._uuids:
            raise DeviceExists(f"device {self._uuids[uuid].name!r} has the uuid {uuid!r}", cure="uuids are unique")
        entry.uuid = uuid
        self._uuids[uuid] = entry

    def unset_uuid(self, entry: Entry) -> None:
        """`set_uuid` undone."""
        del self._uuids[entry.uuid]
        entry.uuid = ""

    # who stands on whom

    def set_below(
        self, entry: Entry, *, active: frozenset[int] | None = None, inactive: frozenset[int] | None = None
    ) -> None:
        """What the slots stand on from now on; None leaves one as it is."""
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
        """Devices that stand on it directly, by minor number."""
        return [self._entries[minor] for minor in sorted(self._users.get(entry.minor, ()))]

    def whole(self, entry: Entry) -> Entry:
        """The device that `entry` is a partition of; else itself."""
        lowers = [lower for minor in entry.below if (lower := self._entries.get(minor))]
        return lowers[0] if entry.is_partition and len(lowers) == 1 else entry

    def family(self, whole: Entry) -> list[Entry]:
        """A device and its partitions, these first."""
        return [*(holder for holder in self.holders(whole) if holder.is_partition), whole]

    def family_count(self, whole: Entry) -> int:
        """Clients of a device and of its partitions, and devices that stand on them."""
        family = self.family(whole)
        return sum(map(self.open_count, family)) - (len(family) - 1)

    def lost_clients(self, entry: Entry) -> None:
        """They did not leave: its worker ended under them."""
        entry.connections = 0
        entry.opened = any(not holder.is_partition for holder in self.holders(entry))

    def above(self, entry: Entry) -> list[Entry]:
        """All that stand on it, directly or not; every one before those below it."""
        *above, _ = _each_after([entry.minor], lambda minor: self._users.get(minor, ()))
        return [self._entries[minor] for minor in above]

    def check_stack(self, entry: Entry, below: frozenset[int]) -> None:
        """Raises TableError if `entry` would come to stand on itself."""
        pending, seen = set(below), set[int]()
        while pending:
            minor = pending.pop()
            if minor == entry.minor:
                raise TableError(
                    f"device {entry.name!r} would stand on itself", value=entry.name, cure="break the cycle"
                )
            if minor not in seen and (lower := self._entries.get(minor)):
                seen.add(minor)
                pending |= lower.below
        return

    def lower_first(self, minors: set[int]) -> list[Entry]:
        """Those devices, each after what it stands on."""
        ordered = _each_after(minors, lambda minor: self._entries[minor].below & minors)
        return [self._entries[minor] for minor in ordered]

    # what may be done

    def open_count(self, entry: Entry) -> int:
        """Clients connected, and devices standing on it."""
        return entry.connections + len(self._users.get(entry.minor, ()))

    def check_unused(self, entry: Entry, *, forced: bool = False) -> None:
        """Raises DeviceBusy, which says who. forced: all I/O of the device has been made to fail."""
        users = [f"device {holder.name!r} stands on it" for holder in self.holders(entry)]
        if entry.connections:
            users.append(f"{_count(entry.connections)} {'are' if entry.connections > 1 else 'is'} connected")
        if users:
            raise DeviceBusy(
                f"Device {entry.name} is in use: {', '.join(users)}" + ("; all its I/O fails from now on" * forced),
                cure="end that first, or remove it with --deferred" + (" or --force" * (not forced)),
            )

    def check_no_clients(self) -> None:
        """Raises DeviceBusy, which says whose clients would lose their devices."""
        used = [f"{entry.name!r} ({_count(entry.connections)})" for entry in self if entry.connections]
        if used:
            raise DeviceBusy(
                f"{'a device is' if len(used) == 1 else f'{len(used)} devices are'} in use: {', '.join(used)}",
                cure="unmount and disconnect first, or cut all clients off with --force",
            )

    def memory(self) -> int:
        """Bytes of all RAM devices, loaded or not."""
        return sum(
            entry.memory_active + entry.memory_inactive + entry.memory_loading for entry in self._entries.values()
        )

    def info(self, entry: Entry) -> DeviceInfo:
        """What is told of it."""
        stopped = entry.suspended or entry.suspended_for is not None
        return DeviceInfo(
            name=entry.name,
            minor=entry.minor,
            uuid=entry.uuid,
            state="FAILED" if entry.failed else "SUSPENDED" if stopped else "ACTIVE",
            reason=entry.failed or entry.group.waiting,
            read_only=entry.active is not None and entry.active.read_only,
            live=entry.active is not None,
            inactive=entry.inactive is not None,
            open_count=self.open_count(entry),
            connections=entry.connections,
            event=entry.event,
            targets=entry.targets,
            types=entry.types,
            size=entry.size,
            worker=entry.group.pid,
            restarts=entry.restarts,
            deferred=entry.deferred,
            exports=entry.exports,
            deps=entry.deps,
            holders=[holder.name for holder in self.holders(entry)],
            autoclear=entry.autoclear,
            loop=entry.loop,
            sync_errors=self.sync_errors(entry),
            io_errors=entry.io_errors,
            last_io_error=entry.last_io_error,
        )

    def sync_errors(self, entry: Entry) -> list[str]:
        """Which files could not be synced that its live table stands on, and why."""
        below = _each_after([entry.minor], lambda minor: self._entries[minor].below_active & self._entries.keys())
        found: dict[str, str] = {}
        for lower in (self._entries[minor] for minor in reversed(below)):
            for failed in lower.failed_syncs:
                if lower.active is not None and failed.label.load == lower.active.load:
                    found.setdefault(failed.label.key[2:], os.strerror(failed.errno))
        return [f"{path} had failed: {why}" for path, why in found.items()]


def _count(connections: int) -> str:
    return f"{connections} client{'s' if connections > 1 else ''}"


def _each_after(first: Iterable[int], before: Callable[[int], Iterable[int]]) -> list[int]:
    """`first` and all that comes `before` them, each once and after what comes before it. Not recursive:
    a stack may be higher than Python's.
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
