"""`striped`: distributes chunks over several devices in turn (RAID 0).

The rules are those of the kernel's dm-stripe.c: any chunk size, a power of two or not; the length
a multiple of the number of stripes, and the share of each stripe a multiple of the chunk.
Source: Linux Documentation/admin-guide/device-mapper/striped.rst; stripe_status for the form of the status.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from typing_extensions import override

from blkloom._engine import Extent
from blkloom.table.arguments import Arguments
from blkloom.table.syntax import Argument, Syntax
from blkloom.targets.device_ref import DeviceRef
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget
from blkloom.targets.spec import TargetSpec
from blkloom.units import Bytes, Sectors, to_bytes, to_sectors

_MOST: Final = (1 << 32) - 1
"""Stripe count and chunk size are 32-bit numbers in the kernel."""


def _read(arguments: Arguments) -> tuple[Sectors, tuple[DeviceRef, ...]]:
    stripes = arguments.integer("stripe count", least=1, most=_MOST)
    if arguments.remaining != 1 + 2 * stripes:
        given = max(0, arguments.remaining - 1)
        raise arguments.error(
            f"Not enough destinations specified: {stripes} stripes need {2 * stripes} words, {given} given"
            if given < 2 * stripes
            else f"Invalid argument count: {stripes} stripes need {2 * stripes} words, {given} given",
            value=str(stripes),
        )
    chunk = Sectors(arguments.integer("chunk_size", least=1, most=_MOST))
    return chunk, tuple(DeviceRef.parse(arguments) for _ in range(stripes))


def _write(chunk: Sectors, stripes: tuple[DeviceRef, ...]) -> list[str]:
    return [str(len(stripes)), str(chunk), *(word for ref in stripes for word in ref.format())]


class Striped(TargetSpec):
    """A segment in which chunk i is chunk i // n of stripe i % n."""

    chunk: Sectors
    stripes: tuple[DeviceRef, ...]

    name: ClassVar[str] = "striped"
    raw: ClassVar[bool] = True
    arguments: ClassVar[Syntax] = (
        Argument("<num devs> <chunk size> [<dev path> <offset>]+", ("chunk", "stripes"), _read, _write),
    )
    summary: ClassVar[str] = "chunks dealt out to several files or devices in turn (sizes in sectors)"

    @override
    def device_refs(self) -> Sequence[DeviceRef]:
        return self.stripes

    @override
    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        sectors, stripes = to_sectors(length), len(self.stripes)
        if sectors % stripes:
            raise context.refuse(
                "Target length not divisible by number of stripes",
                value=str(sectors),
                cure=self._nearest(sectors),
            )
        if sectors // stripes % self.chunk:
            raise context.refuse(
                "Target length not divisible by chunk size",
                value=str(sectors),
                cure=self._nearest(sectors),
            )
        share = Bytes(length // stripes)
        parts = [ref.extent(context, share) for ref in self.stripes]
        extent = parts[0] if stripes == 1 else Extent.stripes(to_bytes(self.chunk), parts)
        return _LoadedStriped(self, [(Bytes(0), length, extent)])

    def _nearest(self, sectors: int) -> str:
        row = self.chunk * len(self.stripes)
        below = sectors // row * row
        return f"make it {below} or {below + row} sectors" if below else f"make it {row} sectors"


class _LoadedStriped(LoadedTarget):
    spec: Striped

    @override
    def status(self) -> str:
        # A for alive: an error of a device fails the request, and the device stays in use.
        stripes = self.spec.stripes
        return " ".join([str(len(stripes)), *(ref.path for ref in stripes), "1", "A" * len(stripes)])
