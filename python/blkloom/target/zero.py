"""`zero`: reads as zeros, swallows writes. The smallest target: the one to copy.

Source: Linux Documentation/admin-guide/device-mapper/zero.rst.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from typing_extensions import override

from blkloom._engine import Extent
from blkloom.table.arguments import Arguments
from blkloom.target.base import Target
from blkloom.target.opening import Opening
from blkloom.units import Bytes


@dataclass(frozen=True)
class Zero(Target):
    """Zeros without end."""

    name: ClassVar[str] = "zero"
    summary: ClassVar[str] = "reads as zeros, swallows writes"

    @classmethod
    @override
    def parse(cls, arguments: Arguments) -> Self:
        arguments.finish()
        return cls()

    @override
    def map(self, opening: Opening, start: Bytes, length: Bytes) -> list[tuple[Bytes, Bytes, Extent]]:
        return [(Bytes(0), length, Extent.zero(discard_writes=not opening.read_only))]
