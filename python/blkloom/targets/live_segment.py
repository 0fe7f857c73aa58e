"""A loaded segment: lets a target change its map outside of a fault.

A target gets it from `LoadContext.segment` and keeps it. Any thread may use it, but the mapper's thread must not call
the methods that drain the device. After the table was replaced or closed, it does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blkloom.device.device import Device
    from blkloom.targets.loaded import Mapped


class LiveSegment:
    """The segment with the number `owner` of `device` (None: the table is loaded without a device)."""

    def __init__(self, device: Device | None, owner: int) -> None:
        self._device = device
        self._owner = owner

    def remap(
        self, mapped: Mapped, *, drained: Callable[[], None] = lambda: None, timeout: float | None = None
    ) -> bool:
        """Replaces the target's map by `mapped`: new requests wait, requests in flight end, `drained` is called, I/O
        continues. Returns False if the table is not loaded any more. Raises DrainError after `timeout` seconds, and
        any exception of `drained`; then nothing has changed. Does not flush.
        """
        return self._device is not None and self._device.remap(self._owner, mapped, drained=drained, timeout=timeout)

    def stopped(self) -> AbstractContextManager[None]:
        """Stops the device's I/O inside the `with` block: no request is in flight, and new requests wait. All `remap`
        calls in the block, for any segment of the device, take effect together.
        """
        return nullcontext() if self._device is None else self._device.stopped()

    @property
    def changes(self) -> int:
        """The number of requests completed by the device that change data."""
        if self._device is None:
            return 0
        stats = self._device.stats()
        return sum(int(stats[name]["count"]) for name in ("write", "discard", "write_zeroes"))

    def event(self, what: str) -> None:
        """Reports an event of the device: wakes `wait`, and writes `what` to the log."""
        if self._device is not None:
            self._device.tell(what)

    def note_failed_syncs(self) -> None:
        """Checks the device's files for failed syncs, after a target has synced a file itself. Not needed in a handler:
        the mapper does it after each one.
        """
        if self._device is not None:
            self._device.note_failed_syncs()

    @property
    def held(self) -> int:
        """The number of requests of the device that wait because a handler raised RetryLater."""
        return 0 if self._device is None else self._device.deferred

    def retry(self) -> None:
        """Retries now the requests that wait because of RetryLater."""
        if self._device is not None:
            self._device.retry_deferred()

    def has_work(self) -> None:
        """Schedules the target's `work`, which is called again until it returns False."""
        if self._device is not None:
            self._device.has_work(self._owner)

    def synchronize(self) -> None:
        """Waits for the requests that looked up the map before this call. The mapper's thread may call it."""
        if self._device is not None:
            self._device.synchronize()
