"""Removal of devices: by a verb, after their last user has left, and when the supervisor stops.

Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Final

import msgspec

from blkloom.control import messages as m
from blkloom.control.descriptor_store import DescriptorStore
from blkloom.control.rundir import RunDir
from blkloom.errors import DeviceBusy, LostData, NoSuchDevice, WorkerGone
from blkloom.printing import described
from blkloom.supervisor import exporting, states
from blkloom.supervisor.auto_remove import AutoRemove
from blkloom.supervisor.change_notifier import ChangeNotifier
from blkloom.supervisor.devices import Devices
from blkloom.supervisor.export_verbs import ExportVerbs
from blkloom.supervisor.group import LEAVE_SECONDS, Group
from blkloom.supervisor.nodes import Nodes
from blkloom.supervisor.registry import Entry, Registry
from blkloom.supervisor.table_verbs import FORCE_SECONDS, TableVerbs
from blkloom.supervisor.workers import Workers

_log = logging.getLogger(__name__)

RETRY_SECONDS: Final = 5.0
"""Seconds for which `remove --retry` tries. dmsetup: 25 tries, 200 ms apart."""
_LOOK_SECONDS: Final = 0.2
"""Seconds between two looks of `remove --retry` at the users of a node: there is no event when they leave."""
_STOP_AT_ONCE: Final = 64
"""Stacks of devices that are removed at the same time when the supervisor stops."""


class Removal:
    """Removes the registry's devices. gone: called when a device has been removed."""

    def __init__(
        self,
        run_dir: RunDir,
        registry: Registry,
        store: DescriptorStore,
        workers: Workers,
        devices: Devices,
        table_verbs: TableVerbs,
        export_verbs: ExportVerbs,
        nodes: Nodes,
        changes: ChangeNotifier,
        *,
        gone: Callable[[], None],
    ) -> None:
        self._run_dir = run_dir
        self._registry = registry
        self._store = store
        self._workers = workers
        self._devices = devices
        self._table_verbs = table_verbs
        self._export_verbs = export_verbs
        self._nodes = nodes
        self._changes = changes
        self._gone = gone
        self._auto_remove = AutoRemove(registry, workers, self.drop)
        self.stopping = False
        """All devices are removed: no new one is made."""

    async def remove(self, call: m.Remove) -> None:
        """Removes a device that is not in use, and its partition devices. Also waits for the removal of devices below
        it that is due then; its errors are only logged. Raises DeviceBusy.
        """
        entry = self._registry.find(call.device)
        below = self._registry.all_below(entry)
        await self._remove_one(entry, call)
        await self._auto_remove.settled(below, timeout=FORCE_SECONDS if call.force else LEAVE_SECONDS)

    async def _remove_one(self, entry: Entry, call: m.Remove) -> None:
        partitions = self._registry.family(entry)[:-1]
        if partitions and not (call.force or call.deferred or call.retry):
            await self._check_family(entry, partitions)
        for partition in reversed(partitions):
            with contextlib.suppress(NoSuchDevice):
                key = m.Selector(minor=partition.minor)
                await self.remove(msgspec.structs.replace(call, device=key))
        if partitions and self._registry.get(entry.minor) is not entry:
            return  # it was removed after its last partition
        if not call.force:  # with `force`, all I/O has to fail first
            try:
                await self._nodes.leave(entry, lazy=call.deferred)
            except DeviceBusy:
                if not call.retry:
                    raise
        async with self._devices.held(entry):
            if call.force and not entry.failed and entry.active is not None:
                await self._table_verbs.fail_all_io(entry)
            try:
                self._registry.check_unused(entry, forced=call.force)
            except DeviceBusy:
                if call.deferred:
                    entry.deferred = True
                    self._devices.save(entry)
                    return
                if not call.retry:
                    raise
            else:
                try:
                    await self.drop(entry, fail=call.force)
                except DeviceBusy:
                    if not call.retry:
                        raise
                else:
                    return
        await self._remove_later(entry, forced=call.force)

    async def _check_family(self, entry: Entry, partitions: list[Entry]) -> None:
        """Raises DeviceBusy if a disk or one of its partition devices is in use: all or none of them are removed."""
        for partition in partitions:
            self._registry.check_unused(partition)
        self._registry.check_unused(entry, partitions=False)
        for device in [*partitions, entry]:
            if users := await self._nodes.users(device):
                raise DeviceBusy(f"Device {device.name} is in use: {', '.join(users)}", cure="end that first")

    async def _remove_later(self, entry: Entry, *, forced: bool) -> None:
        """Removes a device as soon as it has no users, within RETRY_SECONDS. Raises DeviceBusy."""
        deadline = time.monotonic() + RETRY_SECONDS
        while True:
            change = self._changes.next(entry)
            async with self._workers.locked(entry):
                if self._registry.get(entry.minor) is not entry:
                    return
                try:
                    self._registry.check_unused(entry, forced=forced)
                    await self.drop(entry, fail=False)
                except DeviceBusy:
                    if time.monotonic() >= deadline:
                        raise
                else:
                    return
            left = max(0.0, deadline - time.monotonic())
            await asyncio.wait([change], timeout=min(left, _LOOK_SECONDS) if entry.node else left)

    async def drop(self, entry: Entry, *, fail: bool, cut: bool = False) -> None:
        """Removes a device; the caller holds the lock of its group. Raises the error of its last flush, and LostData;
        the device is removed all the same. fail: do not wait for requests in flight. cut: also closes exports that are
        in use; without it their error is raised, and the device stays. Raises WorkerStuck, unless `fail` or `cut`, if
        the worker is stopped; the device stays.
        """
        group = entry.group
        if not (fail or cut or entry.failed):
            await group.check_running()
        await self._nodes.drop(entry, force=cut)
        for export in [export for export in entry.exports if exporting.may_be_busy(export)]:
            await self._export_verbs.end(entry, export, force=fail or cut)
        unwritten: BaseException | None = None
        try:
            if group.link is not None and not entry.failed:
                await group.call(m.Release(minor=entry.minor, fail=fail), wait=None if fail else LEAVE_SECONDS)
            elif not fail:
                unwritten = self._lost(entry)
        except WorkerGone:
            unwritten = None if fail else self._lost(entry)
        except BaseException as error:
            if not fail:
                _log.error("device '%s' was removed, but not all of it was written", entry.name)
                unwritten = error
        await self._forget(entry, group)
        if not group.minors:
            await self._workers.end(group, flush=not fail and unwritten is None)
        if unwritten is not None:
            raise unwritten

    def _lost(self, entry: Entry) -> LostData | None:
        """The error with which a device without a worker is removed, if syncs of its files had failed."""
        if not (errors := self._registry.sync_errors(entry)):
            return None
        texts = "; ".join(f"a sync of {error}" for error in errors)
        return LostData(f"data written to device '{entry.name}' may be lost: {texts}", cure="check what is there")

    async def _forget(self, entry: Entry, group: Group) -> None:
        for export in entry.exports:
            await exporting.close_endpoint(self._store, entry, export)
        self._store.drop(self._store.labels(entry.minor))
        self._registry.remove(entry)
        group.minors.discard(entry.minor)
        states.remove(self._run_dir, entry.minor)
        self._changes.changed(entry)
        self._gone()
        for lower in entry.below:
            if found := self._registry.get(lower):
                self.look_at(found)

    def look_at(self, entry: Entry) -> None:
        """Wakes waiting tasks after a change, and starts a removal that is due."""
        self._changes.changed(entry)
        if not self.stopping:
            self._nodes.look_at(entry)
            self._auto_remove.look_at(entry)

    async def retain(self, call: m.Retain) -> None:
        """Cancels autoclear and deferred removal."""
        entry = self._registry.find(call.device)
        async with self._devices.held(entry):
            entry.autoclear = entry.deferred = False
            self._devices.save(entry)

    async def remove_all(self, call: m.RemoveAll) -> list[tuple[str, str]]:
        """Removes all devices, upper ones first. Returns what could not be removed, and why."""
        left = []
        for entry in reversed(self._registry.lower_first({entry.minor for entry in self._registry})):
            try:
                await self.remove(m.Remove(device=entry.key, force=call.force, deferred=call.deferred))
            except NoSuchDevice:
                continue  # a deferred removal was due
            except (OSError, ValueError) as error:
                left.append((entry.name, described(error)))
        return left

    async def stop(self) -> list[str]:
        """Flushes and removes all devices, even those in use. Returns the errors."""
        self.stopping = self._workers.ending = True
        for group in self._workers.groups.values():
            group.go_on()  # to flush, as systemd does after SIGTERM
        await self._nodes.stop_settling()
        errors: list[str] = []
        stacks: dict[str, list[Entry]] = {}
        for entry in reversed(self._registry.lower_first({entry.minor for entry in self._registry})):
            stacks.setdefault(entry.group.id, []).append(entry)
        at_once = asyncio.Semaphore(_STOP_AT_ONCE)

        async def end(stack: list[Entry]) -> None:
            async with at_once:
                if len(stack) > 1:
                    await self._disconnect(stack)
                for entry in stack:
                    try:
                        async with self._workers.locked(entry):
                            if self._registry.get(entry.minor) is entry:
                                await self.drop(entry, fail=False, cut=True)
                    except (OSError, ValueError) as error:
                        errors.append(f"device '{entry.name}': {described(error)}")

        await asyncio.gather(*map(end, stacks.values()))
        return errors

    async def _disconnect(self, stack: list[Entry]) -> None:
        """Disconnects the clients of all these devices at the same time, so that slow clients do not delay each other.
        FUSE files are ended by `drop`, which unmounts them first.
        """
        async with self._workers.locked(*stack):
            calls = [
                entry.group.call(m.Unserve(minor=entry.minor, id=export.id))
                for entry in stack
                if entry.group.link is not None and not entry.failed
                for export in entry.exports
                if not exporting.may_be_busy(export)
            ]
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                if isinstance(outcome, Exception):
                    _log.error("clients could not be disconnected before their device ends: %s", outcome)
