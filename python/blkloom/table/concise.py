r"""dmsetup's concise form: many devices in one line of text.

    <name>,<uuid>,<minor>,<flags>,<table>[,<table>+][;<name>,<uuid>,<minor>,<flags>,<table>...]

`\` makes the next character literal, before the table's own escapes are looked at; so a backslash
of a table is written `\\`. uuid and minor may be empty; flags are `ro`, `rw` or empty. Each <table>
is one line of the device's table. Source: dmsetup(8) CONCISE FORMAT.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from blkloom.errors import Place, TableError
from blkloom.table.parse import Targets, parse_line
from blkloom.table.printing import format_segment
from blkloom.table.segments import Table

_FORM: Final = "write: <name>,<uuid>,<minor>,<flags>,<table>[,<table>+][;...]"
_SPECIAL: Final = re.compile(r"([\\,;])")
_MOST_MINOR: Final = (1 << 20) - 1


@dataclass(frozen=True, slots=True)
class ConciseDevice:
    """One device. uuid: "" for none; minor: None for any."""

    name: str
    uuid: str
    minor: int | None
    read_only: bool
    table: Table


@dataclass(frozen=True, slots=True)
class _Field:
    """Text after escapes, and where each of its characters (and its end) stood."""

    text: str
    columns: tuple[int, ...]


def parse_concise(text: str, *, targets: Targets, source: str = "concise") -> list[ConciseDevice]:
    """The devices, in order. Raises TableError."""
    devices = [_device(fields, targets, source) for fields in _split(text, source)]
    if not devices:
        raise TableError("no devices", place=Place(source), cure=_FORM)
    return devices


def format_concise(devices: Iterable[ConciseDevice]) -> str:
    """What `parse_concise` reads back as the same devices. Raises TableError as `format_table`."""
    return ";".join(map(_format, devices))


def _format(device: ConciseDevice) -> str:
    minor = "" if device.minor is None else str(device.minor)
    lines = [format_segment(segment) for segment in device.table.segments]
    fields = [device.name, device.uuid, minor, "ro" if device.read_only else "rw", *lines]
    if not device.name or device.name != device.name.strip() or "\n" in device.name + device.uuid:
        raise TableError("a concise form cannot hold this name or uuid", value=device.name)
    return ",".join(_SPECIAL.sub(r"\\\1", field) for field in fields)


def _split(text: str, source: str) -> Iterator[list[_Field]]:
    """Fields by device; devices of nothing but white space are left out."""
    fields: list[_Field] = []
    characters: list[str] = []
    columns: list[int] = []
    escaped = False
    for column, character in enumerate(text + ";", 1):
        if escaped and column <= len(text):
            characters.append(character)
            columns.append(column)
            escaped = False
        elif character == "\\":
            escaped = True
        elif character in ",;":
            if escaped:
                raise TableError("nothing follows the backslash", place=Place(source, 1, column - 1), value="\\")
            fields.append(_Field("".join(characters), (*columns, column)))
            characters, columns = [], []
            if character == ";":
                if len(fields) > 1 or fields[0].text.strip():
                    yield fields
                fields = []
        else:
            characters.append(character)
            columns.append(column)


def _device(fields: list[_Field], targets: Targets, source: str) -> ConciseDevice:
    def place(field: _Field, index: int = 0) -> Place:
        return Place(source, 1, field.columns[min(index, len(field.columns) - 1)])

    if len(fields) < 5:
        raise TableError("a device needs name, uuid, minor, flags and a table", place=place(fields[-1]), cure=_FORM)
    name, uuid, minor, flags, *lines = fields
    if not name.text.strip():
        raise TableError("a device needs a name", place=place(name), cure=_FORM)
    if flags.text not in ("", "ro", "rw"):
        raise TableError("unknown flags", place=place(flags), value=flags.text, cure="write ro, rw or nothing")
    segments = []
    for line in lines:
        if "\n" in line.text:
            raise TableError("a table line cannot hold a newline", place=place(line, line.text.index("\n")))
        segment = parse_line(line.text, targets=targets, place=lambda index, line=line: place(line, index))  # type: ignore[misc]
        if segment is None:
            raise TableError("an empty table line", place=place(line), cure=_FORM)
        segments.append(segment)
    number = _minor(minor, place(minor))
    return ConciseDevice(name.text.strip(), uuid.text, number, flags.text == "ro", Table(tuple(segments)))


def _minor(field: _Field, place: Place) -> int | None:
    text = field.text
    if not text:
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > 7 or int(text) > _MOST_MINOR:
        raise TableError("minor is not a device number", place=place, value=text, cure=f"0 to {_MOST_MINOR}, or nothing")
    return int(text)
