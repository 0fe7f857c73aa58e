"""`LimitedLog`: the log of one export, which its front-ends cannot fill.

A front-end may connect again and break the protocol again, without an end. Only the first messages of an interval are
logged, and at the end of the interval the number of the others. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from blkloom.control.states import ExportState

MOST: Final = 10
"""Messages of an interval that are logged."""
INTERVAL: Final = 60.0
"""Seconds."""


class LimitedLog:
    """Logs messages that begin with the path of the export's socket."""

    def __init__(self, log: logging.Logger, state: ExportState) -> None:
        self._log = log
        self._state = state
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
            self._log.log(level, f"%s: {text}", self._state.path, *arguments, exc_info=error)

    def error(self, text: str, *arguments: object) -> None:
        """Logs an error."""
        self.log(logging.ERROR, text, *arguments)

    def close(self) -> None:
        """Ends the interval: logs how many messages were left out."""
        if self._interval is not None:
            self._interval.cancel()
        count, self._count, self._interval = self._count, 0, None
        if count > MOST:
            what = "%s: %d more messages about its front-ends in %g s were left out"
            self._log.warning(what, self._state.path, count - MOST, INTERVAL)
