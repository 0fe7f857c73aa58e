"""A segment as it is loaded: how a target changes what it mapped without a fault having asked for it.

A target gets it in `map` and keeps it. Any thread may use it, the mapper's only what does not drain the device;
after the table has gone it does nothing any more.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blkloom.device.device import Device
    from blkloom.target.base import Mapped


class LiveSegment:
    """Of `device` (None: of no device, for who only looks), whose faults name it `owner`."""

    def __init__(self, device: Device | None, owner: int) -> None:
        self._device = device
        self._owner = owner

    def remap(
        self, mapped: Mapped, *, drained: Callable[[], None] = lambda: None, timeout: float | None = None
    ) -> bool:
        """Puts `mapped` in place of what the target mapped: new requests wait, those in flight end, `drained` is
        called, and the device goes on. Returns False if the table has gone. Raises DrainError after
        `timeout` seconds, and what `drained` raises; then nothing has changed. Nothing is flushed.
        """
        return self._device is not None and self._device.remap(self._owner, mapped, drained=drained, timeout=timeout)

    def stopped(self) -> AbstractContextManager[None]:
        """While it is entered nothing is in flight and new requests wait; what is remapped meanwhile, of whatever
        segment of the device, holds for all of them at once.
        """
        return nullcontext() if self._device is None else self._device.stopped()

    @property
    def changes(self) -> int:
        """How many requests that change data the device has done so far."""
        if self._device is None:
            return 0
        stats = self._device.stats()
        return sum(int(stats[name]["count"]) for name in ("write", "discard", "write_zeroes"))

    def event(self, what: str) -> None:
        """Something happened that its users should know: `wait` wakes them, and the log says what."""
        if self._device is not None:
            self._device.tell(what)

    def note_failed_syncs(self) -> None:
        """A target has synced a file of its by itself, and that may have failed. Not from a handler, which the mapper
        does this for.
        """
        if self._device is not None:
            self._device.note_failed_syncs()

    @property
    def held(self) -> int:
        """How many requests of the device wait because a handler raised LaterError."""
        return 0 if self._device is None else self._device.held

    def retry(self) -> None:
        """What waits because of LaterError is asked for again now."""
        if self._device is not None:
            self._device.retry_held()

    def has_work(self) -> None:
        """The target's `work` is to be called, again and again until it returns False."""
        if self._device is not None:
            self._device.has_work(self._owner)

    def synchronize(self) -> None:
        """Waits until no request is in flight that looked the map up before. The mapper's thread may call it."""
        if self._device is not None:
            self._device.synchronize()
