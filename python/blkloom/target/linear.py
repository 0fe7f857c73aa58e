"""`linear`: a piece of one file, block device or blkloom device.

Source: Linux Documentation/admin-guide/device-mapper/linear.rst.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from typing_extensions import override

from blkloom._engine import Extent
from blkloom.table.arguments import Arguments
from blkloom.target.base import Target
from blkloom.target.leg import Leg
from blkloom.target.opening import Opening
from blkloom.units import Bytes


@dataclass(frozen=True)
class Linear(Target):
    """The segment is `leg`, byte for byte."""

    leg: Leg

    name: ClassVar[str] = "linear"
    syntax: ClassVar[str] = "<dev path> <offset>"
    summary: ClassVar[str] = "a piece of a file, block device or blkloom device (offset in sectors)"

    @classmethod
    @override
    def parse(cls, arguments: Arguments) -> Self:
        leg = Leg.parse(arguments)
        arguments.finish()
        return cls(leg)

    @override
    def format(self) -> list[str]:
        return self.leg.format()

    @override
    def legs(self) -> Sequence[Leg]:
        return (self.leg,)

    @override
    def map(self, opening: Opening, start: Bytes, length: Bytes) -> list[tuple[Bytes, Bytes, Extent]]:
        return [(Bytes(0), length, self.leg.extent(opening, length))]
