"""Snapshots of live devices: `TakeSnapshot`, `DeleteSnapshot`, `MergeSnapshot`, `FinishMerge`, `ListSnapshots`.

The table of the device moves to a layer below it (`layers`), which is the origin. The device gets a `snapshot-origin`
table over it, and each snapshot is a device with a `snapshot` table over it and an exception store: a file, or a `ram`
device that is removed with the snapshot. When the last snapshot has gone, the table moves back. Runs on the event loop.
"""

from __future__ import annotations

import logging
from typing import Final

from blkloom.control import messages as m
from blkloom.control.endpoint import Opener
from blkloom.control.states import DeviceInfo
from blkloom.errors import BlkloomError, DeviceBusy, UsageError
from blkloom.supervisor.device_verbs import DeviceVerbs
from blkloom.supervisor.devices import Devices
from blkloom.supervisor.layers import Layers, whole_table
from blkloom.supervisor.nodes import Nodes
from blkloom.supervisor.queries import Queries
from blkloom.supervisor.registry import Entry, Registry
from blkloom.supervisor.removal import Removal
from blkloom.supervisor.table_verbs import TableVerbs
from blkloom.supervisor.tables import Tables
from blkloom.targets.exception_store import PersistentStore
from blkloom.targets.snapshot_spec import DEFAULT_CHUNK, SnapshotSpec
from blkloom.units import SECTOR, Bytes, Sectors, to_bytes

_log = logging.getLogger(__name__)
_KIND: Final = "snapshot"
_SNAPSHOT, _ORIGIN, _MERGE = "snapshot", "snapshot-origin", "snapshot-merge"


