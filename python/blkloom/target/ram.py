"""`ram`: memory, all zeros at first, gone when the device closes.

The memory is a memfd sealed against changing its size, so that no access can meet a missing page
(SIGBUS) and another process may be handed it. Pages that were never written take no memory, and
discarded ones are given back. Source: the dm-ram patch of Mauelshagen (2018): no arguments, the
only line of its table; the options are blkloom's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from typing_extensions import override

from blkloom._engine import Extent
from blkloom.table.arguments import Arguments
from blkloom.target.base import Target
from blkloom.target.opening import Opening
from blkloom.target.options import parse_options
from blkloom.units import Bytes


@dataclass(frozen=True)
class Ram(Target):
    """huge_pages: 2 MiB pages out of the system's pool. preallocate: take all memory at once."""

    huge_pages: bool = False
    preallocate: bool = False

    name: ClassVar[str] = "ram"
    syntax: ClassVar[str] = "[<#opts> [huge_pages] [preallocate]]"
    summary: ClassVar[str] = "memory, zeros at first, gone when the device closes"
    singleton: ClassVar[bool] = True

    @classmethod
    @override
    def parse(cls, arguments: Arguments) -> Self:
        return cls(**parse_options(arguments, ("huge_pages", "preallocate")))

    @override
    def format(self) -> list[str]:
        options = [name for name in ("huge_pages", "preallocate") if getattr(self, name)]
        return [str(len(options)), *options] if options else []

    @override
    def map(self, opening: Opening, start: Bytes, length: Bytes) -> list[tuple[Bytes, Bytes, Extent]]:
        if opening.read_only:
            return [(Bytes(0), length, Extent.zero())]  # what nobody can write stays zeros
        region = opening.region(length, huge_pages=self.huge_pages, preallocate=self.preallocate)
        return [(Bytes(0), length, Extent.memory(region, 0))]
