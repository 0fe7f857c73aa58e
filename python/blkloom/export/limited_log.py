"""`LimitedLog`: a log that clients cannot fill.

A client may connect again and break the protocol again, without an end. Only the first messages of an interval are
logged, and at the end of the interval the number of the others. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

MOST: Final = 10
"""Messages of an interval that are logged."""
INTERVAL: Final = 60.0
"""Seconds."""


class LimitedLog:
    """Logs messages. where: their beginning, and the plural of those they are about."""

    def __init__(self, log: logging.Logger, where: Callable[[], str], about: str) -> None:
        self._log = log
        self._where = where
        self._about = about
        self._count = 0
        self._interval: asyncio.TimerHandle | None = None
        """Ends the present interval."""

    def log(self, level: int, text: str, *arguments: object, error: BaseException | None = None) -> None:
        """Logs a message, as `Logger.log` does, or only counts it. error: its traceback is logged, too."""
        if not self._log.isEnabledFor(level):
            return
        if self._interval is None:
            self._interval = asyncio.get_running_loop().call_later(INTERVAL, self.close)
        self._count += 1
        if self._count <= MOST:
            self._log.log(level, f"%s: {text}", self._where(), *arguments, exc_info=error)

    def error(self, text: str, *arguments: object) -> None:
        """Logs an error."""
        self.log(logging.ERROR, text, *arguments)

    def close(self) -> None:
        """Ends the interval: logs how many messages were left out."""
        if self._interval is not None:
            self._interval.cancel()
        count, self._count, self._interval = self._count, 0, None
        if count > MOST:
            what = "%s: %d more messages about its %s in %g s were left out"
            self._log.warning(what, self._where(), count - MOST, self._about, INTERVAL)
