"""Futures for the next change of a device. Runs on the event loop."""

from __future__ import annotations

import asyncio

from blkloom.supervisor.registry import Entry


class ChangeNotifier:
    """Wakes the tasks that wait for a change of a device."""

    def __init__(self) -> None:
        self._waiting: dict[int, asyncio.Future[None]] = {}

    def next(self, entry: Entry) -> asyncio.Future[None]:
        """A future that is done at the next change of the device. Its removal is a change too."""
        waiting = self._waiting.get(entry.minor)
        if waiting is None or waiting.done():
            waiting = self._waiting[entry.minor] = asyncio.get_running_loop().create_future()
        return waiting

    def changed(self, entry: Entry) -> None:
        """Wakes all that wait for this device."""
        if (waiting := self._waiting.pop(entry.minor, None)) is not None and not waiting.done():
            waiting.set_result(None)
