"""The handshake of a client with an NBD server, up to the transmission phase.

`Dialogue` is bytes in, bytes out, without I/O: it yields what to send, and takes what was received. `negotiate` runs it
on a socket. Nothing that a server sends is trusted before it is checked; replies to options are limited in size.
Source: proto.md "Handshake phase", "Option types"; its branch extension-ext-header.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from typing import Final

import msgspec

from blkloom.printing import printable

NBD_MAGIC: Final = b"NBDMAGIC"
OPTION_MAGIC: Final = b"IHAVEOPT"
REPLY_MAGIC: Final = 0x0003E889045565A9
OLD_MAGIC: Final = 0x00420281861253
FIXED_NEWSTYLE: Final = 1
NO_ZEROES: Final = 2
ABORT, STARTTLS, GO, STRUCTURED_REPLY, SET_META_CONTEXT, EXTENDED_HEADERS = 2, 5, 7, 8, 10, 11
EXPORT_NAME: Final = 1
ACK, INFO, META_CONTEXT = 1, 3, 4
ERROR: Final = 1 << 31
ERR_UNSUP: Final = ERROR | 1
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3
ALLOCATION: Final = b"base:allocation"

HAS_FLAGS, READ_ONLY, CAN_MULTI_CONN = 1 << 0, 1 << 1, 1 << 8
SEND_WRITE_ZEROES: Final = 1 << 6

_LONGEST_REPLY: Final = 64 << 10
_MOST_REPLIES: Final = 4096
_MOST_BYTES: Final = 1 << 20
"""Of all replies to one option."""
_DEFAULT_MAXIMUM: Final = 32 << 20
_LARGEST_BLOCK: Final = 65536
_ERRORS: Final = {
    ERROR | 1: "the server does not support it",
    ERROR | 2: "the server does not allow it",
    ERROR | 3: "the server calls it invalid",
    ERROR | 4: "the server's platform does not support it",
    ERROR | 5: "the server requires TLS",
    ERROR | 6: "there is no such export",
    ERROR | 7: "the server is shutting down",
    ERROR | 8: "the server requires block sizes",
    ERROR | 9: "the request is too long",
    ERROR | 10: "the server requires extended headers",
}


class HandshakeError(Exception):
    """The handshake failed: the server refuses, or breaks the protocol. cure: what may be done."""

    def __init__(self, what: str, cure: str = "") -> None:
        super().__init__(printable(what))
        self.cure = cure


class ServerExport(msgspec.Struct, frozen=True):
    """What a server offers of an export. size, minimum, preferred, maximum (payload): bytes. flags: transmission flags.
    allocation: the id of the metadata context base:allocation; None: the server does not have it.
    """

    size: int
    flags: int
    structured: bool = False
    extended: bool = False
    allocation: int | None = None
    minimum: int = 1
    preferred: int = 4096
    maximum: int = _DEFAULT_MAXIMUM
    sized: bool = False
    """The server has sent its block sizes."""

    @property
    def read_only(self) -> bool:
        """Whether it may only be read."""
        return bool(self.flags & READ_ONLY)

    @property
    def multi_conn(self) -> bool:
        """Whether a flush on one connection covers what was written on all."""
        return bool(self.flags & CAN_MULTI_CONN)


Exchange = Generator[bytes | int | None, bytes, ServerExport]
"""Yields bytes to send, the number of bytes to receive, or None: begin TLS now. The answer is empty unless it is what
was received."""


def dialogue(name: str, *, starttls: bool = False) -> Exchange:
    """The handshake for the export `name`. starttls: in a TLS session. Raises HandshakeError."""
    greeting = yield 16
    if greeting[:8] != NBD_MAGIC:
        raise HandshakeError("this is no NBD server: its greeting is wrong")
    if greeting[8:] != OPTION_MAGIC:
        old = int.from_bytes(greeting[8:]) == OLD_MAGIC
        raise HandshakeError(
            "the server speaks the oldstyle protocol" if old else "this is no NBD server: its greeting is wrong",
            "use a server that speaks newstyle" if old else "",
        )
    flags = int.from_bytes((yield 2))
    if not flags & FIXED_NEWSTYLE:
        raise HandshakeError("the server does not speak fixed newstyle", "use a newer server")
    short = flags & NO_ZEROES
    yield struct.pack(">I", FIXED_NEWSTYLE | short)
    if starttls:
        yield from _ask(STARTTLS, b"", "TLS")
        yield None
    extended = (yield from _try(EXTENDED_HEADERS, b"")) is not None
    structured = extended or (yield from _try(STRUCTURED_REPLY, b"")) is not None
    encoded = name.encode()
    allocation = None
    if structured:
        query = struct.pack(">I", len(encoded)) + encoded + struct.pack(">II", 1, len(ALLOCATION)) + ALLOCATION
        for kind, data in (yield from _try(SET_META_CONTEXT, query)) or ():
            if kind == META_CONTEXT and data[4:] == ALLOCATION:
                allocation = int.from_bytes(data[:4])
    request = struct.pack(">I", len(encoded)) + encoded + struct.pack(">HH", 1, INFO_BLOCK_SIZE)
    replies = yield from _try(GO, request, "the export")
    if replies is None:
        return (yield from _export_name(encoded, short, structured, extended))
    return _export(replies, structured=structured, extended=extended, allocation=allocation)


def _export_name(name: bytes, short: int, structured: bool, extended: bool) -> Exchange:
    """The old way to begin, for a server without NBD_OPT_GO: it closes the connection if there is no such export."""
    yield OPTION_MAGIC + struct.pack(">II", EXPORT_NAME, len(name)) + name
    size, flags = struct.unpack(">QH", (yield 10))
    if not short:
        yield 124
    return _checked(ServerExport(size=size, flags=flags, structured=structured, extended=extended))


def _export(
    replies: list[tuple[int, bytes]], *, structured: bool, extended: bool, allocation: int | None
) -> ServerExport:
    found: ServerExport | None = None
    sizes: tuple[int, int, int] | None = None
    for kind, data in replies:
        if kind != INFO or len(data) < 2:
            continue
        what = int.from_bytes(data[:2])
        if what == INFO_EXPORT:
            if len(data) != 12:
                raise HandshakeError(f"the server describes the export in {len(data)} bytes, not 12")
            size, flags = struct.unpack(">QH", data[2:])
            found = ServerExport(
                size=size, flags=flags, structured=structured, extended=extended, allocation=allocation
            )
        elif what == INFO_BLOCK_SIZE:
            if len(data) != 14:
                raise HandshakeError(f"the server gives its block sizes in {len(data)} bytes, not 14")
            sizes = struct.unpack(">III", data[2:])
    if found is None:
        raise HandshakeError("the server does not give the size of the export")
    if sizes is not None:
        found = msgspec.structs.replace(
            found, minimum=sizes[0], preferred=sizes[1], maximum=min(sizes[2], _DEFAULT_MAXIMUM), sized=True
        )
    return _checked(found)


def _checked(found: ServerExport) -> ServerExport:
    minimum = found.minimum
    if found.size >= 1 << 63:
        raise HandshakeError(f"the server gives an impossible size of {found.size} bytes")
    if not 1 <= minimum <= _LARGEST_BLOCK or minimum & (minimum - 1) or found.maximum < max(minimum, 512):
        raise HandshakeError(f"the server gives impossible block sizes: {minimum} to {found.maximum} bytes")
    if not found.flags & HAS_FLAGS:
        return msgspec.structs.replace(found, flags=0)
    return found


def _ask(option: int, data: bytes, what: str) -> Generator[bytes | int | None, bytes, list[tuple[int, bytes]]]:
    """Sends an option; returns its replies without the last. Raises HandshakeError if the server refuses it."""
    replies = yield from _try(option, data, what)
    if replies is None:
        raise HandshakeError(f"{what}: {_ERRORS[ERR_UNSUP]}")
    return replies


def _try(
    option: int, data: bytes, needed: str = ""
) -> Generator[bytes | int | None, bytes, list[tuple[int, bytes]] | None]:
    """As `_ask`; None if the server does not support the option. needed: what the option is for, if any other error is
    an error of the handshake; otherwise it counts as not supported.
    """
    yield OPTION_MAGIC + struct.pack(">II", option, len(data)) + data
    replies: list[tuple[int, bytes]] = []
    left = _MOST_BYTES
    while True:
        magic, about, kind, length = struct.unpack(">QIII", (yield 20))
        if magic != REPLY_MAGIC or about != option:
            raise HandshakeError(f"the server broke the protocol: a wrong reply to option {option}")
        left -= length
        if length > _LONGEST_REPLY or left < 0 or len(replies) > _MOST_REPLIES:
            raise HandshakeError(f"the server broke the protocol: too long a reply to option {option}")
        body = (yield length) if length else b""
        if kind == ACK:
            return replies
        if kind & ERROR:
            if kind == ERR_UNSUP or not needed:
                return None
            said = body.decode(errors="replace").strip("\0 \n")
            reason = _ERRORS.get(kind, f"error {kind & ~ERROR}")
            cure = "use an nbds URI" if kind == ERROR | 5 else ""
            raise HandshakeError(f"{needed}: {reason}" + (f" ('{said}')" if said else ""), cure)
        replies.append((kind, body))
