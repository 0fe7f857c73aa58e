"""A leg: `<dev path> <offset>`, the place below that linear, striped and their kin refer to.

The path is a file, a block device (also as `major:minor`, the form in which dmsetup prints tables)
or another device of blkloom's: `blkloom:NAME`, or the path of its socket in the run directory, where
the name is mangled. The offset counts sectors. Pure but for `extent`.
"""

from __future__ import annotations

import os
import re
from typing import Self

import msgspec

from blkloom._engine import Extent
from blkloom.dm.names import mangle, unmangle
from blkloom.table import Segment, Table
from blkloom.table.arguments import Arguments
from blkloom.table.words import join_words
from blkloom.target.opening import STACKED, Opening
from blkloom.units import DEVICE_LIMIT, Bytes, Sectors, to_bytes, to_sectors


class Leg(msgspec.Struct, frozen=True):
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

    def device_name(self, device_folder: str = "") -> str | None:
        """The device of blkloom's that the leg stands on; None for a file or a block device.

        device_folder: where devices have their sockets; "" where there is no such place.
        """
        if self.path.startswith(STACKED):
            return self.path.removeprefix(STACKED)
        folder, name = os.path.split(os.path.normpath(self.path))
        return unmangle(name) if device_folder and folder == os.path.normpath(device_folder) else None

    def extent(self, opening: Opening, length: Bytes) -> Extent:
        """Where the leg's `length` bytes are. Raises TableError where they do not fit below."""
        offset = to_bytes(self.offset)
        if (name := self.device_name(opening.device_folder)) is not None:
            device = opening.device(name)
            self._check(opening, length, Bytes(device.size))
            return Extent.device(device, offset, read_only=opening.read_only)
        numbers = re.fullmatch(r"[0-9]+:[0-9]+", self.path)
        file = opening.file(f"/dev/block/{self.path}" if numbers else self.path)
        if not opening.restored:  # of what was cut off since, each request fails by itself
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


def rename_legs(table: Table, old: str, new: str, *, device_folder: str = "") -> str:
    """The table's text once the device `old`, which it may stand on, is called `new`."""
    return "\n".join(_renamed(segment, old, new, device_folder) for segment in table.segments)


def _renamed(segment: Segment, old: str, new: str, device_folder: str) -> str:
    paths: dict[str, str] = {}
    for leg in segment.target.legs():
        if leg.device_name(device_folder) == old:
            by_name = leg.path.startswith(STACKED)
            paths[leg.path] = STACKED + new if by_name else os.path.join(os.path.dirname(leg.path), mangle(new))
    words = [paths.get(word, word) for word in segment.target.format()]
    head = f"{segment.start} {segment.length} {segment.target.name}"
    return f"{head} {join_words(words, segment.place)}".rstrip()
