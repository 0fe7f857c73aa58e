"""`pause`: a part of one file or device whose requests wait while it is paused.

Messages: `pause [reads|writes]` and `resume`. It begins as its table says. Requests that wait do not hold up a suspend
or an upgrade of the device. Flushes do not wait: what they cover has been answered.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import ClassVar, Final, Literal

from typing_extensions import override

from blkloom._engine import Extent, SwitchFilter
from blkloom.errors import RetryLater, UsageError
from blkloom.table.syntax import Syntax, Words, options
from blkloom.targets.device_ref import OnDevice, device_ref
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import RETRY, LoadedTarget, Retry
from blkloom.units import Bytes

_CLASSES: Final = ("paused", "paused_reads", "paused_writes")
_RARELY: Final = 3600.0
"""Seconds. `LiveSegment.retry` ends a pause."""


class Pause(OnDevice):
    """A segment that maps to `device`. paused: which requests wait from the start on; "" for none."""

    paused: str = ""

    name: ClassVar[str] = "pause"
    arguments: ClassVar[Syntax] = (
        device_ref("device"),
        options(Words("paused", _CLASSES, " | ".join(_CLASSES).join("[]"))),
    )
    summary: ClassVar[str] = "a piece of a file or device whose requests wait until a message"

    @override
    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        return _LoadedPause(self, context, length)


class _LoadedPause(LoadedTarget):
    spec: Pause
    writes = True

    def __init__(self, spec: Pause, context: LoadContext, length: Bytes) -> None:
        self._filter = SwitchFilter()
        self._segment = context.segment()
        self._saved = context.saved_state()
        extent = Extent.filtered(self._filter, spec.device.extent(context, length), elsewhere=Extent.fault())
        super().__init__(spec, [(Bytes(0), length, extent)])
        former = self._saved.read()
        self._set(spec.paused if former is None else str(former))

    def _set(self, paused: str) -> None:
        self._paused = paused
        reads: Literal["pass", "elsewhere"] = "elsewhere" if paused in ("paused", "paused_reads") else "pass"
        others: Literal["pass", "elsewhere"] = "elsewhere" if paused in ("paused", "paused_writes") else "pass"
        self._filter.set(reads, others)

    @override
    def message(self, words: list[str]) -> None:
        match [word.lower() for word in words]:
            case ["pause"]:
                paused = "paused"
            case ["pause", "reads" | "writes" as those]:
                paused = f"paused_{those}"
            case ["resume"]:
                paused = ""
            case _:
                what = f"Invalid argument: unrecognized message '{' '.join(words)}'"
                raise UsageError(what, cure="pause [reads|writes], resume")
        self._set(paused)
        self._saved.save(paused)
        self._segment.retry()

    @override
    def status(self) -> str:
        return f"{self._paused or 'running'} {self._segment.held}"

    @override
    def read(self, offset: Bytes, length: Bytes) -> Retry:
        return self._wait("paused_reads")

    @override
    def write_lazily(self, offset: Bytes, length: Bytes, fetch: Callable[[], bytes], *, fua: bool) -> Retry:
        return self._wait("paused_writes")

    @override
    def discard(self, offset: Bytes, length: Bytes) -> Retry:
        return self._wait("paused_writes")

    @override
    def write_zeroes(self, offset: Bytes, length: Bytes, *, may_unmap: bool, fast: bool) -> Retry:
        return self._wait("paused_writes")

    def _wait(self, paused: str) -> Retry:
        if self._paused in ("paused", paused):
            raise RetryLater(errno.EIO, "the device is paused", seconds=_RARELY)
        return RETRY  # it was resumed meanwhile
