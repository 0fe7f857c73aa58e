"""Verbs for the exports of a device: add, remove; and removal of those that a user has unmounted. Runs on the event
loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from typing import Final

from blkloom.control import messages as m
from blkloom.control.descriptor_store import DescriptorStore
from blkloom.control.rundir import RunDir
from blkloom.control.states import ExportState, export_key
from blkloom.errors import BlkloomError, DeviceBusy, NoSuchDevice, UsageError, WorkerGone, WorkerStuck
from blkloom.supervisor import exporting
from blkloom.supervisor.devices import Devices, check_descriptors
from blkloom.supervisor.registry import Entry, Registry
from blkloom.supervisor.workers import Workers

_log = logging.getLogger(__name__)
_SHORT_SECONDS: Final = 5.0
"""How long to wait for an answer that is not needed."""


class ExportVerbs:
    """Adds and removes exports of the registry's devices."""

    def __init__(
        self,
        run_dir: RunDir,
        registry: Registry,
        store: DescriptorStore,
        workers: Workers,
        devices: Devices,
    ) -> None:
        self._run_dir = run_dir
        self._registry = registry
        self._store = store
        self._workers = workers
        self._devices = devices
        self._dropping: dict[tuple[int | str, ...], asyncio.Task[None]] = {}
        """Running removals, by minor number and ids."""

    async def add(self, call: m.AddExport, *, of_node: bool = False) -> ExportState:
        """Adds an export, and returns its state. of_node: a node needs it; see `ExportState`."""
        check_descriptors()
        entry = self._devices.live(call.device)
        async with self._devices.held(entry):
            if not (call.read_only or call.shared):
                self._check_no_writer(entry)
            export = exporting.wanted(self._run_dir, entry, call)
            export.of_node = of_node
            export.recovery_timeout = self._workers.restarts.recovery
            opened = await exporting.open_endpoint(self._store, entry, export, allow_remote=call.allow_remote)
            try:
                serve = m.Serve(minor=entry.minor, export=export, keys=tuple(opened))
                await entry.group.call(serve, *opened.values())
            except BaseException:
                await exporting.close_endpoint(self._store, entry, export)
                raise
            entry.exports.append(export)
            self._devices.save(entry)
            return export

    def _check_no_writer(self, entry: Entry) -> None:
        for other in [entry, *self._registry.same_data(entry)]:
            if (node := other.node) is not None and node.exclusive:
                what = f"device '{other.name}' is attached at {node.path}: a second writer can destroy its data"
                raise DeviceBusy(what, cure="export it with --read-only, or with --shared if you know better")

    async def remove(self, call: m.RemoveExport) -> None:
        """Removes an export. Disconnects its clients, or raises OSError (EBUSY), depending on the kind of export."""
        entry = self._devices.live(call.device)
        async with self._devices.held(entry):
            found = [export for export in entry.exports if call.id in (export.id, export.address)]
            if not found:
                known = ", ".join(f"{export.id} ({export.address})" for export in entry.exports) or "none"
                raise UsageError(f"device '{entry.name}' has no export '{call.id}'", cure=f"it has: {known}")
            await self.end(entry, found[0], force=call.force)

    async def reload_tls(self, call: m.ReloadTls) -> None:
        """Has the worker read the TLS credentials of a device's exports again. Raises UsageError."""
        entry = self._devices.live(call.device)
        async with self._devices.held(entry):
            await entry.group.call(m.WorkerReloadTls(minor=entry.minor))

    async def restrict(self, entry: Entry, export: ExportState, *, read_only: bool) -> None:
        """Serves an export again, for reading only or not. It has no clients. The caller holds the lock."""
        export.read_only = read_only
        kept = exporting.labels(self._store, entry, export)
        descriptors = [descriptor for label in kept if (descriptor := self._store.find(label)) is not None]
        if entry.failed or not kept:  # it is served as its state says when the device is started again
            return
        keys = tuple(export_key(label)[1] for label in kept)
        serve = m.Serve(minor=entry.minor, export=export, keys=keys, again=True)
        if read_only:
            await entry.group.call(serve, *descriptors)
        else:  # a worker that answers late does it late
            await self._call_shortly(entry, serve, *descriptors)

    def gone(self, minor: int, ids: Sequence[str]) -> None:
        """Removes exports that were unmounted, as their worker reports, when the lock of the device is free."""
        if (minor, *ids) not in self._dropping:
            task = asyncio.create_task(self._drop_gone(minor, ids), name=f"exports of {minor}")
            self._dropping[minor, *ids] = task
            task.add_done_callback(lambda _done: self._dropping.pop((minor, *ids)))

    async def _drop_gone(self, minor: int, ids: Sequence[str]) -> None:
        await self._workers.complete.wait()
        entry = self._registry.get(minor)
        if entry is None:
            return
        try:
            async with self._devices.held(entry):
                for export in [export for export in entry.exports if export.id in ids]:
                    if await exporting.is_gone(export):  # not another export of that id, made since
                        _log.warning("device '%s': %s was unmounted, its export ends", entry.name, export.address)
                        await self.end(entry, export, force=True)
                        self._workers.changed(entry)  # it may have served the node of the device
        except (NoSuchDevice, WorkerGone):
            pass  # its exports have gone, too
        except (BlkloomError, OSError) as error:
            _log.error("device '%s': what an unmounted export left cannot be removed: %s", entry.name, error)

    async def end(self, entry: Entry, export: ExportState, *, force: bool) -> None:
        """Ends an export; the caller holds the lock. Raises OSError: EBUSY if it is in use, unless `force`."""
        unserve = m.Unserve(minor=entry.minor, id=export.id)
        if exporting.may_be_busy(export):
            await exporting.close_unused(export, force=force)
            try:
                if entry.group.link is not None and not entry.failed:
                    await self._unserve(entry, unserve, force=force)
            finally:
                await self._forget(entry, export)
        else:
            await entry.group.call(unserve)
            await self._forget(entry, export)

    async def _unserve(self, entry: Entry, call: m.Unserve, *, force: bool) -> None:
        """Has the worker end an export that was closed. With `force`, does not need its answer: requests have failed
        already, or fail when the worker ends.
        """
        if not force:
            await entry.group.call(call)
            return
        if not await self._call_shortly(entry, call) and os.geteuid() != 0:
            entry.group.kill()  # only root can have the requests of a connection fail that a process has open

    async def _call_shortly(self, entry: Entry, call: m.WorkerCall, *descriptors: int) -> bool:
        """Calls the worker, and does not wait long for its answer. Returns False if there was none. A worker that is
        stopped executes the call when it goes on; where there is none, the next one begins from the state.
        """
        try:
            await entry.group.call(call, *descriptors, answer=_SHORT_SECONDS, late=True)
        except WorkerStuck as error:
            _log.warning("device '%s': %s", entry.name, error.what)
            return False
        except WorkerGone:
            _log.info("device '%s' has no worker now", entry.name)
        return True

    async def _forget(self, entry: Entry, export: ExportState) -> None:
        await exporting.close_endpoint(self._store, entry, export)
        entry.exports.remove(export)
        self._devices.save(entry)
