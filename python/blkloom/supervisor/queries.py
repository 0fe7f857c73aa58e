"""Read-only verbs: info, table, status, files, wait, stats. They hold no lock. Runs on the event loop."""

from __future__ import annotations

import asyncio
import errno
from typing import Any, Final

import msgspec

from blkloom.attach.registry import way
from blkloom.control import messages as m
from blkloom.control.states import DeviceInfo
from blkloom.errors import UsageError, WorkerGone, WorkerStuck
from blkloom.supervisor.change_notifier import ChangeNotifier
from blkloom.supervisor.group import Group
from blkloom.supervisor.registry import Entry, Registry
from blkloom.supervisor.tables import Tables

_STATS_SECONDS: Final = 5.0
"""How long a worker may take to tell its counters: `top` and `stats` show the other devices then."""


class Queries:
    """Answers queries from the registry and from the workers."""

    def __init__(self, registry: Registry, tables: Tables, changes: ChangeNotifier) -> None:
        self._registry = registry
        self._tables = tables
        self._changes = changes

    def info(self, call: m.GetInfo) -> list[DeviceInfo]:
        """States of one device, or of all devices if the call names none. A node that is in use counts as one user."""
        if call.device:
            infos = [self._registry.info(self._registry.find(call.device))]
        else:
            infos = [self._registry.info(entry) for entry in self._registry if not entry.making]
        for info in infos:
            if info.node is not None and info.node.path:
                used_by = way(info.node.via).holders(info.node)
                info.node = msgspec.structs.replace(info.node, used_by=used_by)
                info.open_count += bool(used_by)
        return infos

    def table(self, call: m.GetTable) -> str:
        """The text of the live or inactive table; "" if that slot is empty."""
        entry = self._registry.find(call.device)
        loaded = entry.inactive if call.inactive else entry.active
        return self._tables.shown(loaded.table) if loaded else ""

    async def status(self, call: m.GetStatus) -> Any:
        """One status line for each segment."""
        entry = self._registry.find(call.device)
        if entry.failed:
            size = max(1, entry.size // 512)
            return [[0, size, "failed", entry.failed]]
        return await _ask(entry, m.WorkerStatus(minor=entry.minor))

    async def files(self, call: m.GetFiles) -> Any:
        """The files of the live table."""
        entry = self._registry.find(call.device)
        return [] if entry.failed else await _ask(entry, m.WorkerFiles(minor=entry.minor))

    async def wait(self, call: m.Wait) -> int:
        """Waits until the event number is above `call.event`, and returns it."""
        entry = self._registry.find(call.device)
        known = entry.event if call.event is None else call.event
        while entry.event <= known:
            await asyncio.wait([self._changes.next(entry)])
            if self._registry.get(entry.minor) is not entry:
                raise UsageError(f"Device {call.device} not found: it was removed", errno=errno.ENXIO)
        return entry.event

    async def stats(self, call: m.GetStats) -> dict[str, Any]:
        """Counters by device name. A device without a worker that answers has no counters."""
        entries = [self._registry.find(call.device)] if call.device else list(self._registry)
        groups = {entry.group.id: entry.group for entry in entries if entry.group.link is not None}

        async def ask(group: Group) -> dict[str, Any]:
            try:
                return dict(await group.call(m.WorkerStats(), answer=_STATS_SECONDS))
            except (WorkerGone, WorkerStuck):
                return {}

        found: dict[str, Any] = {}
        for answer in await asyncio.gather(*map(ask, groups.values())):
            found |= answer
        return {entry.name: found[str(entry.minor)] for entry in entries if str(entry.minor) in found}


async def _ask(entry: Entry, call: m.WorkerStatus | m.WorkerFiles) -> Any:
    """Asks the device's worker. Returns [] for a device without a live table."""
    while entry.active:
        group = entry.group
        try:
            return await group.call(call)
        except WorkerGone:
            if entry.group is group:  # the device was not handed over meanwhile
                raise
    return []
