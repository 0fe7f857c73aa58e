"""Verbs for the tables of a device: load, clear, suspend, resume.

A verb holds the lock of the group that it changes, asks the worker first, and changes the registry after the worker has
agreed: a verb that fails leaves the registry as it was. Runs on the event loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Final

import msgspec

from blkloom.control import messages as m
from blkloom.control.descriptor_store import DescriptorStore
from blkloom.control.endpoint import Opener
from blkloom.control.replies import Description, Resumed, TableLoaded
from blkloom.control.states import Loaded
from blkloom.errors import BlkloomError, DeviceFailed, WorkerStuck
from blkloom.printing import described
from blkloom.supervisor import exporting
from blkloom.supervisor.change_notifier import ChangeNotifier
from blkloom.supervisor.devices import Devices
from blkloom.supervisor.handover import HandOver
from blkloom.supervisor.nodes import Nodes
from blkloom.supervisor.own_nodes import check_files
from blkloom.supervisor.registry import Entry, Registry
from blkloom.supervisor.tables import Read, Tables, error_table
from blkloom.supervisor.workers import Workers

_log = logging.getLogger(__name__)

SUSPEND_SECONDS: Final = 30.0
"""Default time in seconds for requests in flight to end."""
LOAD_SECONDS: Final = 120.0
"""Seconds for all files of a table to open: a slow one may take seconds."""
FORCE_SECONDS: Final = 5.0
"""Seconds for requests in flight to end before `remove --force` ends their worker."""


class TableVerbs:
    """Changes the tables of the registry's devices. released: called with a device that is not below another one any
    more.
    """

    def __init__(
        self,
        registry: Registry,
        store: DescriptorStore,
        workers: Workers,
        hand_over: HandOver,
        tables: Tables,
        devices: Devices,
        nodes: Nodes,
        changes: ChangeNotifier,
        *,
        released: Callable[[Entry], None],
    ) -> None:
        self._registry = registry
        self._store = store
        self._workers = workers
        self._hand_over = hand_over
        self._tables = tables
        self._devices = devices
        self._nodes = nodes
        self._changes = changes
        self._released = released

    # load and clear

    async def load(self, call: m.Load, opener: Opener) -> None:
        """Loads a table into the inactive slot. opener: opens the files for the client."""
        entry = self._devices.live(call.device)
        found = self._tables.read(entry, call.table, call.source)
        async with AsyncExitStack() as stack:
            while True:
                locked = {entry.group.id, *(lower.group.id for lower in self.lowers(found))}
                await stack.enter_async_context(self._devices.held(entry, *self.lowers(found)))
                found = self._tables.read(entry, call.table, call.source)  # nothing can change any more
                if {entry.group.id, *(lower.group.id for lower in self.lowers(found))} <= locked:
                    break
                await stack.aclose()
            loaded = self.new_load(call)
            try:
                await self.fill_inactive(entry, loaded, call.source, found, opener, same_files=call.same_files)
            finally:
                entry.memory_loading = 0
            self._devices.save(entry)

    def new_load(self, call: m.Load | m.Create) -> Loaded:
        """The table of `call`, with a new load number."""
        assert call.table is not None, "the caller has looked"
        return Loaded(
            load=self._registry.new_load(),
            table=call.table,
            read_only=call.read_only,
            shared=call.shared,
            fault=call.fault,
        )

    async def fill_inactive(
        self, entry: Entry, loaded: Loaded, source: str, found: Read, opener: Opener, *, same_files: bool = False
    ) -> None:
        """Loads a table into the inactive slot, in one worker with the devices below it. The caller holds the locks of
        all their groups.
        """
        entry.memory_loading = found.memory
        groups = {lower.group.id: lower.group for lower in self.lowers(found)} | {entry.group.id: entry.group}
        if len(groups) > 1:
            await self._hand_over.merge(list(groups.values()))
        call = m.WorkerLoad(minor=entry.minor, loaded=loaded, source=source, same_files=same_files)
        reply = await entry.group.call(call, opener=opener, wait=LOAD_SECONDS)
        result = msgspec.convert(reply, TableLoaded)
        try:
            check_files(self._registry, self._store, entry, loaded.load, found.below)
        except BaseException:
            await entry.group.call(m.WorkerClear(minor=entry.minor))
            self._drop_outlived(entry)
            raise
        loaded.whole = result.whole
        entry.inactive = loaded
        entry.memory_inactive, entry.memory_loading = found.memory, 0
        entry.inactive_deps = result.deps
        self._set_below(entry, inactive=found.below)
        self._drop_outlived(entry)
        if entry.active is None:
            entry.deps = entry.inactive_deps

    def lowers(self, found: Read) -> list[Entry]:
        """The devices below a table."""
        lowers = [self._registry.get(minor) for minor in found.below]
        return [lower for lower in lowers if lower is not None]

    async def clear(self, call: m.Clear) -> None:
        """Empties the inactive slot."""
        entry = self._devices.live(call.device)
        async with self._devices.held(entry):
            await entry.group.call(m.WorkerClear(minor=entry.minor))
            entry.inactive, entry.memory_inactive = None, 0
            self._set_below(entry, inactive=frozenset())
            self._drop_outlived(entry)
            self._devices.save(entry)

    # suspend and resume

    async def suspend(self, call: m.Suspend) -> None:
        """Freezes the file systems on the nodes of the device and of the devices above it, unless the call says not to.
        Then suspends those devices, the device itself last.
        """
        entry = self._devices.live(call.device)
        wait = SUSPEND_SECONDS if call.timeout is None else call.timeout
        stack = [*self._registry.above(entry), entry] if call.flush and call.lock_fs else []
        async with self._nodes.freezer.frozen(stack, seconds=wait):
            await self._suspend(entry, flush=call.flush, wait=wait)

    async def _suspend(self, entry: Entry, *, flush: bool, wait: float) -> None:
        async with self._devices.held(entry):
            taken: list[Entry] = []
            try:
                for upper in [*self._registry.above(entry), entry]:
                    if not upper.suspended and upper.suspended_for is None and upper.active is not None:
                        await upper.group.call(m.WorkerSuspend(minor=upper.minor, flush=flush, timeout=wait), wait=wait)
                        taken.append(upper)
                        if upper is not entry:
                            upper.suspended_for = entry.minor
            except BaseException:
                for upper in reversed(taken):
                    upper.suspended_for = None
                    await upper.group.call(m.WorkerResume(minor=upper.minor, swap=False))
                raise
            entry.suspended, entry.suspended_for = True, None
            self._devices.save(entry)
            for changed in taken:
                self._devices.save(changed)
                self._changes.changed(changed)

    async def resume(self, call: m.Resume, opener: Opener) -> None:
        """Makes the inactive table the active one and resumes the device, then the devices above that were suspended
        for it, and thaws the file systems on their nodes. Cancels a suspend that waits for these. A FAILED device is
        started again.
        """
        entry = self._registry.find(call.device)
        self._nodes.freezer.cancel([*self._registry.above(entry), entry])
        await self._resume(entry, call, opener)
        try:
            await self._nodes.refresh(entry)
        finally:
            for resumed in [entry, *reversed(self._registry.above(entry))]:
                await self._nodes.freezer.thaw(resumed)
        if (call.attach or entry.node_options.at_resume) and entry.node is None:
            await self._nodes.attach(m.Attach(device=entry.key))

    async def _resume(self, entry: Entry, call: m.Resume, opener: Opener) -> None:
        async with self._devices.held(entry):
            if entry.failed:
                await self._revive(entry, opener)
                if not entry.suspended:
                    return
            await self.resume_one(entry, flush=call.flush, timeout=call.timeout, opener=opener)
            entry.suspended_for = None
            self._devices.save(entry)
            for upper in reversed(self._registry.above(entry)):
                if upper.suspended_for == entry.minor:
                    await self.resume_one(upper, flush=call.flush, timeout=call.timeout, swap=False, opener=opener)
                    upper.suspended_for = None
                    self._devices.save(upper)

    async def resume_one(
        self,
        entry: Entry,
        *,
        flush: bool,
        timeout: float | None,
        swap: bool = True,
        opener: Opener | None = None,
    ) -> None:
        """Resumes a device, and not those above. swap: makes the inactive table the active one."""
        wait = SUSPEND_SECONDS if timeout is None else timeout
        if entry.active is None and entry.inactive is None:
            entry.suspended = False  # as the kernel does; the device stays without a table
            return
        call = m.WorkerResume(minor=entry.minor, flush=flush, timeout=wait, swap=swap)
        try:
            result = msgspec.convert(await entry.group.call(call, opener=opener, wait=wait), Resumed)
        except (OSError, ValueError):
            if swap and entry.inactive is not None and not entry.group.leaving:
                await self._update_after_failure(entry)
            raise
        if swap and entry.inactive is not None:
            self._swapped(entry)
        if swap:
            entry.suspended = False
        if entry.active is not None and result.table is not None:
            entry.active.table = result.table
        entry.targets, entry.types = result.targets, result.types
        entry.size, entry.block_size = result.size, result.block_size
        entry.event = max(entry.event, result.event)
        self._changes.changed(entry)

    async def _update_after_failure(self, entry: Entry) -> None:
        """Asks the worker for its state after a resume that failed: a target may have refused when its table was
        already the active one.
        """
        for state in msgspec.convert(await entry.group.call(m.Describe()), Description).devices:
            if state.minor == entry.minor:
                if state.active and entry.inactive and state.active.load == entry.inactive.load:
                    self._swapped(entry)
                entry.suspended = state.suspended
                self._devices.save(entry)
                self._changes.changed(entry)

    def _swapped(self, entry: Entry) -> None:
        self._set_below(entry, active=entry.below_inactive, inactive=frozenset())
        entry.active, entry.inactive = entry.inactive, None
        entry.memory_active, entry.memory_inactive = entry.memory_inactive, 0
        self._drop_outlived(entry)
        entry.deps = entry.inactive_deps

    async def _revive(self, entry: Entry, opener: Opener) -> None:
        """Starts a FAILED device again, with the other devices of its group."""
        group = entry.group
        group.deaths.clear()
        entries = self._registry.lower_first(group.minors)
        try:
            await exporting.open_missing(self._store, entries)
        except OSError as error:  # endpoints that are open already must not keep clients waiting
            self._workers.fail(group, described(error))
            raise
        await self._workers.restarts.restart(group, "asked to try again", opener=opener, died=False)
        for other in entries:
            self._devices.save(other)
        if entry.failed:
            raise DeviceFailed(f"device '{entry.name}' has failed: {entry.failed}", cure="remove it, or try again")

    async def fail_all_io(self, entry: Entry) -> None:
        """Gives a device an error table. If its requests in flight do not end, ends its worker, unless that has other
        devices. A worker that does not answer is replaced.
        """
        try:
            await self._load_error_table(entry)
        except (OSError, ValueError) as error:
            _log.error("device '%s' could not be given an error table: %s", entry.name, error)
            if isinstance(error, WorkerStuck) and len(entry.group.minors) > 1:
                await self._fail_in_next_worker(entry)
                return
            if not isinstance(error, BlkloomError) or len(entry.group.minors) > 1:
                raise
            # The requests may never end; the clients are disconnected when the process ends.
            entry.group.leaving = True
            entry.group.kill()
            entry.connections = 0

    async def _load_error_table(self, entry: Entry) -> None:
        loaded = Loaded(load=self._registry.new_load(), table=error_table(entry.size))
        await entry.group.call(m.WorkerLoad(minor=entry.minor, loaded=loaded))
        entry.inactive, entry.inactive_deps, entry.memory_inactive = loaded, [], 0
        self._set_below(entry, inactive=frozenset())
        await self.resume_one(entry, flush=False, timeout=FORCE_SECONDS)
        self._devices.save(entry)

    async def _fail_in_next_worker(self, entry: Entry) -> None:
        """Gives a device an error table after its worker, which does not answer, was replaced: the worker has other
        devices, whose requests wait meanwhile.
        """
        await self._workers.restarts.restart(entry.group, "its worker did not answer `remove --force`")
        if not entry.failed:
            await self._load_error_table(entry)

    def _set_below(
        self, entry: Entry, *, active: frozenset[int] | None = None, inactive: frozenset[int] | None = None
    ) -> None:
        """See `Registry.set_below`."""
        before = entry.below
        self._registry.set_below(entry, active=active, inactive=inactive)
        for minor in before - entry.below:
            if lower := self._registry.get(minor):
                self._released(lower)

    def _drop_outlived(self, entry: Entry) -> None:
        """Drops the stored descriptors of tables that are in neither slot."""
        self._store.drop(self._store.outlived(entry.minor, entry.loads))
