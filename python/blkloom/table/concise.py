r"""dmsetup's concise form: many devices in one line of text.

    <name>,<uuid>,<minor>,<flags>,<table>[,<table>+][;<name>,<uuid>,<minor>,<flags>,<table>...]

`\` makes the next character literal, before the table's own escapes are looked at: a backslash of
a table is written `\\`. White space in front of the first five fields counts for nothing unless it
is escaped. uuid and minor may be empty; flags are `ro`, `rw` or empty. A comma or a newline ends a
line of the table. Pure. Source: dmsetup(8) CONCISE FORMAT and what dmsetup makes of it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from blkloom.errors import Place, TableError
from blkloom.table.arguments import decimal
from blkloom.table.parse import Targets, read_table
from blkloom.table.places import LinePlaces
from blkloom.table.printing import format_segment
from blkloom.table.segments import Table
from blkloom.table.words import Places

_FORM: Final = "write: <name>,<uuid>,<minor>,<flags>,<table>[,<table>+][;...]"
_FIELDS: Final = 5
_MOST_MINOR: Final = (1 << 20) - 1

_SPACE: Final = " \t\n\v\f\r"
_TOKEN: Final = re.compile(r"[^\\,;]+|\\.|[,;]", re.DOTALL)
_NEEDS_ESCAPE: Final = re.compile(r"([\\,;])")
_IMPOSSIBLE: Final = re.compile(r"[\x00-\x1f\x7f\ud800-\udc7f\udd00-\udfff]")


class ConciseDevice(msgspec.Struct, frozen=True):
    """One device of a concise text. name: not empty; uuid: "" for none; minor: None for any."""

    name: str
    uuid: str
    minor: int | None
    read_only: bool
    table: Table


class _Field:
    """One field without escapes, and the position of each of its characters in the source text."""

    def __init__(self, places: Places, start: int) -> None:
        """start: the index in the source at which the field begins."""
        self._places = places
        self._pieces: list[str] = []
        self._at = [0]  # indices into the field ...
        self._from = [start]  # ... and the index in the source of the text that begins there
        self._length = 0

    @property
    def text(self) -> str:
        """The text of the field."""
        return "".join(self._pieces)

    @property
    def empty(self) -> bool:
        """Whether no character, not even an escaped one, was added yet."""
        return not self._length

    def add(self, piece: str, start: int) -> None:
        """Adds characters that begin at index `start` of the source."""
        self._at.append(self._length)
        self._from.append(start)
        self._pieces.append(piece)
        self._length += len(piece)

    def place(self, index: int) -> Place:
        """The place of the field's character `index`; the length of the field is a valid index, too."""
        piece = bisect_right(self._at, index) - 1
        return self._places(self._from[piece] + index - self._at[piece])


def parse_concise(text: str, *, targets: Targets, source: str = "--concise") -> list[ConciseDevice]:
    """The devices, in order. source: name of the text in errors. Raises TableError."""
    places = LinePlaces(text, source)
    devices: list[ConciseDevice] = []
    names: set[str] = set()
    for fields in _split(text, places):
        device = _device(fields, targets)
        if device.name in names:
            raise _double(device.name, fields[0].place(0))
        names.add(device.name)
        devices.append(device)
    if not devices:
        raise TableError("no devices", place=places(0), cure=_FORM)
    return devices


def split_concise(text: str, *, source: str = "--concise") -> list[list[str]]:
    r"""The fields of each device as text, tables with a newline for each comma; nothing else is looked
    at: there may be fewer fields than five. Raises TableError for a `\` at the end.
    """
    return [[field.text for field in fields] for fields in _split(text, LinePlaces(text, source))]


