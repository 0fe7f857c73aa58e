"""Verbs for a device as a whole: create, rename, message, read.

A verb holds the lock of the group that it changes, asks the worker first, and changes the registry after the worker has
agreed: a verb that fails leaves the registry as it was. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import errno
from typing import Any, Final

from blkloom.control import messages as m
from blkloom.control.descriptor_store import DescriptorStore
from blkloom.control.endpoint import Opener
from blkloom.control.rundir import RunDir
from blkloom.control.states import DeviceInfo
from blkloom.errors import ResourceError, UsageError
from blkloom.supervisor import exporting
from blkloom.supervisor.devices import Devices, check_descriptors
from blkloom.supervisor.layers import is_layer
from blkloom.supervisor.nodes import Nodes
from blkloom.supervisor.registry import Entry, Registry
from blkloom.supervisor.removal import Removal
from blkloom.supervisor.table_verbs import TableVerbs
from blkloom.supervisor.tables import Read, Tables
from blkloom.supervisor.workers import Workers
from blkloom.supervisor.writers import Writers
from blkloom.targets.device_ref import rename_device_refs

READ_SECONDS: Final = 30.0
"""Seconds for storage to answer a `ReadDevice`."""
_CANCEL: Final = "@cancel_deferred_remove"


class DeviceVerbs:
    """Makes and changes the registry's devices."""

    def __init__(
        self,
        run_dir: RunDir,
        registry: Registry,
        store: DescriptorStore,
        workers: Workers,
        tables: Tables,
        devices: Devices,
        table_verbs: TableVerbs,
        nodes: Nodes,
        writers: Writers,
        removal: Removal,
    ) -> None:
        self._run_dir = run_dir
        self._registry = registry
        self._store = store
        self._workers = workers
        self._tables = tables
        self._devices = devices
        self._table_verbs = table_verbs
        self._nodes = nodes
        self._writers = writers
        self._removal = removal

    async def create(self, call: m.Create, opener: Opener) -> DeviceInfo:
        """Makes a device, loads its table and resumes it; after an error, no device is left. opener: opens the files
        for the client.
        """
        check_descriptors()
        if self._removal.stopping:
            raise ResourceError("the supervisor is stopping", cure="start another", errno=errno.ESHUTDOWN)
        minor = self._registry.check_new(call.name, call.uuid, call.minor)
        group = self._workers.new_group()
        entry = Entry(
            call.name,
            minor,
            group,
            uuid=call.uuid,
            making=True,
            autoclear=call.autoclear,
            loop=call.loop,
            node_options=call.node,
        )
        group.minors.add(minor)
        self._registry.add(entry)
        try:
            found = self._tables.read(entry, call.table, call.source) if call.table is not None else None
        except BaseException:
            self._registry.remove(entry)
            del self._workers.groups[group.id]
            raise
        entry.memory_loading = found.memory if found else 0
        lowers = self._table_verbs.lowers(found) if found else []
        async with self._workers.locked(entry, *lowers):
            self._devices.check_there(entry)
            try:
                for lower in lowers:
                    self._devices.check_there(lower)
                await self._make(entry, call, found, opener)
            except BaseException:
                await asyncio.shield(self._removal.drop(entry, fail=True))
                raise
            entry.making = False
            self._devices.save(entry)
        return self._registry.info(entry)

    async def _make(self, entry: Entry, call: m.Create, found: Read | None, opener: Opener) -> None:
        export = exporting.automatic(self._run_dir, entry.name)
        export.read_only = is_layer(entry.uuid)  # of a layer that was saved
        await exporting.open_endpoint(self._store, entry, export, allow_remote=False)
        entry.exports.append(export)
        self._writers.begin(entry, self._table_verbs.lowers(found) if found else [])
        entry.group.targets = found.targets if found else frozenset()
        await self._workers.start(entry.group)
        await self._workers.hold(entry.group, [entry.state()])
        if found is not None:
            loaded = self._table_verbs.new_load(call)
            await self._table_verbs.fill_inactive(entry, loaded, call.source, found, opener)
            if call.suspended:
                entry.suspended = True
            else:
                await self._table_verbs.resume_one(entry, flush=True, timeout=None, opener=opener)

    async def rename(self, call: m.Rename) -> None:
        """Gives a device a new name, also in its automatic export and in the tables above it; or its first uuid."""
        entry = self._devices.live(call.device)
        if bool(call.name) == bool(call.uuid):
            raise UsageError("rename takes either a name or a uuid")
        async with self._devices.held(entry):
            if call.uuid:
                self._registry.set_uuid(entry, call.uuid)
                try:
                    await entry.group.call(m.WorkerRename(minor=entry.minor, name=entry.name, uuid=call.uuid))
                except BaseException:
                    self._registry.unset_uuid(entry)
                    raise
                self._devices.save(entry)
                return
            former = entry.name
            self._set_name(entry, call.name)
            try:
                await entry.group.call(m.WorkerRename(minor=entry.minor, name=call.name))
            except BaseException:
                self._set_name(entry, former)
                raise
            self._devices.save(entry)
            for holder in self._registry.holders(entry):
                self._rename_below(holder, former, call.name)
                self._devices.save(holder)

    def _set_name(self, entry: Entry, name: str) -> None:
        """Also renames the automatic export; other exports keep the name that their clients know."""
        former = entry.name
        self._registry.rename(entry, name)
        try:
            for export in entry.exports:
                if export.automatic:
                    exporting.rename(self._run_dir, entry, export)
            self._nodes.renamed(entry)
        except BaseException:
            self._registry.rename(entry, former)
            raise

    def _rename_below(self, holder: Entry, former: str, name: str) -> None:
        folder = str(self._run_dir.devices)
        for loaded in (holder.active, holder.inactive):
            if loaded is not None:
                loaded.table = rename_device_refs(self._tables.parsed(loaded.table), former, name, device_folder=folder)
        holder.deps = [f"blkloom:{name}" if dep == f"blkloom:{former}" else dep for dep in holder.deps]

    async def message(self, call: m.SendMessage) -> Any:
        """Sends a message to the target at a sector. Words that begin with @ are for the device itself, as they are for
        device-mapper's core.
        """
        if call.text.startswith("@"):
            return await self._message_for_device(call)
        entry = self._devices.live(call.device)
        async with self._devices.held(entry):
            return await entry.group.call(m.WorkerMessage(minor=entry.minor, sector=call.sector, text=call.text))

    async def _message_for_device(self, call: m.SendMessage) -> None:
        entry = self._registry.find(call.device)
        first, *rest = call.text.split()
        if first.lower() != _CANCEL:
            raise UsageError(
                f"'{first}' is no message for a device", cure=f"{_CANCEL} is; others go to targets, without @"
            )
        if rest:
            raise UsageError(f"{_CANCEL} takes no words, and not '{rest[0]}'")
        async with self._devices.held(entry):
            entry.deferred = False
            self._devices.save(entry)

    async def read(self, call: m.ReadDevice) -> Any:
        """Reads from a device."""
        entry = self._devices.live(call.device)
        async with self._devices.held(entry):
            stopped = entry.suspended or entry.suspended_for is not None
            if entry.active is None or stopped:
                raise UsageError(
                    f"device '{entry.name}' {'is suspended' if stopped else 'has no table'}: it cannot be read",
                    cure=f"blkloom resume {entry.name}",
                )
            if not 0 <= call.offset <= call.offset + call.length <= entry.size or not 0 < call.length <= m.MOST_READ:
                raise UsageError(
                    f"{call.length} bytes from {call.offset} on cannot be read from device '{entry.name}'",
                    cure=f"at most {m.MOST_READ} at once, of the {entry.size} there are",
                )
            return await entry.group.call(
                m.WorkerRead(minor=entry.minor, offset=call.offset, length=call.length), wait=READ_SECONDS
            )
