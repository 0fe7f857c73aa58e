"""`loop`: a file or block device, or a piece of one; several segments may use several files.

The table may cover less than the file, never more. Holes read as zeros; discards punch holes;
flushes sync the file. Offsets are bytes, multiples of 512. Source: dm-loop (Reeves 2006,
Mauelshagen 2018, Patocka 2025) and losetup(8); the error texts are theirs. Like them it warns
of what it cannot use of the file: the end that makes no whole sector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, Self

from typing_extensions import override

from blkloom._engine import Extent, File
from blkloom.table.arguments import Arguments
from blkloom.target.base import Target
from blkloom.target.opening import Opening
from blkloom.target.options import parse_options
from blkloom.units import SECTOR, Bytes, to_bytes, to_sectors

_START: Final = Bytes(0)


@dataclass(frozen=True)
class Loop(Target):
    """The segment is `path` from byte `offset` on."""

    path: str
    offset: Bytes = _START
    direct_io: bool = False
    read_only: bool = False

    name: ClassVar[str] = "loop"
    syntax: ClassVar[str] = "<path> [<offset> [<#opts> [direct_io] [read_only]]]"
    summary: ClassVar[str] = "a file or block device (offset in bytes)"

    @classmethod
    @override
    def parse(cls, arguments: Arguments) -> Self:
        path = arguments.word("path")
        offset = arguments.integer("file offset") if arguments.remaining else 0
        if offset % SECTOR:
            down = offset // SECTOR * SECTOR
            raise arguments.error(
                f"Unaligned offset: must be a multiple of {SECTOR} bytes",
                value=str(offset),
                cure=f"write {down} or {down + SECTOR}",
            )
        return cls(path, Bytes(offset), **parse_options(arguments, ("direct_io", "read_only")))

    @override
    def format(self) -> list[str]:
        options = [name for name in ("direct_io", "read_only") if getattr(self, name)]
        words = [str(self.offset)] if self.offset or options else []
        return [self.path, *words, *([str(len(options)), *options] if options else [])]

    @override
    def map(self, opening: Opening, start: Bytes, length: Bytes) -> list[tuple[Bytes, Bytes, Extent]]:
        direct = self.direct_io or opening.direct_io
        file = opening.file(self.path, read_only=self.read_only, direct_io=direct)
        self._check(opening, Bytes(file.size), length)
        if file.direct and (reason := self._unfit(file, length)):
            opening.warn(f"{self.path}: {reason}; using buffered I/O")
            file = opening.file(self.path, read_only=self.read_only, direct_io=False)
        return [(Bytes(0), length, Extent.data(file, self.offset, read_only=not file.writable))]

    def _check(self, opening: Opening, size: Bytes, length: Bytes) -> None:
        if size < SECTOR:
            raise opening.refuse(
                "backing file cannot be less than one block in size" if size else "backing file is empty",
                value=self.path,
                cure=f"make it at least {self.offset + length} bytes long (truncate -s)",
            )
        if self.offset >= size:
            raise opening.refuse(
                "Offset is greater than file size", value=str(self.offset), cure=f"{self.path} has {size} bytes"
            )
        room = to_bytes(to_sectors(Bytes(size - self.offset)))
        if length > room:
            raise opening.refuse(
                "Target maps area after file end",
                value=self.path,
                cure=f"{to_sectors(room)} sectors are there from byte {self.offset} on, not {to_sectors(length)}",
            )
        if length == room and (left := (size - self.offset) % SECTOR):
            opening.warn(f"{self.path}: not using {left} bytes in incomplete block at EOF")

    def _unfit(self, file: File, length: Bytes) -> str:
        """Why direct I/O would do more harm than good here; "" where it fits."""
        block = file.offset_alignment
        if self.offset % block:
            return f"offset {self.offset} is not a multiple of the {block} bytes direct I/O needs"
        if file.size % block and self.offset + length > file.size // block * block:
            return f"the file ends inside a block of the {block} bytes direct I/O needs"
        return ""
