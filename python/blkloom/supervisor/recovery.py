"""Recovery of the devices of a former supervisor: takes over its workers, and restarts devices without a worker.

A worker that answers describes its own devices; their state files add what only a supervisor knows. A device that has a
state file but no worker is restarted: its files are reopened with the rights of this process. If the device had memory,
the contents are lost; the device is then FAILED, and its state names the reason.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from blkloom.control import messages as m
from blkloom.control.client import OPEN_SECONDS, open_within
from blkloom.control.descriptor_store import DescriptorStore
from blkloom.control.replies import Description
from blkloom.control.rundir import RunDir
from blkloom.control.states import DeviceInfo, DeviceState, Loaded
from blkloom.errors import BlkloomError, WorkerGone
from blkloom.peer_credentials import peer_credentials
from blkloom.printing import described
from blkloom.supervisor import exporting, states
from blkloom.supervisor.group import Group, still_there
from blkloom.supervisor.registry import Entry, Registry
from blkloom.supervisor.states import Written, save
from blkloom.supervisor.tables import Tables
from blkloom.supervisor.workers import Workers

_log = logging.getLogger(__name__)
_REACHED_AT_ONCE: Final = 64
"""Workers that are asked at the same time. With thousands at once, all answers would be late."""


async def open_here(wish: m.OpenFile, opened: Sequence[int]) -> int:
    """Opens a file with the supervisor's own rights: no client waits that could open it. Raises OSError."""
    if not os.path.isabs(wish.path) and not opened:
        raise FileNotFoundError(2, "a relative path, and its directory is no longer known", wish.path)
    return await asyncio.to_thread(open_within, wish, OPEN_SECONDS, *opened)


def _show(entry: Entry, info: DeviceInfo) -> None:
    """Copies what only the worker knows about the live table."""
    entry.size, entry.block_size, entry.targets = info.size, info.block_size, info.targets
    entry.types, entry.deps = info.types, info.deps


class _Found(msgspec.Struct, frozen=True):
    """A worker that answered, and its devices."""

    group: Group
    states: list[DeviceState]
    infos: dict[int, DeviceInfo]

    @property
    def frozen(self) -> bool:
        """Whether a hand-over had begun: another worker may have the devices."""
        return any(
            state.connections or (self.infos[state.minor].state == "SUSPENDED" and not state.suspended)
            for state in self.states
        )


