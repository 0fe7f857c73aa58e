"""`striped`: chunks dealt out to several legs in turn (RAID 0).

The rules are those of the kernel's dm-stripe.c: any chunk size, a power of two or not; the length
a multiple of the number of stripes, and each leg's share a multiple of the chunk.
Source: Linux Documentation/admin-guide/device-mapper/striped.rst; the status is that of stripe_status.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from typing_extensions import override

from blkloom._engine import Extent
from blkloom.table.arguments import Arguments
from blkloom.target.base import Target
from blkloom.target.leg import Leg
from blkloom.target.opening import Opening
from blkloom.units import Bytes, Sectors, to_bytes, to_sectors

_MOST: Final = (1 << 32) - 1
"""Stripe count and chunk size are 32-bit numbers in the kernel."""


@dataclass(frozen=True)
class Striped(Target):
    """Chunk i of the segment is chunk i // n of stripe i % n."""

    chunk: Sectors
    stripes: tuple[Leg, ...]

    name: ClassVar[str] = "striped"
    syntax: ClassVar[str] = "<num devs> <chunk size> [<dev path> <offset>]+"
    summary: ClassVar[str] = "chunks dealt out to several files or devices in turn (sizes in sectors)"

    @classmethod
    @override
    def parse(cls, arguments: Arguments) -> Self:
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
        legs = tuple(Leg.parse(arguments) for _ in range(stripes))
        arguments.finish()
        return cls(chunk, legs)

    @override
    def legs(self) -> Sequence[Leg]:
        return self.stripes

    @override
    def status(self) -> str:
        # A for alive: an error of a leg goes to whoever asked, and leaves it in use.
        return " ".join([str(len(self.stripes)), *(leg.path for leg in self.stripes), "1", "A" * len(self.stripes)])

    @override
    def format(self) -> list[str]:
        return [str(len(self.stripes)), str(self.chunk), *(word for leg in self.stripes for word in leg.format())]

    @override
    def map(self, opening: Opening, start: Bytes, length: Bytes) -> list[tuple[Bytes, Bytes, Extent]]:
        sectors, stripes = to_sectors(length), len(self.stripes)
        if sectors % stripes:
            raise opening.refuse(
                "Target length not divisible by number of stripes",
                value=str(sectors),
                cure=self._nearest(sectors),
            )
        if sectors // stripes % self.chunk:
            raise opening.refuse(
                "Target length not divisible by chunk size",
                value=str(sectors),
                cure=self._nearest(sectors),
            )
        share = Bytes(length // stripes)
        legs = [leg.extent(opening, share) for leg in self.stripes]
        return [(Bytes(0), length, legs[0] if stripes == 1 else Extent.stripes(to_bytes(self.chunk), legs))]

    def _nearest(self, sectors: int) -> str:
        row = self.chunk * len(self.stripes)
        below = sectors // row * row
        return f"make it {below} or {below + row} sectors" if below else f"make it {row} sectors"
