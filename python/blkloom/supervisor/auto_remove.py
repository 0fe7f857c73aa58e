"""Automatic removal of devices after their last user has left: deferred removals, and autoclear.

A loop device and its partitions count as one: it is removed when none of them has a user left. When a worker dies, its
clients are disconnected; this does not count as leaving. Runs on the event loop. Errors are logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Protocol

from blkloom.attach.registry import way
from blkloom.supervisor.registry import Entry, Registry
from blkloom.supervisor.workers import Workers

_log = logging.getLogger(__name__)


class Drop(Protocol):
    """Removes a device. The caller holds the lock of its group. If it raises OSError or ValueError, the device is
    removed all the same.
    """

    async def __call__(self, entry: Entry, *, fail: bool) -> None:
        """fail: do not wait for requests in flight."""


class AutoRemove:
    """Removes the unused devices of a registry."""

    def __init__(self, registry: Registry, workers: Workers, drop: Drop) -> None:
        self._registry = registry
        self._workers = workers
        self._drop = drop
        self._tasks: dict[asyncio.Task[None], Entry] = {}

    def look_at(self, entry: Entry) -> None:
        """Starts the removal that is due, if any. Call it after the users of the device have changed."""
        whole = self._registry.whole(entry)
        if self._is_due(entry):
            self._begin(entry, [entry])
        elif self._is_over(whole):
            self._begin(whole, self._registry.family(whole))

    def _begin(self, entry: Entry, all_of_it: list[Entry]) -> None:
        task = asyncio.create_task(self._remove(entry, all_of_it), name=f"auto-remove {entry.name}")
        self._tasks[task] = entry
        task.add_done_callback(self._tasks.pop)

    async def settled(self, entries: Sequence[Entry], *, timeout: float) -> None:
        """Waits until the removals of these devices that have begun have ended, at most `timeout` seconds. The removal
        of a device may begin that of one below it.
        """
        minors = {entry.minor for entry in entries}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while under_way := [
                    task for task, entry in self._tasks.items() if entry.minor in minors and not task.done()
                ]:
                    await asyncio.wait(under_way)

    def _is_due(self, entry: Entry) -> bool:
        return entry.deferred and not self._registry.open_count(entry) and (entry.node is None or entry.node.lazy)

    def _is_over(self, whole: Entry) -> bool:
        family = self._registry.family(whole)
        opened = any(entry.opened for entry in family)
        nodes = [entry.node for entry in family if entry.node is not None]
        if any(way(node.via).is_block_device for node in nodes):  # `AutoDetach` detaches it first
            return False
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
                    _log.error("automatic removal of device '%s': %s", device.name, error)
