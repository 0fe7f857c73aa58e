"""Finding what a former supervisor left: workers that serve on, and devices whose workers are gone.

A worker that answers knows its devices best; the state file adds what is the supervisor's. A device
with a file and no worker is started again: its files are opened anew, with this process's rights; what
was in memory is lost, and such a device is FAILED and says so.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from pathlib import Path
from typing import Final

import msgspec

from blkloom.control import messages as m
from blkloom.control.rundir import RunDir
from blkloom.errors import BlkloomError
from blkloom.supervisor import exporting, states
from blkloom.supervisor.group import Group
from blkloom.supervisor.registry import Entry, Registry
from blkloom.supervisor.states import Written
from blkloom.supervisor.store import Store
from blkloom.supervisor.tables import Tables
from blkloom.supervisor.states import save
from blkloom.supervisor.workers import Workers
from blkloom.target.descriptors import open_file

_log = logging.getLogger(__name__)
_CREDENTIALS: Final = struct.Struct("iII")


async def open_here(wish: m.OpenFile) -> int:
    """With the supervisor's own rights, where nobody else is left to ask. Raises OSError."""

    def attempt() -> int:
        if not os.path.isabs(wish.path):
            raise FileNotFoundError(2, "relative to a directory nobody knows any more", wish.path)
        return open_file(wish.path, writable=wish.writable, direct=wish.direct, exclusive=wish.exclusive)

    return await asyncio.to_thread(attempt)


class Adoption:
    """Fills an empty registry."""

    def __init__(self, run_dir: RunDir, registry: Registry, store: Store, workers: Workers, tables: Tables) -> None:
        self._run_dir = run_dir
        self._registry = registry
        self._store = store
        self._workers = workers
        self._tables = tables
        self._written = {written.state.minor: written for written in states.read_all(run_dir)}

    async def run(self) -> None:
        """Everything that can be found is in the registry when this returns."""
        sockets = sorted(self._run_dir.workers.glob("*.sock"))
        await asyncio.gather(*(self._adopt(path) for path in sockets))
        await self._restart_the_rest()
        for entry in self._registry:
            self._understand(entry)
        for entry in self._registry:
            save(self._run_dir, entry)

    async def _adopt(self, path: Path) -> None:
        connected = socket.socket(socket.AF_UNIX)
        try:
            connected.connect(str(path))
        except OSError:
            connected.close()
            path.unlink(missing_ok=True)
            return
        pid, uid, _ = _CREDENTIALS.unpack(
            connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        if uid not in (0, os.geteuid()):
            _log.error("%s belongs to user %d and is left alone", path, uid)
            connected.close()
            return
        try:
            group, described = await self._workers.adopt(path.stem, connected, pid)
        except (OSError, ValueError) as error:
            _log.error("worker %s cannot be adopted: %s", path.stem, error)
            return
        found = msgspec.convert(described["devices"], list[m.DeviceState])
        infos = {info.minor: info for info in msgspec.convert(described["infos"], list[m.DeviceInfo])}
        for state in found:
            entry = self._enter(state, group)
            info = infos[state.minor]
            entry.connections, entry.size, entry.targets = info.connections, info.size, info.targets
            entry.types, entry.deps = info.types, info.deps
        if not found:
            await self._workers.end(group)

    def _enter(self, state: m.DeviceState, group: Group) -> Entry:
        written = self._written.pop(state.minor, None)
        entry = Entry(
            state.name,
            state.minor,
            group,
            uuid=state.uuid,
            read_only=state.read_only,
            active=state.active,
            inactive=state.inactive,
            suspended=state.suspended and state.active is not None,
            event=state.event,
            exports=state.exports,
        )
        if written is not None and written.state.name == state.name:
            entry.restarts, entry.deferred = written.restarts, written.deferred
            if written.suspended_for is not None and state.suspended:
                entry.suspended, entry.suspended_for = False, written.suspended_for
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
        entries = []
        for written in members:
            entry = self._enter(written.state, group)
            entry.failed = written.failed
            entry.restarts, entry.deferred = written.restarts, written.deferred
            entry.suspended, entry.suspended_for = written.state.suspended, written.suspended_for
            entries.append(entry)
        for entry in entries:
            self._understand(entry)
        async with group.lock:
            if lost := [written.state.name for written in members if written.memory and not written.failed]:
                self._workers.fail(group, f"the memory of {', '.join(lost)} went with worker and supervisor")
            elif not any(entry.failed for entry in entries):
                await self._revive(group, entries)

    async def _revive(self, group: Group, entries: list[Entry]) -> None:
        try:
            for entry in entries:
                for export in entry.exports:
                    await exporting.listen(self._store, entry, export)
            await self._workers.restart(group, "it ended while there was no supervisor", opener=open_here)
        except (BlkloomError, OSError) as error:
            self._workers.fail(group, f"could not be started again: {error}")

    def _understand(self, entry: Entry) -> None:
        """What its tables stand on, and how much memory they take."""
        try:
            if entry.active is not None:
                found = self._tables.look(entry.active.table, "table")
                entry.memory_active = found.memory
                self._registry.set_below(entry, active=found.below)
            if entry.inactive is not None:
                found = self._tables.look(entry.inactive.table, "inactive table")
                entry.memory_inactive = found.memory
                self._registry.set_below(entry, inactive=found.below)
        except (OSError, ValueError) as error:
            _log.error("device %r: its table is not understood: %s", entry.name, error)
