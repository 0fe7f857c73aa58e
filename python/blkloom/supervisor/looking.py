"""What can be known of devices: these verbs change nothing and hold no lock. On the event loop."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

from blkloom.control import messages as m
from blkloom.control.states import DeviceInfo
from blkloom.errors import UsageError, WorkerGone, WorkerStuck
from blkloom.supervisor.group import Group
from blkloom.supervisor.news import News
from blkloom.supervisor.registry import Entry, Registry
from blkloom.supervisor.tables import Tables


class Looking:
    """At a registry and its workers."""

    def __init__(self, registry: Registry, tables: Tables, news: News) -> None:
        self._registry = registry
        self._tables = tables
        self._news = news

    def info(self, call: m.GetInfo) -> list[DeviceInfo]:
        """Of one, or of all."""
        if call.device:
            return [self._registry.info(self._registry.find(call.device))]
        return [self._registry.info(entry) for entry in self._registry if not entry.making]

    def table(self, call: m.GetTable) -> str:
        """As it is shown; "" for an empty slot."""
        entry = self._registry.find(call.device)
        loaded = entry.inactive if call.inactive else entry.active
        return self._tables.shown(loaded.table) if loaded else ""

    async def status(self, call: m.GetStatus) -> Any:
        """A line a segment."""
        entry = self._registry.find(call.device)
        if entry.failed:
            size = max(1, entry.size // 512)
            return [[0, size, "failed", entry.failed]]
        return await _ask(entry, m.WorkerStatus(minor=entry.minor))

    async def files(self, call: m.GetFiles) -> Any:
        """Those of the live table."""
        entry = self._registry.find(call.device)
        return [] if entry.failed else await _ask(entry, m.WorkerFiles(minor=entry.minor))

    async def wait(self, call: m.Wait) -> int:
        """The event number, once it is above `call.event`."""
        entry = self._registry.find(call.device)
        known = entry.event if call.event is None else call.event
        while entry.event <= known:
            await asyncio.wait([self._news.next(entry)])
            if self._registry.get(entry.minor) is not entry:
                raise UsageError(f"Device {call.device} not found: it was removed", errno=errno.ENXIO)
        return entry.event

    async def stats(self, call: m.GetStats) -> dict[str, Any]:
        """Counters by name. A device without a worker has none."""
        entries = [self._registry.find(call.device)] if call.device else list(self._registry)
        groups = {entry.group.id: entry.group for entry in entries if entry.group.link is not None}

        async def ask(group: Group) -> dict[str, Any]:
            try:
                return dict(await group.call(m.WorkerStats()))
            except (WorkerGone, WorkerStuck):
                return {}

        found: dict[str, Any] = {}
        for answer in await asyncio.gather(*map(ask, groups.values())):
            found |= answer
        return {entry.name: found[str(entry.minor)] for entry in entries if str(entry.minor) in found}


async def _ask(entry: Entry, call: m.WorkerStatus | m.WorkerFiles) -> Any:
    """The answer of the device's worker; [] of a device without a live table."""
    while entry.active:
        group = entry.group
        try:
            return await group.call(call)
        except WorkerGone:
            if entry.group is group:  # and not handed over meanwhile
                raise
    return []