class Snapshots:
    """Takes, deletes and merges the snapshots of the registry's devices."""

    def __init__(
        self,
        registry: Registry,
        devices: Devices,
        tables: Tables,
        table_verbs: TableVerbs,
        device_verbs: DeviceVerbs,
        removal: Removal,
        nodes: Nodes,
        queries: Queries,
        layers: Layers,
    ) -> None:
        self._registry = registry
        self._devices = devices
        self._tables = tables
        self._table_verbs = table_verbs
        self._device_verbs = device_verbs
        self._removal = removal
        self._nodes = nodes
        self._queries = queries
        self._layers = layers

    async def take(self, call: m.TakeSnapshot, opener: Opener) -> DeviceInfo:
        """Makes a snapshot of a live device. File systems that are mounted from its node are frozen for the instant. If
        it fails, nothing has changed. Raises UsageError, TableError, ResourceError.
        """
        entry = self._devices.live(call.device)
        self._check_origin(entry)
        self._registry.check_new(call.name, "", None)
        lower = self._lower_of(entry)
        if added := lower is None:
            lower = await self._layers.add(entry, _KIND)
        made: list[m.Selector] = []
        try:
            store = call.store or await self._make_memory(entry, call, opener, made)
            line = _table(entry, _SNAPSHOT, f"blkloom:{lower.name}", store, "P", str(call.chunk))
            create = m.Create(name=call.name, table=line, source=_KIND, suspended=True)
            made.append(m.Selector(minor=(await self._device_verbs.create(create, opener)).minor))
            if entry.types != [_ORIGIN]:
                await self._layers.load(entry, lower, _table(entry, _ORIGIN, f"blkloom:{lower.name}"), opener)
            key = entry.key
            await self._table_verbs.suspend(m.Suspend(device=key, timeout=call.timeout, lock_fs=call.lock_fs))
            try:
                await self._table_verbs.resume(m.Resume(device=made[-1]), opener)
            finally:
                await self._table_verbs.resume(m.Resume(device=key), opener)
        except BaseException:
            for device in reversed(made):
                await self._try_remove(device)
            if added:
                await self._layers.end(entry, lower, opener)
            raise
        return self._registry.info(self._registry.find(made[-1]))

    def _check_origin(self, entry: Entry) -> None:
        if entry.is_partition:
            raise UsageError(f"device '{entry.name}' is a partition", cure="take a snapshot of its disk")
        if entry.active is not None and entry.active.fault:
            cure = f"blkloom fault {entry.name} off, and give it the fault again afterwards"
            raise UsageError(f"device '{entry.name}' has the fault '{entry.active.fault}'", cure=cure)
        if entry.types == [_MERGE]:
            cure = f"wait for it: blkloom snapshot {entry.name} --merge"
            raise UsageError(f"a snapshot is being merged into device '{entry.name}'", cure=cure)

    async def _make_memory(self, entry: Entry, call: m.TakeSnapshot, opener: Opener, made: list[m.Selector]) -> str:
        """Makes a RAM device for a store, which is removed with the snapshot. Returns what a table calls it."""
        chunk = to_bytes(Sectors(call.chunk) or DEFAULT_CHUNK)
        size = Bytes(call.size) or PersistentStore.whole_size(Bytes(entry.size), chunk)
        name = f"{call.name}-cow"
        create = m.Create(name=name, table=f"0 {-(-size // SECTOR)} ram", source=_KIND, autoclear=True)
        made.append(m.Selector(minor=(await self._device_verbs.create(create, opener)).minor))
        return f"blkloom:{name}"

    # delete

    async def delete(self, call: m.DeleteSnapshot, opener: Opener) -> None:
        """Removes a snapshot, or all snapshots of a device, with stores in memory. Raises UsageError, DeviceBusy."""
        if (lower := self._lower_of(origin := self._devices.live(call.device))) is not None:
            snapshots = self._snapshots_of(lower)
        else:
            snapshot, lower, origin = self._found(call.device)
            snapshots = [snapshot]
        for snapshot in snapshots:
            await self._removal.remove(m.Remove(device=snapshot.key, retry=True))
        if not self._snapshots_of(lower) and origin.types == [_ORIGIN]:
            await self._layers.end(origin, lower, opener)

    async def _try_remove(self, device: m.Selector) -> None:
        """After an error: a device that cannot be removed stays, and the log says so."""
        if self._registry.get(device.minor if device.minor is not None else -1) is None:
            return  # autoclear was faster
        try:
            await self._removal.remove(m.Remove(device=device, force=True))
        except (BlkloomError, OSError) as error:
            _log.error("a part of a snapshot that failed could not be removed: %s", error)

    # merge

    async def merge(self, call: m.MergeSnapshot, opener: Opener) -> str:
        """Removes a snapshot and begins to merge what it contained into its origin, which shows that at once. Returns
        the name of the origin. Raises UsageError, DeviceBusy.
        """
        snapshot, lower, origin = self._found(call.device)
        self._check_origin(origin)
        await self._check_unused(origin)
        assert snapshot.active is not None
        spec = self._tables.parsed(snapshot.active.table).segments[0].target
        assert isinstance(spec, SnapshotSpec), "its type says so"
        line = _table(origin, _MERGE, f"blkloom:{lower.name}", spec.cow.path, spec.kind, str(spec.chunk))
        if "/" not in (status := await self._status(snapshot)):
            what = f"snapshot '{snapshot.name}' is {status}: it has not kept all that has changed"
            raise UsageError(what, cure=f"blkloom snapshot {origin.name} {snapshot.name} --delete")
        memory = [found for minor in snapshot.below_active - {lower.minor} if (found := self._registry.get(minor))]
        for store in memory:
            store.autoclear = False  # until the merge uses it
        try:
            await self._removal.remove(m.Remove(device=snapshot.key, retry=True))
            await self._layers.load(origin, lower, line, opener)
            await self._table_verbs.resume(m.Resume(device=origin.key), opener)
        finally:
            for store in memory:
                store.autoclear = True
                self._devices.save(store)
        return origin.name

    async def finish(self, call: m.FinishMerge, opener: Opener) -> bool:
        """Gives a device its former table again if the merge into it is complete; returns whether it is. Raises
        UsageError if it has failed, or none runs.
        """
        origin = self._devices.live(call.device)
        lower = self._lower_of(origin)
        if lower is None or origin.types != [_MERGE]:
            cure = f"blkloom snapshot {origin.name} --list prints the snapshots"
            raise UsageError(f"no snapshot is being merged into device '{origin.name}'", cure=cure)
        used, _, metadata = (status := await self._status(origin)).replace("/", " ").partition(" ")
        if not used.isdigit():
            cure = f"`blkloom files {origin.name}` names the store; the log of the supervisor may say more"
            raise UsageError(f"the merge into device '{origin.name}' has failed: {status}", cure=cure)
        if used != metadata.split()[-1]:
            return False
        if self._snapshots_of(lower):
            await self._layers.load(origin, lower, _table(origin, _ORIGIN, f"blkloom:{lower.name}"), opener)
            await self._table_verbs.resume(m.Resume(device=origin.key), opener)
        else:
            await self._layers.end(origin, lower, opener)
        return True

    async def _check_unused(self, origin: Entry) -> None:
        """What uses the origin would not notice that its contents have changed."""
        users = await self._nodes.users(origin)
        if clients := self._registry.clients(origin):
            users.append(f"{clients} clients")
        users += [f"device '{holder.name}'" for holder in self._registry.holders(origin)]
        if users:
            what = f"device '{origin.name}' is in use: {', '.join(users)}"
            raise DeviceBusy(what, cure="unmount or disconnect: what it contains is about to change")

    # shared

    def listed(self, call: m.ListSnapshots) -> list[m.SnapshotInfo]:
        """The snapshots of a device; of all devices if it is ""."""
        origins = list(self._registry) if call.device == "" else [self._registry.find(call.device)]
        found = []
        for origin in origins:
            if (lower := self._lower_of(origin)) is not None:
                for snapshot in self._snapshots_of(lower):
                    assert snapshot.active is not None
                    spec = self._tables.parsed(snapshot.active.table).segments[0].target
                    assert isinstance(spec, SnapshotSpec), "its type says so"
                    found.append(m.SnapshotInfo(snapshot.name, origin.name, spec.cow.path))
        return found

    def _lower_of(self, origin: Entry) -> Entry | None:
        """The lower device of a device with snapshots; None for any other device, also for a snapshot."""
        return self._layers.below(origin, _KIND) if origin.types in ([_ORIGIN], [_MERGE]) else None

    def _snapshots_of(self, lower: Entry) -> list[Entry]:
        return [holder for holder in self._registry.holders(lower) if holder.types == [_SNAPSHOT]]

    def _found(self, device: m.DeviceKey) -> tuple[Entry, Entry, Entry]:
        """A snapshot, its origin's lower device, its origin. Raises UsageError for another device."""
        snapshot = self._devices.live(device)
        if snapshot.types == [_SNAPSHOT] and (lower := self._layers.below(snapshot, _KIND)) is not None:
            for holder in self._registry.holders(lower):
                if self._lower_of(holder) is lower:
                    return snapshot, lower, holder
        cure = "blkloom snapshot --list prints those that there are; blkloom remove removes other devices"
        raise UsageError(f"device '{snapshot.name}' is no snapshot", cure=cure)

    async def _status(self, entry: Entry) -> str:
        """The status of its only target."""
        ((_, _, _, status),) = await self._queries.status(m.GetStatus(device=entry.key))
        return str(status)


def _table(entry: Entry, *words: str) -> str:
    return whole_table(entry, words)
