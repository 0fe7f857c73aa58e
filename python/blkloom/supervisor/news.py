"""Waiting for changes of a device. On the event loop."""

from __future__ import annotations

import asyncio

from blkloom.supervisor.registry import Entry


class News:
    """Who waits for which device."""

    def __init__(self) -> None:
        self._waiting: dict[int, asyncio.Future[None]] = {}

    def next(self, entry: Entry) -> asyncio.Future[None]:
        """Done at the device's next change, also its removal."""
        waiting = self._waiting.get(entry.minor)
        if waiting is None or waiting.done():
            waiting = self._waiting[entry.minor] = asyncio.get_running_loop().create_future()
        return waiting

    def changed(self, entry: Entry) -> None:
        """The device changed."""
        if (waiting := self._waiting.pop(entry.minor, None)) is not None and not waiting.done():
            waiting.set_result(None)
