"""Log messages about refused clients: one when refusing begins and one when it ends, for any number of clients."""

from __future__ import annotations

import logging


class Burst:
    """Logs once that clients are refused, and at the end how many."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._count = 0

    def refused(self, reason: str) -> None:
        """Counts a refused client."""
        if not self._count:
            self._log.warning("clients are refused: %s", reason)
        self._count += 1

    def over(self) -> None:
        """Ends the burst: clients are accepted again."""
        if self._count:
            self._log.warning("clients are taken again; %d were refused", self._count)
        self._count = 0
