"""Lists loop devices like losetup: columns as a table, raw or as JSON, and the old line format.

The output is byte for byte that of libsmartcols in util-linux, but a table is never cut to the width of a terminal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

from blkloom.cli.loop_devices import LoopDevice, mode_of
from blkloom.cli.loop_options import LoopFailed
from blkloom.device_names import MAJOR
from blkloom.printing import escaped, printable

if TYPE_CHECKING:
    from blkloom.cli.session import Session

Cell = str | int | bool | None


@dataclass(frozen=True)
class LoopRow:
    """A device as input of the columns. aligned: whether device numbers are padded to align."""

    session: Session
    device: LoopDevice
    aligned: bool

    @cached_property
    def mode(self) -> str:
        """Its I/O mode."""
        return mode_of(self.session, self.device)

    def numbers(self, number: int | None) -> str | None:
        """A device number (makedev) as `major:minor`."""
        if number is None:
            return None
        major, minor = os.major(number), os.minor(number)
        return f"{major:8}:{minor:<3}" if self.aligned else f"{major}:{minor}"

    def own_numbers(self) -> str:
        """Device number of the device itself."""
        minor = self.device.info.minor
        return f"{MAJOR:3}:{minor:<3}" if self.aligned else f"{MAJOR}:{minor}"


@dataclass(frozen=True)
class Column:
    """A column. right: align to the right. value: returns the cell; None for an empty cell."""

    name: str
    value: Callable[[LoopRow], Cell]
    help: str
    right: bool = False


COLUMNS: Final = (
    Column("AUTOCLEAR", lambda row: row.device.autoclear, "autoclear flag set", right=True),
    Column("BACK-FILE", lambda row: row.device.backing_name, "device backing file"),
    Column(
        "BACK-INO",
        lambda row: row.device.file.inode if row.device.file else None,
        "backing file inode number",
        right=True,
    ),
    Column(
        "BACK-MAJ:MIN",
        lambda row: row.numbers(row.device.file.device if row.device.file else None),
        "backing file major:minor device number",
    ),
    Column("NAME", lambda row: row.device.name, "loop device name"),
    Column(
        "OFFSET",
        lambda row: row.device.table.offset if row.device.table else None,
        "offset from the beginning",
        right=True,
    ),
    Column("PARTSCAN", lambda row: row.device.notes.partscan, "partscan flag set", right=True),
    Column("RO", lambda row: row.device.info.read_only, "read-only device", right=True),
    Column("SIZELIMIT", lambda row: row.device.notes.sizelimit, "size limit of the file in bytes", right=True),
    Column("MAJ:MIN", lambda row: row.own_numbers(), "loop device major:minor number"),
    Column("DIO", lambda row: row.mode == "direct_io", "access backing file with direct-io", right=True),
    Column(
        "LOG-SEC",
        lambda row: row.device.table.block_size if row.device.table else None,
        "logical sector size in bytes",
        right=True,
    ),
    Column("NODE", lambda row: row.device.info.node.path if row.device.info.node else None, "its block device"),
    Column("SOCKET", lambda row: row.device.socket or None, "where NBD clients reach it"),
    Column("MODE", lambda row: row.mode or None, "file, direct_io or block_map, as it is now"),
)
DEFAULT: Final = ("NAME", "SIZELIMIT", "OFFSET", "AUTOCLEAR", "RO", "BACK-FILE", "DIO", "LOG-SEC")
_BY_NAME: Final = {column.name: column for column in COLUMNS}


def chosen(output: str | None, *, everything: bool) -> list[Column]:
    """The columns of -O or --output-all. Raises LoopFailed."""
    names = [column.name for column in COLUMNS] if everything else list(DEFAULT)
    if output is not None:
        names = [*(names if output.startswith("+") else []), *output.removeprefix("+").upper().split(",")]
    for name in names:
        if name not in _BY_NAME:
            raise LoopFailed(f"unknown column: {name}", what=f"columns are {', '.join(_BY_NAME)}")
    return [_BY_NAME[name] for name in names]


def rows(session: Session, devices: Sequence[LoopDevice], *, aligned: bool) -> list[LoopRow]:
    """Rows for the columns."""
    return [LoopRow(session, device, aligned) for device in devices]


def as_table(found: Sequence[LoopRow], columns: Sequence[Column], *, headings: bool) -> list[str]:
    """An aligned table; empty without rows."""
    if not found:
        return []
    lines = [[column.name for column in columns]]
    lines += [[_safe(_text(column.value(row))) for column in columns] for row in found]
    widths = [max(len(line[at]) for line in lines) for at in range(len(columns))]
    made = []
    for line in lines if headings else lines[1:]:
        cells = [
            text.rjust(width) if column.right else text.ljust(width) if at < len(columns) - 1 else text
            for at, (text, width, column) in enumerate(zip(line, widths, columns, strict=True))
        ]
        made.append(" ".join(cells))
    return made


def as_raw(found: Sequence[LoopRow], columns: Sequence[Column], *, headings: bool) -> list[str]:
    r"""Cells separated by a blank; blanks, backslashes and non-ASCII characters in a cell are written as `\xNN`."""
    lines = [" ".join(_hidden(_text(column.value(row))) for column in columns) for row in found]
    return [" ".join(column.name for column in columns), *lines] if headings and lines else lines


def as_json(found: Sequence[LoopRow], columns: Sequence[Column]) -> list[str]:
    """JSON: one object with the array `loopdevices`."""
    devices = []
    for row in found:
        members = [
            f"         {json.dumps(column.name.lower())}: {json.dumps(column.value(row), ensure_ascii=False)}"
            for column in columns
        ]
        devices.append("{\n" + ",\n".join(members) + "\n      }")
    inside = f"      {','.join(devices)}" if devices else ""
    return ["{", '   "loopdevices": [', *inside.split("\n"), "   ]", "}"]


def as_line(device: LoopDevice) -> str:
    """The old line format of losetup."""
    table, file = device.table, device.file
    numbers = f"[{file.device:04}]:{file.inode}" if file else "[]:"
    line = f"{device.name}: {numbers} ({device.backing_name or ''})"
    if table and table.offset:
        line += f", offset {table.offset}"
    if device.notes.sizelimit:
        line += f", sizelimit {device.notes.sizelimit}"
    return line


def _text(value: Cell) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, bool) else str(value)


def _safe(text: str) -> str:
    r"""Escapes unprintable bytes as `\xNN`, and a backslash that would look like such an escape."""
    return printable(text.replace("\\x", "\\x5cx"))


def _hidden(text: str) -> str:
    return "".join(one if one.isascii() and one.isprintable() and one not in "\\ " else escaped(one) for one in text)
