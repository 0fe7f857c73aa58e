"""Parses the data of options. No length is trusted before it is checked; `MalformedOptionError` says what is wrong.

Pure functions of bytes. Source: proto.md "Option types".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from blkloom.export.nbd.codes import DIRTY_BITMAP, STRING_LIMIT


class MalformedOptionError(ValueError):
    """The option's data is syntactically or semantically invalid; the message may be sent to the client."""


class ExportRequest(msgspec.Struct, frozen=True):
    """INFO and GO: name of the export, and the requested kinds of information, with unknown ones."""

    name: str
    infos: frozenset[int]


class ContextRequest(msgspec.Struct, frozen=True):
    """LIST_META_CONTEXT and SET_META_CONTEXT: name of the export, and the queries as sent."""

    name: str
    queries: tuple[str, ...]


def parse_export_name(data: bytes) -> str:
    """EXPORT_NAME: all of the data is the name."""
    fields = _Fields(data)
    return fields.string("export name", len(data))


def parse_export_request(data: bytes) -> ExportRequest:
    """INFO, GO: u32 length, name, u16 count, count times u16."""
    fields = _Fields(data)
    length = fields.number("length of the export name", 4)
    if length > len(data) - 6:
        raise MalformedOptionError(f"export name of {length} bytes does not fit {len(data)} bytes of option data")
    name = fields.string("export name", length)
    count = fields.number("number of information requests", 2)
    if count * 2 != fields.remaining:
        raise MalformedOptionError(f"{count} information requests announced, {fields.remaining} bytes follow")
    return ExportRequest(name, frozenset(fields.number("information request", 2) for _ in range(count)))


def parse_context_request(data: bytes) -> ContextRequest:
    """LIST_META_CONTEXT, SET_META_CONTEXT: u32 length, name, u32 count, count times (u32 length, query)."""
    fields = _Fields(data)
    name = fields.string("export name", fields.number("length of the export name", 4))
    count = fields.number("number of queries", 4)
    if count * 4 > fields.remaining:
        raise MalformedOptionError(f"{count} queries announced, {fields.remaining} bytes follow")
    queries = tuple(fields.string("query", fields.number("length of a query", 4)) for _ in range(count))
    if fields.remaining:
        raise MalformedOptionError(f"{fields.remaining} bytes follow the last query")
    return ContextRequest(name, queries)


def find_contexts(queries: Iterable[str], names: Sequence[str], *, wildcards: bool) -> list[str]:
    """Finds the metadata contexts among `names` that match a query, in their order, each once.

    wildcards: a namespace with its colon matches all its contexts, and `qemu:dirty-bitmap:` for all bitmaps (when
    listing). Unknown namespaces and unknown leaf names are ignored; a query without a colon is a
    MalformedOptionError. Source: proto.md "Metadata querying", QEMU docs/interop/nbd.rst.
    """
    asked = set(queries)  # a client may send thousands: each name is looked up, not each query
    for query in asked:
        if ":" not in query:
            raise MalformedOptionError(f"query '{query[:64]}' has no namespace; write namespace:leaf")
    if not wildcards:
        return [name for name in names if name in asked]
    bitmaps = DIRTY_BITMAP in asked
    return [
        name
        for name in names
        if name in asked or name[: name.index(":") + 1] in asked or (bitmaps and name.startswith(DIRTY_BITMAP))
    ]


class _Fields:
    """A cursor over big-endian fields that never reads past the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def remaining(self) -> int:
        return len(self._data) - self._at

    def number(self, what: str, width: int) -> int:
        return int.from_bytes(self._take(what, width))

    def string(self, what: str, length: int) -> str:
        if length > STRING_LIMIT:
            raise MalformedOptionError(f"{what} of {length} bytes is longer than {STRING_LIMIT}")
        try:
            text = self._take(what, length).decode()
        except UnicodeDecodeError as error:
            raise MalformedOptionError(f"{what} is not UTF-8") from error
        if "\0" in text:
            raise MalformedOptionError(f"{what} contains a NUL character")
        return text

    def _take(self, what: str, length: int) -> bytes:
        if length > self.remaining:
            raise MalformedOptionError(f"{what} needs {length} bytes, {self.remaining} are left")
        self._at += length
        return self._data[self._at - length : self._at]
