"""`delay`: a part of one file or device, a time later; others for writes and flushes, if given.

Source: Linux Documentation/admin-guide/device-mapper/delay.rst; dm-delay.c for the form of the status.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import ClassVar, Final

import msgspec
from typing_extensions import override

from blkloom._engine import DelayFilter, Extent
from blkloom.table.arguments import Arguments
from blkloom.table.syntax import Argument, Syntax
from blkloom.targets.device_ref import DeviceRef
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget
from blkloom.targets.spec import TargetSpec
from blkloom.units import Bytes

_MOST: Final = (1 << 32) - 1
_CLASSES: Final = ("delay", "write delay", "flush delay")
"""Of all requests, or of reads; of writes, discards and write-zeroes; of flushes."""


class DelayedRef(msgspec.Struct, frozen=True):
    """A lower device, and how long requests to it wait."""

    ref: DeviceRef
    milliseconds: int


def _read(arguments: Arguments) -> tuple[tuple[DelayedRef, ...]]:
    if arguments.remaining not in (3, 6, 9):
        raise arguments.error(f"Requires exactly 3, 6 or 9 arguments, {arguments.remaining} given")
    classes = _CLASSES[: arguments.remaining // 3]
    return (tuple(DelayedRef(DeviceRef.parse(arguments), arguments.integer(name, most=_MOST)) for name in classes),)


def _write(delayed: tuple[DelayedRef, ...]) -> list[str]:
    return [word for one in delayed for word in (*one.ref.format(), str(one.milliseconds))]


class Delay(TargetSpec):
    """A segment whose requests wait. delayed: of all requests, or of reads, of writes and of flushes; a missing one is
    as the one before.
    """

    delayed: tuple[DelayedRef, ...]

    name: ClassVar[str] = "delay"
    raw: ClassVar[bool] = True
    arguments: ClassVar[Syntax] = (
        Argument(
            "<dev path> <offset> <delay> [<write dev path> <write offset> <write delay> "
            "[<flush dev path> <flush offset> <flush delay>]]",
            ("delayed",),
            _read,
            _write,
            is_path=True,
        ),
    )
    summary: ClassVar[str] = "a piece of a file or device, some milliseconds later"

    @override
    def device_refs(self) -> Sequence[DeviceRef]:
        return [one.ref for one in self.delayed]

    @override
    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        return _LoadedDelay(self, context, length)


class _LoadedDelay(LoadedTarget):
    spec: Delay
    flushes = True
    fua_flushes = False

    def __init__(self, spec: Delay, context: LoadContext, length: Bytes) -> None:
        times = [one.milliseconds / 1000 for one in spec.delayed]
        extents = [one.ref.extent(context, length) for one in spec.delayed]  # also of flushes: the device must exist
        self._filter = DelayFilter(times[0], times[:2][-1])
        self._flush_seconds = times[-1]
        self._flushes = 0
        self.flushes = self._flush_seconds > 0
        super().__init__(spec, [(Bytes(0), length, Extent.filtered(self._filter, extents[0], extents[:2][-1]))])

    @override
    async def flush(self) -> None:
        # The engine has synced the files before.
        self._flushes += 1
        try:
            await asyncio.sleep(self._flush_seconds)
        finally:
            self._flushes -= 1

    @override
    def status(self) -> str:
        reads, writes = self._filter.waiting
        return f"{reads} {writes} {self._flushes}"
