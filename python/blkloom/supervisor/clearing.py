"""Removals that nobody waits for: deferred ones, and devices that go with their last user (autoclear).

A device and its partitions are one in this: the last user of any of them is the last. A worker that dies
takes its clients along, and that is not leaving. On the event loop; errors are logged.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from blkloom.supervisor.registry import Entry, Registry
from blkloom.supervisor.workers import Workers

_log = logging.getLogger(__name__)


class Drop(Protocol):
    """Ends a device whose group's lock is held. Raises OSError, ValueError; it has ended even so."""

    async def __call__(self, entry: Entry, *, fail: bool) -> None:
        """fail: without waiting for requests in flight."""


class Clearing:
    """Of a registry's devices."""

    def __init__(self, registry: Registry, workers: Workers, drop: Drop) -> None:
        self._registry = registry
        self._workers = workers
        self._drop = drop
        self._tasks: set[asyncio.Task[None]] = set()

    def look_at(self, entry: Entry) -> None:
        """Its users changed."""
        whole = self._registry.whole(entry)
        if self._is_due(entry):
            self._begin(entry, [entry])
        elif self._is_over(whole):
            self._begin(whole, self._registry.family(whole))

    def _begin(self, entry: Entry, all_of_it: list[Entry]) -> None:
        task = asyncio.create_task(self._remove(entry, all_of_it), name=f"clear {entry.name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _is_due(self, entry: Entry) -> bool:
        return entry.deferred and not self._registry.open_count(entry)

    def _is_over(self, whole: Entry) -> bool:
        family = self._registry.family(whole)
        opened = any(entry.opened for entry in family)
        return whole.autoclear and opened and not whole.failed and not self._registry.family_count(whole)

    async def _remove(self, entry: Entry, all_of_it: list[Entry]) -> None:
        async with self._workers.locked(*all_of_it):
            if self._registry.get(entry.minor) is not entry:
                return
            if self._is_due(entry):
                going = [entry]
            elif self._is_over(entry):
                going = self._registry.family(entry)
            else:
                return
            for device in going:
                try:
                    await self._drop(device, fail=False)
                except (OSError, ValueError) as error:
                    _log.error("removal of device %r, which nobody uses any more: %s", device.name, error)
