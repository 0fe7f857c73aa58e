"""Refused clients in the log: a line when it begins and one when it is over, however many there are."""

from __future__ import annotations

import logging


class Burst:
    """Says once that clients are being refused, and once how many it were when that is over."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._count = 0

    def refused(self, reason: str) -> None:
        """One more, for `reason`."""
        if not self._count:
            self._log.warning("clients are refused: %s", reason)
        self._count += 1

    def over(self) -> None:
        """There is room again."""
        if self._count:
            self._log.warning("clients are taken again; %d were refused", self._count)
        self._count = 0
