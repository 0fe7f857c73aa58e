"""The verbs: what each call of a client does to registry and workers.

A verb holds the lock of the group it changes, asks the worker first and writes the registry after it
has agreed; a call that fails leaves the registry as it was. On the event loop.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import msgspec

from blkloom import open_files
from blkloom.control import messages as m
from blkloom.control.rundir import RunDir
from blkloom.control.states import DeviceInfo, DeviceState, ExportState, Loaded
from blkloom.errors import (
    BlkloomError,
    DeviceBusy,
    DeviceFailed,
    LostData,
    NoSuchDevice,
    ResourceError,
    UsageError,
    WorkerGone,
)
from blkloom.supervisor import exporting, states
from blkloom.supervisor.clearing import Clearing
from blkloom.supervisor.group import LEAVE_SECONDS, Group
from blkloom.supervisor.link import Opener
from blkloom.supervisor.news import News
from blkloom.supervisor.registry import Entry, Registry
from blkloom.supervisor.store import Store
from blkloom.supervisor.tables import Read, Tables, error_table
from blkloom.supervisor.workers import Workers
from blkloom.target.leg import rename_legs

_log = logging.getLogger(__name__)

SUSPEND_SECONDS: Final = 30.0
"""For requests in flight to end, unless the caller says otherwise."""
LOAD_SECONDS: Final = 120.0
"""For all files of a table to open: a slow one may take seconds."""
_STOP_AT_ONCE: Final = 64
_FOR_COMMANDS: Final = 16
"""Descriptors that are left for commands where there are none for more devices."""
READ_SECONDS: Final = 30.0
"""For storage to answer a read of ours."""
FORCE_SECONDS: Final = 5.0
"""For requests in flight to end before `remove --force` ends the worker that has them."""
RETRY_SECONDS: Final = 5.0
"""How long `remove --retry` waits for users to leave. dmsetup: 25 tries, 200 ms apart."""


class Caller(msgspec.Struct, frozen=True):
    """Who asks. opener: has files opened with his rights."""

    opener: Opener


class Verbs:
    """On the registry and its workers."""

    def __init__(
        self,
        run_dir: RunDir,
        registry: Registry,
        store: Store,
        workers: Workers,
        tables: Tables,
        news: News,
        *,
        gone: Callable[[], None],
    ) -> None:
        """gone: called when a device has ended."""
        self._gone = gone
        self._run_dir = run_dir
        self._registry = registry
        self._store = store
        self._workers = workers
        self._tables = tables
        self._news = news
        self._clearing = Clearing(registry, workers, self._drop)
        self._stopping = False

    # making

    async def create(self, call: m.Create, caller: Caller) -> DeviceInfo:
        """Created, loaded and live; or not at all."""
        _check_descriptors()
        if self._stopping:
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
        lowers = self._lowers(found) if found else []
        async with self._workers.locked(entry, *lowers):
            self._check_there(entry)
            try:
                for lower in lowers:
                    self._check_there(lower)
                await self._make(entry, call, found, caller)
            except BaseException:
                await asyncio.shield(self._drop(entry, fail=True))
                raise
            entry.making = False
            self._save(entry)
        return self._registry.info(entry)

    async def _make(self, entry: Entry, call: m.Create, found: Read | None, caller: Caller) -> None:
        export = exporting.automatic(self._run_dir, entry.name)
        await exporting.listen(self._store, entry, export, allow_remote=False)
        entry.exports.append(export)
        entry.group.targets = found.targets if found else frozenset()
        await self._workers.start(entry.group)
        await self._workers.hold(entry.group, [entry.state()])
        if found is not None and call.table is not None:
            loaded = Loaded(
                load=self._registry.new_load(), table=call.table, read_only=call.read_only, shared=call.shared
            )
            await self._bring_together(entry, found)
            await self._load(entry, loaded, call.source, found, caller)
            if call.suspended:
                entry.suspended = True
            else:
                await self._resume_one(entry, flush=True, timeout=None, opener=caller.opener)

    async def _bring_together(self, entry: Entry, found: Read) -> None:
        """One group of the device and what the table stands on; the caller holds the locks of all."""
        groups = {lower.group.id: lower.group for lower in self._lowers(found)} | {entry.group.id: entry.group}
        if len(groups) > 1:
            await self._workers.merge(list(groups.values()))

    def _lowers(self, found: Read) -> list[Entry]:
        lowers = [self._registry.get(minor) for minor in found.below]
        return [lower for lower in lowers if lower is not None]

    # tables

    async def load(self, call: m.Load, caller: Caller) -> None:
        """Fills the inactive slot."""
        entry = self._live(call.device)
        found = self._tables.read(entry, call.table, call.source)
        async with AsyncExitStack() as stack:
            while True:
                held = {entry.group.id, *(lower.group.id for lower in self._lowers(found))}
                await stack.enter_async_context(self._held(entry, *self._lowers(found)))
                found = self._tables.read(entry, call.table, call.source)  # with nothing able to change any more
                if {entry.group.id, *(lower.group.id for lower in self._lowers(found))} <= held:
                    break
                await stack.aclose()
            entry.memory_loading = found.memory
            loaded = Loaded(
                load=self._registry.new_load(),
                table=call.table,
                read_only=call.read_only,
                shared=call.shared,
            )
            try:
                await self._bring_together(entry, found)
                await self._load(entry, loaded, call.source, found, caller, same_files=call.same_files)
            finally:
                entry.memory_loading = 0
            self._save(entry)

    async def _load(
        self, entry: Entry, loaded: Loaded, source: str, found: Read, caller: Caller, *, same_files: bool = False
    ) -> None:
        call = m.WorkerLoad(minor=entry.minor, loaded=loaded, source=source, same_files=same_files)
        result = await entry.group.call(call, opener=caller.opener, wait=LOAD_SECONDS)
        loaded.whole = result.get("whole", False)
        entry.inactive = loaded
        entry.memory_inactive, entry.memory_loading = found.memory, 0
        entry.inactive_deps = list(result.get("deps", []))
        self._stand(entry, inactive=found.below)
        self._store.keep_only(entry.minor, entry.loads)
        if entry.active is None:
            entry.deps = entry.inactive_deps

    async def clear(self, call: m.Clear) -> None:
        """Empties the inactive slot."""
        entry = self._live(call.device)
        async with self._held(entry):
            await entry.group.call(m.WorkerClear(minor=entry.minor))
            entry.inactive, entry.memory_inactive = None, 0
            self._stand(entry, inactive=frozenset())
            self._store.keep_only(entry.minor, entry.loads)
            self._save(entry)

    # suspend and resume

    async def suspend(self, call: m.Suspend) -> None:
        """The upper ones first, then the device."""
        entry = self._live(call.device)
        wait = SUSPEND_SECONDS if call.timeout is None else call.timeout
        async with self._held(entry):
            taken: list[Entry] = []
            try:
                for upper in [*self._registry.above(entry), entry]:
                    if not upper.suspended and upper.suspended_for is None and upper.active is not None:
                        await upper.group.call(
                            m.WorkerSuspend(minor=upper.minor, flush=call.flush, timeout=wait), wait=wait
                        )
                        taken.append(upper)
                        if upper is not entry:
                            upper.suspended_for = entry.minor
            except BaseException:
                for upper in reversed(taken):
                    upper.suspended_for = None
                    await upper.group.call(m.WorkerResume(minor=upper.minor, swap=False))
                raise
            entry.suspended, entry.suspended_for = True, None
            self._save(entry)
            for changed in taken:
                self._save(changed)
                self._news.changed(changed)

    async def resume(self, call: m.Resume, caller: Caller) -> None:
        """Swaps the inactive table in and goes live; then those above that were suspended for it."""
        entry = self._registry.find(call.device)
        async with self._held(entry):
            if entry.failed:
                await self._revive(entry, caller)
                if not entry.suspended:
                    return
            await self._resume_one(entry, flush=call.flush, timeout=call.timeout, opener=caller.opener)
            entry.suspended_for = None
            self._save(entry)
            for upper in reversed(self._registry.above(entry)):
                if upper.suspended_for == entry.minor:
                    await self._resume_one(
                        upper, flush=call.flush, timeout=call.timeout, swap=False, opener=caller.opener
                    )
                    upper.suspended_for = None
                    self._save(upper)

    async def _resume_one(
        self,
        entry: Entry,
        *,
        flush: bool,
        timeout: float | None,
        swap: bool = True,
        opener: Opener | None = None,
    ) -> None:
        wait = SUSPEND_SECONDS if timeout is None else timeout
        if entry.active is None and entry.inactive is None:
            entry.suspended = False  # as the kernel does; it stays without a table
            return
        call = m.WorkerResume(minor=entry.minor, flush=flush, timeout=wait, swap=swap)
        try:
            result = await entry.group.call(call, opener=opener, wait=wait)
        except (OSError, ValueError):
            if swap and entry.inactive is not None and not entry.group.leaving:
                await self._see_how_far(entry)
            raise
        if swap and entry.inactive is not None:
            self._swapped(entry)
        if swap:
            entry.suspended = False
        if entry.active is not None:
            entry.active.table = result.get("table", entry.active.table)
        entry.targets, entry.types, entry.size = result["targets"], result["types"], result["size"]
        entry.event = max(entry.event, result["event"])
        self._news.changed(entry)

    async def _see_how_far(self, entry: Entry) -> None:
        """After a resume that failed: a target may have refused when its table was in place already."""
        for state in msgspec.convert((await entry.group.call(m.Describe()))["devices"], list[DeviceState]):
            if state.minor == entry.minor:
                if state.active and entry.inactive and state.active.load == entry.inactive.load:
                    self._swapped(entry)
                entry.suspended = state.suspended
                self._save(entry)
                self._news.changed(entry)

    def _swapped(self, entry: Entry) -> None:
        self._stand(entry, active=entry.below_inactive, inactive=frozenset())
        entry.active, entry.inactive = entry.inactive, None
        entry.memory_active, entry.memory_inactive = entry.memory_inactive, 0
        self._store.keep_only(entry.minor, entry.loads)
        entry.deps = entry.inactive_deps

    async def _revive(self, entry: Entry, caller: Caller) -> None:
        """A FAILED device, and those of its group, once more."""
        group = entry.group
        group.deaths.clear()
        entries = self._registry.lower_first(group.minors)
        try:
            await exporting.listen_again(self._store, entries)
        except OSError as error:  # those that listen already must not keep clients waiting
            self._workers.fail(group, str(error))
            raise
        await self._workers.restart(group, "asked to try again", opener=caller.opener, died=False)
        for other in entries:
            self._save(other)
        if entry.failed:
            raise DeviceFailed(f"device {entry.name!r} has failed: {entry.failed}", cure="remove it, or try again")

    # going

    async def remove(self, call: m.Remove) -> None:
        """Ends the device, if nobody uses it."""
        entry = self._registry.find(call.device)
        async with self._held(entry):
            if call.force and not entry.failed and entry.active is not None:
                await self._fail_all_io(entry)
            try:
                self._registry.check_unused(entry, forced=call.force)
            except DeviceBusy:
                if call.deferred:
                    entry.deferred = True
                    self._save(entry)
                    return
                if not call.retry:
                    raise
            else:
                await self._drop(entry, fail=call.force)
                return
        await self._remove_later(entry, forced=call.force)

    async def _remove_later(self, entry: Entry, *, forced: bool) -> None:
        """As soon as its users have gone, within RETRY_SECONDS. Raises DeviceBusy."""
        deadline = time.monotonic() + RETRY_SECONDS
        while True:
            news = self._news.next(entry)
            async with self._workers.locked(entry):
                if self._registry.get(entry.minor) is not entry:
                    return
                try:
                    self._registry.check_unused(entry, forced=forced)
                except DeviceBusy:
                    if time.monotonic() >= deadline:
                        raise
                else:
                    await self._drop(entry, fail=False)
                    return
            await asyncio.wait([news], timeout=max(0.0, deadline - time.monotonic()))

    async def _fail_all_io(self, entry: Entry) -> None:
        loaded = Loaded(load=self._registry.new_load(), table=error_table(entry.size))
        try:
            await entry.group.call(m.WorkerLoad(minor=entry.minor, loaded=loaded))
            entry.inactive, entry.inactive_deps, entry.memory_inactive = loaded, [], 0
            self._stand(entry, inactive=frozenset())
            await self._resume_one(entry, flush=False, timeout=FORCE_SECONDS)
            self._save(entry)
        except (OSError, ValueError) as error:
            _log.error("device %r could not be given an error table: %s", entry.name, error)
            if not isinstance(error, BlkloomError) or len(entry.group.minors) > 1:
                raise
            # What holds it may hold it for ever; its clients go with the process.
            entry.group.leaving = True
            entry.group.kill()
            entry.connections = 0

    async def _drop(self, entry: Entry, *, fail: bool) -> None:
        """The device ends; the caller holds its group's lock. Raises what its last flush raises; it has
        ended even so.
        """
        group = entry.group
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
                _log.error("device %r was removed, but not all of it was written", entry.name)
                unwritten = error
        self._forget(entry, group)
        if not group.minors:
            await self._workers.end(group, flush=not fail and unwritten is None)
        if unwritten is not None:
            raise unwritten

    def _lost(self, entry: Entry) -> LostData | None:
        """What a device without a worker is to be removed with."""
        if not (errors := self._registry.sync_errors(entry)):
            return None
        texts = "; ".join(f"a sync of {error}" for error in errors)
        return LostData(f"data written to device {entry.name!r} may be lost: {texts}", cure="check what is there")

    def _forget(self, entry: Entry, group: Group) -> None:
        for export in entry.exports:
            exporting.stop_listening(self._store, entry, export)
        self._store.forget(entry.minor)
        self._registry.remove(entry)
        group.minors.discard(entry.minor)
        states.remove(self._run_dir, entry.minor)
        self._news.changed(entry)
        self._gone()
        for lower in entry.below:
            if found := self._registry.get(lower):
                self.look_at(found)

    def look_at(self, entry: Entry) -> None:
        """Something changed: a removal may be due."""
        self._news.changed(entry)
        if not self._stopping:
            self._clearing.look_at(entry)

    async def retain(self, call: m.Retain) -> None:
        """No removal that nobody asks for any more."""
        entry = self._registry.find(call.device)
        async with self._held(entry):
            entry.autoclear = entry.deferred = False
            self._save(entry)

    async def remove_all(self, call: m.RemoveAll) -> list[tuple[str, str]]:
        """Those on top first. What could not be removed, and why."""
        left = []
        for entry in reversed(self._registry.lower_first({entry.minor for entry in self._registry})):
            try:
                await self.remove(
                    m.Remove(device=m.Selector(minor=entry.minor), force=call.force, deferred=call.deferred)
                )
            except NoSuchDevice:
                continue  # a deferred removal was due
            except (OSError, ValueError) as error:
                left.append((entry.name, str(error)))
        return left

    async def stop(self) -> list[str]:
        """All devices end, whoever uses them; flushed. What went wrong."""
        self._stopping = self._workers.ending = True
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
                                await self._drop(entry, fail=False)
                    except (OSError, ValueError) as error:
                        errors.append(f"device {entry.name!r}: {error}")

        await asyncio.gather(*map(end, stacks.values()))
        return errors

    async def _disconnect(self, stack: list[Entry]) -> None:
        """The clients of all of these together: what the slow ones take of their time is not added up."""
        async with self._workers.locked(*stack):
            calls = [
                entry.group.call(m.Unserve(minor=entry.minor, id=export.id))
                for entry in stack
                if entry.group.link is not None and not entry.failed
                for export in entry.exports
            ]
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                if isinstance(outcome, Exception):
                    _log.error("clients could not be disconnected before their device ends: %s", outcome)

    async def rename(self, call: m.Rename) -> None:
        """A new name, which its automatic socket and the tables above it follow; or a first uuid."""
        entry = self._live(call.device)
        if bool(call.name) == bool(call.uuid):
            raise UsageError("rename takes either a name or a uuid")
        async with self._held(entry):
            if call.uuid:
                self._registry.set_uuid(entry, call.uuid)
                try:
                    await entry.group.call(m.WorkerRename(minor=entry.minor, name=entry.name, uuid=call.uuid))
                except BaseException:
                    self._registry.unset_uuid(entry)
                    raise
                self._save(entry)
                return
            former = entry.name
            self._set_name(entry, call.name)
            try:
                await entry.group.call(m.WorkerRename(minor=entry.minor, name=call.name))
            except BaseException:
                self._set_name(entry, former)
                raise
            self._save(entry)
            for holder in self._registry.holders(entry):
                self._rename_below(holder, former, call.name)
                self._save(holder)

    def _set_name(self, entry: Entry, name: str) -> None:
        """Also of its automatic export; others keep the name their clients know."""
        former = entry.name
        self._registry.rename(entry, name)
        try:
            for export in entry.exports:
                if export.automatic:
                    exporting.move(self._store, entry, export, str(self._run_dir.device(name)))
                    export.name = name
        except BaseException:
            self._registry.rename(entry, former)
            raise

    def _rename_below(self, holder: Entry, former: str, name: str) -> None:
        folder = str(self._run_dir.devices)
        for loaded in (holder.active, holder.inactive):
            if loaded is not None:
                loaded.table = rename_legs(self._tables.parsed(loaded.table), former, name, device_folder=folder)
        holder.deps = [f"blkloom:{name}" if dep == f"blkloom:{former}" else dep for dep in holder.deps]

    # contents

    async def message(self, call: m.SendMessage) -> Any:
        """To the target at a sector."""
        entry = self._live(call.device)
        async with self._held(entry):
            return await entry.group.call(m.WorkerMessage(minor=entry.minor, sector=call.sector, text=call.text))

    async def read(self, call: m.ReadDevice) -> Any:
        """A piece of its contents."""
        entry = self._live(call.device)
        async with self._held(entry):
            stopped = entry.suspended or entry.suspended_for is not None
            if entry.active is None or stopped:
                raise UsageError(
                    f"device {entry.name!r} {'is suspended' if stopped else 'has no table'}: it cannot be read",
                    cure=f"blkloom resume {entry.name}",
                )
            if not 0 <= call.offset <= call.offset + call.length <= entry.size or not 0 < call.length <= m.MOST_READ:
                raise UsageError(
                    f"{call.length} bytes from {call.offset} on cannot be read from device {entry.name!r}",
                    cure=f"at most {m.MOST_READ} at once, of the {entry.size} there are",
                )
            return await entry.group.call(
                m.WorkerRead(minor=entry.minor, offset=call.offset, length=call.length), wait=READ_SECONDS
            )

    # ways in

    async def add_export(self, call: m.AddExport) -> ExportState:
        """One more."""
        _check_descriptors()
        entry = self._live(call.device)
        async with self._held(entry):
            export = exporting.wanted(self._run_dir, entry, call)
            descriptor = await exporting.listen(self._store, entry, export, allow_remote=call.allow_remote)
            try:
                await entry.group.call(m.Serve(minor=entry.minor, export=export), descriptor)
            except BaseException:
                exporting.stop_listening(self._store, entry, export)
                raise
            entry.exports.append(export)
            self._save(entry)
            return export

    async def remove_export(self, call: m.RemoveExport) -> None:
        """Its clients are disconnected."""
        entry = self._live(call.device)
        async with self._held(entry):
            found = [export for export in entry.exports if call.id in (export.id, export.unix)]
            if not found:
                known = ", ".join(f"{export.id} ({export.unix or export.host})" for export in entry.exports) or "none"
                raise UsageError(f"device {entry.name!r} has no export {call.id!r}", cure=f"it has: {known}")
            await entry.group.call(m.Unserve(minor=entry.minor, id=found[0].id))
            exporting.stop_listening(self._store, entry, found[0])
            entry.exports.remove(found[0])
            self._save(entry)

    # shared

    def _live(self, device: m.DeviceKey) -> Entry:
        """The device, unless it has failed."""
        entry = self._registry.find(device)
        if entry.failed:
            raise DeviceFailed(
                f"device {entry.name!r} has failed: {entry.failed}",
                cure=f"blkloom resume {entry.name} tries again, blkloom remove {entry.name} gives it up",
            )
        return entry

    @asynccontextmanager
    async def _held(self, *entries: Entry) -> AsyncIterator[None]:
        """The locks of their groups. Raises NoSuchDevice if one has gone while it was waited for."""
        async with self._workers.locked(*entries):
            for entry in entries:
                self._check_there(entry)
            yield

    def _check_there(self, entry: Entry) -> None:
        if self._registry.get(entry.minor) is not entry:
            raise NoSuchDevice(f"Device {entry.name} not found: it was removed meanwhile")

    def _stand(
        self, entry: Entry, *, active: frozenset[int] | None = None, inactive: frozenset[int] | None = None
    ) -> None:
        """As `Registry.set_below`; those it stands on no more may be due for removal."""
        before = entry.below
        self._registry.set_below(entry, active=active, inactive=inactive)
        for minor in before - entry.below:
            if lower := self._registry.get(minor):
                self.look_at(lower)

    def save_all(self) -> None:
        """Writes every state file."""
        for entry in self._registry:
            self._save(entry)

    def _save(self, entry: Entry) -> None:
        states.save(self._run_dir, entry)


def _check_descriptors() -> None:
    """Raises ResourceError where one more device or export would take what commands, or the devices there are, need."""
    if open_files.are_scarce(open_files.SUPERVISOR_RESERVE, more=_FOR_COMMANDS):
        what = f"the supervisor has only {open_files.left()} free descriptors left, which it needs for what there is"
        raise ResourceError(what, cure=open_files.advice(), errno=errno.EMFILE)