def format_concise(devices: Iterable[ConciseDevice]) -> str:
    """The text that `parse_concise` parses back to the same devices.

    Raises TableError as `format_table`, and for a name, uuid or minor that the concise form cannot represent, for two
    devices of the same name, and for no devices.
    """
    texts: list[str] = []
    names: set[str] = set()
    for device in devices:
        place = device.table.segments[0].place
        if device.name in names:
            raise _double(device.name, place)
        names.add(device.name)
        texts.append(_format(device, place))
    if not texts:
        raise TableError("no devices", cure="give at least one")
    text = ";".join(texts)
    # dmsetup overlooks the end of a device that ends in an escaped character.
    return text + ";" if _NEEDS_ESCAPE.match(text[-1]) else text


def _format(device: ConciseDevice, place: Place) -> str:
    _require_name(device.name, "name", place)
    _require_label(device.uuid, "uuid", place)
    minor = "" if device.minor is None else str(device.minor)
    if device.minor is not None and not 0 <= device.minor <= _MOST_MINOR:
        raise _not_minor(minor, place)
    labels = [_escape_label(device.name), _escape_label(device.uuid), minor, "ro" if device.read_only else "rw"]
    lines = [_NEEDS_ESCAPE.sub(r"\\\1", format_segment(segment)) for segment in device.table.segments]
    return ",".join([*labels, *lines])


def _escape_label(text: str) -> str:
    escaped = _NEEDS_ESCAPE.sub(r"\\\1", text)
    return f"\\{escaped}" if text[:1] == " " else escaped


def _split(text: str, places: Places) -> Iterator[list[_Field]]:
    """The fields of each device; the last of five has the lines of the table, separated by newlines."""
    fields = [_Field(places, 0)]
    at = 0
    while found := _TOKEN.match(text, at):
        token, start, at = found[0], at, found.end()
        if token == "," and len(fields) < _FIELDS:
            fields.append(_Field(places, at))
        elif token == ",":
            fields[-1].add("\n", start)
        elif token == ";":
            yield fields
            fields = [_Field(places, at)]
        elif token[0] == "\\":
            fields[-1].add(token[1], start + 1)
        else:
            kept = token.lstrip(_SPACE) if fields[-1].empty else token
            if kept:
                fields[-1].add(kept, at - len(kept))
    if at < len(text):
        raise TableError("nothing follows the backslash", place=places(at), value="\\", cure="write \\\\ for one")
    if len(fields) > 1 or not fields[0].empty:
        yield fields


def _device(fields: list[_Field], targets: Targets) -> ConciseDevice:
    if len(fields) < _FIELDS:
        last = fields[-1]
        raise TableError(
            f"a device needs name, uuid, minor, flags and a table: {len(fields)} of 5 fields are there",
            place=last.place(len(last.text)),
            value=fields[0].text,
            cure=_FORM,
        )
    name, uuid, minor, flags, table = fields
    _require_name(name.text, "name", name.place(0))
    _require_label(uuid.text, "uuid", uuid.place(0))
    number = decimal(minor.text)
    if minor.text and (number is None or number > _MOST_MINOR):
        raise _not_minor(minor.text, minor.place(0))
    if flags.text not in ("", "ro", "rw"):
        raise TableError("unknown flags", place=flags.place(0), value=flags.text, cure="write ro, rw or nothing")
    lines = read_table(table.text, targets=targets, places=table.place)
    return ConciseDevice(name.text, uuid.text, number, flags.text == "ro", lines)


def _require_name(name: str, what: str, place: Place) -> None:
    if not name:
        raise TableError("a device needs a name", place=place, cure=_FORM)
    _require_label(name, what, place)


def _require_label(text: str, what: str, place: Place) -> None:
    if _IMPOSSIBLE.search(text):
        raise TableError(
            f"a {what} cannot hold control characters", place=place, value=text, cure="use printable characters"
        )


def _not_minor(value: str, place: Place) -> TableError:
    return TableError(
        "minor is not a device number", place=place, value=value, cure=f"0 to {_MOST_MINOR}, or nothing for any"
    )


def _double(name: str, place: Place) -> TableError:
    return TableError("two devices have one name", place=place, value=name, cure="rename one of them")
