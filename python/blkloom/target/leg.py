"""A leg: `<dev path> <offset>`, the place below that linear, striped and their kin refer to.

The path is a file, a block device (also as `major:minor`, the form in which dmsetup prints tables)
or `blkloom:NAME`, another device of blkloom's. The offset counts sectors. Pure but for `extent`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Self

from blkloom._engine import Extent
from blkloom.table.arguments import Arguments
from blkloom.target.opening import Opening
from blkloom.units import DEVICE_LIMIT, Bytes, Sectors, to_bytes, to_sectors

STACKED: Final = "blkloom:"
"""Paths that begin like this name a device of blkloom's."""


@dataclass(frozen=True, slots=True)
class Leg:
    """From `offset` on in what `path` names."""

    path: str
    offset: Sectors

    @classmethod
    def parse(cls, arguments: Arguments) -> Self:
        """The next two words."""
        return cls(arguments.word("dev path"), arguments.sectors("device sector"))

    def format(self) -> list[str]:
        """The two words."""
        return [self.path, str(self.offset)]

    def extent(self, opening: Opening, length: Bytes) -> Extent:
        """Where the leg's `length` bytes are. Raises TableError where they do not fit below."""
        offset = to_bytes(self.offset)
        if self.path.startswith(STACKED):
            device = opening.device(self.path.removeprefix(STACKED))
            self._check(opening, length, Bytes(device.size))
            return Extent.device(device, offset, read_only=opening.read_only or device.read_only)
        numbers = re.fullmatch(r"[0-9]+:[0-9]+", self.path)
        file = opening.file(f"/dev/block/{self.path}" if numbers else self.path)
        self._check(opening, length, Bytes(file.size))
        return Extent.data(file, offset, read_only=not file.writable)

    def _check(self, opening: Opening, length: Bytes, size: Bytes) -> None:
        if to_bytes(self.offset) + length <= size and to_bytes(self.offset) + length < DEVICE_LIMIT:
            return
        room = max(0, to_sectors(size) - self.offset)
        raise opening.refuse(
            f"device too small for target: start={self.offset}, len={to_sectors(length)}, dev_size={to_sectors(size)}",
            value=self.path,
            cure=f"{room} sectors are there from sector {self.offset} on",
        )
