"""`error`: fails every request with EIO; a place nobody should touch.

Source: dm-target.c of Linux, the `error` target.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import ClassVar, Self

from typing_extensions import override

from blkloom._engine import Extent
from blkloom.table.arguments import Arguments
from blkloom.target.base import Target
from blkloom.target.opening import Opening
from blkloom.units import Bytes


@dataclass(frozen=True)
class Error(Target):
    """EIO for reads and writes."""

    name: ClassVar[str] = "error"
    summary: ClassVar[str] = "fails every request with EIO"

    @classmethod
    @override
    def parse(cls, arguments: Arguments) -> Self:
        arguments.finish()
        return cls()

    @override
    def map(self, opening: Opening, start: Bytes, length: Bytes) -> list[tuple[Bytes, Bytes, Extent]]:
        return [(Bytes(0), length, Extent.error(errno.EIO))]
