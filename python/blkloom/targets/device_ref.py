"""A reference to a lower device: `<dev path> <offset>`, of linear, striped and similar targets.

The path is a file, a block device (also as `major:minor`, the form in which dmsetup prints tables)
or another blkloom device: `blkloom:NAME`, or the path of its socket in the run directory, where
the name is mangled. The offset counts sectors. Only `extent` does I/O.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Self

import msgspec

from blkloom._engine import Extent, File
from blkloom.device_names import STACKED, mangle, unmangle
from blkloom.table import Segment, Table
from blkloom.table.arguments import Arguments
from blkloom.table.syntax import Argument
from blkloom.table.words import join_words
from blkloom.targets.load_context import LoadContext
from blkloom.targets.spec import TargetSpec
from blkloom.units import DEVICE_LIMIT, Bytes, Sectors, to_bytes, to_sectors


class DeviceRef(msgspec.Struct, frozen=True):
    """A lower device or file, from `offset` on."""

    path: str
    offset: Sectors

    @classmethod
    def parse(cls, arguments: Arguments) -> Self:
        """Takes the path and the offset from the arguments."""
        return cls(arguments.word("dev path"), arguments.sectors("device sector"))

    def format(self) -> list[str]:
        """The path and the offset as words."""
        return [self.path, str(self.offset)]

    def device_name(self, device_folder: str = "") -> str | None:
        """The name of the blkloom device; None for a file or a block device.

        device_folder: the directory of the devices' sockets; "" if there is none.
        """
        if self.path.startswith(STACKED):
            return self.path.removeprefix(STACKED)
        folder, name = os.path.split(os.path.normpath(self.path))
        return unmangle(name) if device_folder and folder == os.path.normpath(device_folder) else None

    def size(self, context: LoadContext) -> Bytes:
        """Bytes from `offset` to the end of the lower device. Raises TableError, BackingError."""
        name = self.device_name(context.device_folder)
        size = context.device(name).size if name is not None else self._file(context).size
        return Bytes(max(0, size - to_bytes(self.offset)))

    def extent(self, context: LoadContext, length: Bytes, *, read_only: bool = False) -> Extent:
        """The extent of `length` bytes from `offset` on. read_only: not for writing, whatever the load is. Raises
        TableError if the lower device is too small.
        """
        offset = to_bytes(self.offset)
        if (name := self.device_name(context.device_folder)) is not None:
            device = context.device(name)
            self._check(context, length, Bytes(device.size))
            return Extent.device(device, offset, read_only=read_only or context.read_only)
        file = self._file(context, read_only=read_only)
        if not context.restored:  # requests for a part that was truncated since fail one by one
            self._check(context, length, Bytes(file.size))
        return Extent.data(file, offset, read_only=not file.writable)

    def _file(self, context: LoadContext, *, read_only: bool = False) -> File:
        numbers = re.fullmatch(r"[0-9]+:[0-9]+", self.path)
        return context.file(f"/dev/block/{self.path}" if numbers else self.path, read_only=read_only)

    def _check(self, context: LoadContext, length: Bytes, size: Bytes) -> None:
        if to_bytes(self.offset) + length <= size and to_bytes(self.offset) + length < DEVICE_LIMIT:
            return
        room = max(0, to_sectors(size) - self.offset)
        raise context.refuse(
            f"device too small for target: start={self.offset}, len={to_sectors(length)}, dev_size={to_sectors(size)}",
            value=self.path,
            cure=f"{room} sectors are there from sector {self.offset} on",
        )


class OnDevice(TargetSpec):
    """Base class of targets on one lower device."""

    device: DeviceRef

    def device_refs(self) -> Sequence[DeviceRef]:
        """The lower device."""
        return (self.device,)


def device_ref(field: str) -> Argument:
    """`<dev path> <offset>`, as an argument of a target."""
    return Argument(
        "<dev path> <offset>",
        (field,),
        lambda arguments: (DeviceRef.parse(arguments),),
        DeviceRef.format,
        is_path=True,
    )


def whole_device(field: str, name: str) -> Argument:
    """`<name>`: the path of a lower device or file, from its start on."""
    return Argument(
        f"<{name}>",
        (field,),
        lambda arguments: (DeviceRef(arguments.word(name), Sectors(0)),),
        lambda ref: (ref.path,),
        is_path=True,
    )


def rename_device_refs(table: Table, old: str, new: str, *, device_folder: str = "") -> str:
    """Renames the lower device `old` to `new` in the text of a table."""
    return "\n".join(_renamed(segment, old, new, device_folder) for segment in table.segments)


def _renamed(segment: Segment, old: str, new: str, device_folder: str) -> str:
    paths: dict[str, str] = {}
    for ref in segment.target.device_refs():
        if ref.device_name(device_folder) == old:
            by_name = ref.path.startswith(STACKED)
            paths[ref.path] = STACKED + new if by_name else os.path.join(os.path.dirname(ref.path), mangle(new))
    words = [paths.get(word, word) for word in segment.target.format()]
    head = f"{segment.start} {segment.length} {segment.target.name}"
    return f"{head} {join_words(words, segment.place)}".rstrip()