class Recovery:
    """Fills an empty registry with the devices of a former supervisor."""

    def __init__(
        self, run_dir: RunDir, registry: Registry, store: DescriptorStore, workers: Workers, tables: Tables
    ) -> None:
        self._run_dir = run_dir
        self._registry = registry
        self._store = store
        self._workers = workers
        self._tables = tables
        self._written = {written.state.minor: written for written in states.read_all(run_dir)}
        self._unended: list[Group] = []
        """Killed workers that have not ended yet and have no known device."""
        self.failed_before = frozenset(minor for minor, written in self._written.items() if written.failed)
        """Devices that were already FAILED when the former supervisor ended."""

    async def run(self) -> None:
        """Puts every device that can be found into the registry."""
        at_once = asyncio.Semaphore(_REACHED_AT_ONCE)

        async def reach(path: Path) -> _Found | None:
            async with at_once:
                return await self._reach(path)

        sockets = sorted(self._run_dir.workers.glob("*.sock"))
        reached = [found for found in await asyncio.gather(*map(reach, sockets)) if found is not None]
        taken: set[int] = set()
        for found in sorted(reached, key=lambda found: found.frozen):
            minors = set(found.infos)
            if not minors or minors & taken:  # its hand-over was complete except for the last message
                await self._workers.end(found.group, flush=False)
                continue
            taken |= minors
            await self._take_over(found)
        await self._restart_the_rest()
        for entry in self._registry:
            self._understand(entry)
        for entry in self._registry:
            save(self._run_dir, entry)
            self._workers.changed(entry)  # a deferred removal may have become due
        self._workers.complete.set()

    async def _take_over(self, found: _Found) -> None:
        group = found.group
        unfinished = []
        for state in found.states:
            if state.minor not in self._written and state.active is None:
                unfinished.append(state)  # its `create` was never answered, so it has never been used
                continue
            entry, info = self._enter(state, group), found.infos[state.minor]
            entry.connections = info.connections
            _show(entry, info)
        for minor in group.minors:  # now: a device below another must not look unused when the worker reports changes
            if (entered := self._registry.get(minor)) is not None:
                self._understand(entered)
        for other in self._unended if found.frozen else ():
            if not await other.wait_for_end():  # perhaps the target of the hand-over of `group`
                self._workers.give_up(group, other)
                return
        try:
            for state in unfinished:
                await group.call(m.Release(minor=state.minor, fail=True))
            await group.call(m.Thaw())  # it may be frozen for a hand-over
        except (OSError, ValueError) as error:
            _log.error("worker %s: %s", group.id, error)
        for state in unfinished:
            self._store.drop(self._store.labels(state.minor))
            for export in state.exports:
                await exporting.remove(export)
        if not group.minors:
            await self._workers.end(group)
        self._workers.restarts.check(group)

    async def _reach(self, path: Path) -> _Found | None:
        connected = socket.socket(socket.AF_UNIX)
        try:
            connected.connect(str(path))
        except OSError:
            connected.close()
            path.unlink(missing_ok=True)  # noqa: ASYNC240 - the run directory is on no slow file system
            return None
        peer = peer_credentials(connected)
        if not peer.may_command:
            _log.error("%s belongs to user %d and is left alone", path, peer.uid)
            connected.close()
            return None
        try:
            group, described = await self._workers.take_over(path.stem, connected, peer.pid)
            infos = {info.minor: info for info in described.infos}
        except (OSError, ValueError) as error:
            _log.error("worker %s cannot be taken over: %s", path.stem, error or "it does not answer")
            if (silent := self._workers.groups.get(path.stem)) is None:
                return None
            if isinstance(error, WorkerGone):
                silent.kill()
            ended = isinstance(error, WorkerGone) and await silent.wait_for_end()
            if ended or not self._keep_silent(silent, peer.pid):
                await self._workers.end(silent, flush=False)
                if silent.pidfd >= 0:
                    self._unended.append(silent)
            elif silent.link:
                await silent.link.close()
                silent.link = None
            return None
        return _Found(group, described.devices, infos)

    def _keep_silent(self, group: Group, pid: int) -> bool:
        """Sets the devices of a worker that does not answer to FAILED. A later resume or remove of one ends the worker.
        Returns False if it has no devices.
        """
        for written in [written for written in self._written.values() if written.group == group.id]:
            self._enter(written.state, group)
        self._workers.fail(group, f"its worker, process {pid}, does not answer")
        return bool(group.minors)

    def _enter(self, state: DeviceState, group: Group) -> Entry:
        written = self._written.pop(state.minor, None)
        entry = Entry(
            state.name,
            state.minor,
            group,
            uuid=state.uuid,
            active=state.active,
            inactive=state.inactive,
            suspended=state.suspended and state.active is not None,
            event=state.event,
            exports=state.exports,
            autoclear=state.autoclear,
            opened=state.opened,
            loop=state.loop,
            failed_syncs=state.failed_syncs,
            io_errors=state.io_errors,
            last_io_error=state.last_io_error,
        )
        if written is not None and written.state.name == state.name:
            entry.restarts, entry.deferred = written.restarts, written.deferred
            entry.node, entry.node_options = written.node, written.node_options
            entry.size, entry.block_size, entry.targets = written.size, written.block_size, written.targets
            entry.types, entry.deps = written.types, written.deps
            entry.autoclear, entry.loop = written.state.autoclear, written.state.loop
            if written.suspended_for is not None and state.suspended:
                entry.suspended, entry.suspended_for = False, written.suspended_for
        for export in entry.exports:
            export.recovery_timeout = self._workers.restarts.recovery
        for loaded in (state.active, state.inactive):
            if loaded is not None:
                self._registry.seen_load(loaded.load)
        group.minors.add(entry.minor)
        self._registry.add(entry)
        return entry

    async def _restart_the_rest(self) -> None:
        groups: dict[str, list[Written]] = {}
        for written in list(self._written.values()):
            groups.setdefault(written.group, []).append(written)
        for members in groups.values():
            await self._restart(members)

    async def _restart(self, members: list[Written]) -> None:
        group = self._workers.new_group()
        group.after = still_there(members[0].group, members[0].worker, members[0].began)
        entries = []
        for written in members:
            entry = self._enter(written.state, group)
            entry.opened = False  # its clients were disconnected; none has left
            entry.failed = written.failed
            entry.restarts, entry.deferred = written.restarts, written.deferred
            entry.suspended, entry.suspended_for = written.state.suspended, written.suspended_for
            entries.append(entry)
        for entry in entries:
            self._understand(entry)
        async with group.lock:
            for entry in entries:
                if entry.memory_inactive and not self._has_memory(entry, entry.inactive):
                    _log.warning("device '%s': its inactive table is cleared, its memory is lost", entry.name)
                    entry.inactive, entry.memory_inactive = None, 0
                    self._registry.set_below(entry, inactive=frozenset())
            lost = [e.name for e in entries if e.memory_active and not self._has_memory(e, e.active)]
            if failed := next((entry.failed for entry in entries if entry.failed), ""):
                self._workers.fail(group, failed)
            elif lost:
                self._workers.fail(group, f"the memory of {', '.join(lost)} went with worker and supervisor")
            else:
                await self._revive(group, entries)

    def _has_memory(self, entry: Entry, loaded: Loaded | None) -> bool:
        """Whether the program before an upgrade has handed on the memory of this table."""
        labels = self._store.labels(entry.minor)
        return loaded is not None and any(label.role == "memory" and label.load == loaded.load for label in labels)

    async def _revive(self, group: Group, entries: list[Entry]) -> None:
        try:
            await exporting.open_missing(self._store, entries)
            await self._workers.restarts.restart(group, "it ended while there was no supervisor", opener=open_here)
            if group.link is None:  # it has failed
                return
            for info in msgspec.convert(await group.call(m.Describe()), Description).infos:
                if (entry := self._registry.get(info.minor)) is not None:
                    _show(entry, info)
        except (BlkloomError, OSError) as error:
            self._workers.fail(group, f"could not be started again: {described(error)}")

    def _understand(self, entry: Entry) -> None:
        """Finds the devices below its tables, and how much memory the tables take."""
        try:
            if entry.active is not None:
                found = self._tables.look(entry.active.table, "table", loaded=True)
                entry.memory_active = found.memory
                self._registry.set_below(entry, active=found.below)
            if entry.inactive is not None:
                found = self._tables.look(entry.inactive.table, "inactive table", loaded=True)
                entry.memory_inactive = found.memory
                self._registry.set_below(entry, inactive=found.below)
        except (OSError, ValueError) as error:
            _log.error("device '%s': its table is not understood: %s", entry.name, error)
