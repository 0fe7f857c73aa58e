"""Time-outs of a kernel NBD device: how long its requests may take, and when a worker acts before the kernel does.

The kernel fixes the time-out of a request when it sends it. After a worker was killed, a request waits for that long
before it is sent to the next worker, so it should be short. A request that is not answered in time is sent again
through another socket, while the first one may still be executed. Therefore the worker acts when a request is half as
old as that: see `export_server`. Requests that are slow because of storage or of a delay get longer time-outs for a
while; those that wait at a suspended device do not. Pure; times in seconds.
"""

from __future__ import annotations

from typing import Final

_STEPS: Final = 8
"""Looks in one time-out."""
_MOST_FACTOR: Final = 8
_CALM: Final = 4
"""Time-outs without an old request until the time-out is as at first."""


class Timeouts:
    """The present time-out of one device. base: the shortest one. now: of any clock that only advances."""

    def __init__(self, base: int, now: float) -> None:
        self.base = base
        self.request = base
        """The time-out of requests that the kernel sends now."""
        self._turns = (now, now)
        """The last two times at which no old request was left."""
        self._slow_at = now
        self._carried: list[float] = []
        """When requests that are served again may have begun, for as many turns as they may last."""

    @property
    def oldest(self) -> float:
        """A time after which all requests in flight have begun."""
        return min([self._turns[0], *self._carried])

    @property
    def pause(self) -> float:
        """Between two looks."""
        return self.base / _STEPS

    @property
    def short(self) -> float:
        """An interruption of this length makes no request too old that was not old before."""
        return self.base / 4

    def none_old(self, now: float) -> bool:
        """Notes that all requests have ended that began before the last call. Returns whether the time-out should be
        as at first again.
        """
        self._turns = (self._turns[1], now)
        del self._carried[:1]
        return self.request > self.base and now - self._slow_at >= _CALM * self.request

    def is_due(self, now: float) -> bool:
        """Whether an old request that has not ended may soon exceed the shortest time-out in use."""
        return now - self.oldest >= self.request / 2 - self.pause

    def restarted(self, now: float, oldest: float | None = None) -> None:
        """Notes that all connections are served anew. oldest: those requests that waited, and are served again, began
        after this time.
        """
        self._turns = (now, now)
        self._carried = [] if oldest is None else [oldest, oldest]  # the first turn makes them old, the second ends it

    def slower(self, now: float) -> None:
        """Doubles the time-out, because requests took that long."""
        self.request = min(2 * self.request, _MOST_FACTOR * self.base)
        self._slow_at = now

    def calm(self) -> None:
        """Returns to the time-out of the beginning."""
        self.request = self.base
