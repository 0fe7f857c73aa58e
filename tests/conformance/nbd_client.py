"""Raw NBD client: a socket, `struct`, and no other library.

It checks every reply as far as a client can: the magic, the cookie, that the chunks of a read cover the range once,
that only the last chunk is DONE, and that DF means one chunk. libnbd of Debian 12 has no extended headers, and no
library reports these details. Source: NetworkBlockDevice doc/proto.md and its branch extension-ext-header. One thread
at a time.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

READ, WRITE, DISCONNECT, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA = 1, 2, 4, 8
SEND_TRIM, SEND_WRITE_ZEROES, SEND_DF, CAN_MULTI_CONN, SEND_CACHE, SEND_FAST_ZERO = 32, 64, 128, 256, 1024, 2048
CONTEXT = "base:allocation"

_OPT_GO, _OPT_STRUCTURED_REPLY, _OPT_SET_META_CONTEXT, _OPT_EXTENDED_HEADERS = 7, 8, 10, 11
_REP_ACK, _REP_INFO, _REP_META_CONTEXT = 1, 3, 4
_CHUNK_DONE, _CHUNK_ERROR = 1, 1 << 15
_NONE, _OFFSET_DATA, _OFFSET_HOLE, _STATUS, _STATUS_EXT = 0, 1, 2, 5, 6


class Style(Enum):
    """What the handshake settles about replies."""

    SIMPLE = "simple"
    STRUCTURED = "structured"
    EXTENDED = "extended"


@dataclass
class Reply:
    """A complete answer. error: NBD's number, 0 for success. holes: ranges of the data, (start, length)."""

    error: int = 0
    message: str = ""
    data: bytes = b""
    holes: list[tuple[int, int]] = field(default_factory=list)
    extents: list[tuple[int, int]] = field(default_factory=list)
    """(length, flags) of base:allocation."""
    statuses: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """The same of every context that was told of."""


@dataclass
class _Pending:
    command: int
    flags: int
    offset: int
    length: int
    buffer: bytearray
    covered: list[tuple[int, int]] = field(default_factory=list)
    reply: Reply = field(default_factory=Reply)


class NbdClient:
    """A connection to one export. contexts: to select, all of which must be there. Raises ConnectionError when the
    server hangs up.
    """

    def __init__(
        self, connected: socket.socket, export: str, style: Style, contexts: Sequence[str] = (CONTEXT,)
    ) -> None:
        self.socket = connected
        self.style = style
        self.size = 0
        self.flags = 0
        self._cookie = 0
        self._pending: dict[int, _Pending] = {}
        self._contexts: dict[int, str] = {}
        self._wanted = contexts
        self._input = connected.makefile("rb")
        self._handshake(export)

    @classmethod
    def unix(
        cls,
        path: str | os.PathLike[str],
        export: str = "",
        style: Style = Style.EXTENDED,
        contexts: Sequence[str] = (CONTEXT,),
    ) -> NbdClient:
        """Connects to a Unix socket."""
        connected = socket.socket(socket.AF_UNIX)
        connected.settimeout(60)
        connected.connect(os.fspath(path))
        return cls(connected, export, style, contexts)

    # Handshake

    def _handshake(self, export: str) -> None:
        magic, option_magic, flags = struct.unpack(">8s8sH", self._take(18))
        assert (magic, option_magic, flags) == (b"NBDMAGIC", b"IHAVEOPT", 3)
        self.socket.sendall(struct.pack(">I", 3))
        if self.style is not Style.SIMPLE:
            wanted = _OPT_EXTENDED_HEADERS if self.style is Style.EXTENDED else _OPT_STRUCTURED_REPLY
            assert self._option(wanted, b"") == [(_REP_ACK, b"")]
            name, queries = export.encode(), [context.encode() for context in self._wanted]
            request = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
            request += b"".join(struct.pack(">I", len(query)) + query for query in queries)
            *selected, (last, _) = self._option(_OPT_SET_META_CONTEXT, request)
            assert last == _REP_ACK
            assert all(kind == _REP_META_CONTEXT for kind, _ in selected)
            self._contexts = {int.from_bytes(content[:4]): content[4:].decode() for _, content in selected}
            assert sorted(self._contexts.values()) == sorted(self._wanted), "each has an id of its own"
        name = export.encode()
        for kind, content in self._option(_OPT_GO, struct.pack(">I", len(name)) + name + b"\0\0"):
            if kind == _REP_INFO and content[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">2xQH", content)
            else:
                assert kind in (_REP_INFO, _REP_ACK), content
        assert self.flags & HAS_FLAGS

    def _option(self, option: int, data: bytes) -> list[tuple[int, bytes]]:
        self.socket.sendall(struct.pack(">8sII", b"IHAVEOPT", option, len(data)) + data)
        replies: list[tuple[int, bytes]] = []
        while not replies or replies[-1][0] in (_REP_INFO, _REP_META_CONTEXT):
            magic, repeated, kind, length = struct.unpack(">QIII", self._take(20))
            assert (magic, repeated) == (0x0003E889045565A9, option)
            replies.append((kind, self._take(length)))
        return replies

    # Requests

    def send(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"", later: int = 0
    ) -> int:
        """Sends a request without waiting for its answer; the cookie to `receive` it by. later: bytes at the end
        of the payload that the caller sends later.
        """
        self._cookie += 1
        if command == WRITE:
            length = len(payload)
        if self.style is Style.EXTENDED:
            flags |= PAYLOAD_LEN if command == WRITE else 0
            header = struct.pack(">IHHQQQ", 0x21E41C71, flags, command, self._cookie, offset, length)
        else:
            header = struct.pack(">IHHQQI", 0x25609513, flags, command, self._cookie, offset, length)
        self._pending[self._cookie] = _Pending(
            command, flags, offset, length, bytearray(length if command == READ else 0)
        )
        self.socket.sendall(header + payload[: len(payload) - later])
        return self._cookie

    def ask(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"") -> Reply:
        """A request and its answer; nothing else may be under way."""
        cookie = self.send(command, offset, length, flags=flags, payload=payload)
        answered, reply = self.receive()
        assert answered == cookie
        return reply

    def receive(self) -> tuple[int, Reply]:
        """The next complete answer and its cookie."""
        while True:
            (magic,) = struct.unpack(">I", self._take(4))
            if magic == 0x67446698:
                answered = self._simple()
            elif magic == 0x668E33EF and self.style is Style.STRUCTURED:
                answered = self._chunk(extended=False)
            elif magic == 0x6E8A278C and self.style is Style.EXTENDED:
                answered = self._chunk(extended=True)
            else:
                raise AssertionError(f"reply magic {magic:#x} with {self.style.value} replies")
            if answered is not None:
                return answered, self._pending.pop(answered).reply

    def _simple(self) -> int:
        error, cookie = struct.unpack(">IQ", self._take(12))
        pending = self._pending[cookie]
        assert self.style is not Style.EXTENDED, "extended headers allow no simple replies"
        assert not (self.style is Style.STRUCTURED and pending.command in (READ, BLOCK_STATUS))
        pending.reply.error = error
        if pending.command == READ and not error:
            pending.reply.data = self._take(pending.length)
        return int(cookie)

    def _chunk(self, *, extended: bool) -> int | None:
        if extended:
            flags, kind, cookie, offset, length = struct.unpack(">HHQQQ", self._take(28))
        else:
            flags, kind, cookie, length = struct.unpack(">HHQI", self._take(16))
            offset = self._pending[cookie].offset
        pending = self._pending[cookie]
        assert offset == pending.offset, "an extended chunk repeats its request's offset"
        content = self._take(length)
        reply = pending.reply
        if kind & _CHUNK_ERROR:
            reply.error, count = struct.unpack(">IH", content[:6])
            reply.message = content[6 : 6 + count].decode()
            assert reply.error
        elif kind == _OFFSET_DATA:
            (at,) = struct.unpack(">Q", content[:8])
            self._cover(pending, at, len(content) - 8)
            pending.buffer[at - offset : at - offset + len(content) - 8] = content[8:]
        elif kind == _OFFSET_HOLE:
            at, count = struct.unpack(">QI", content)
            self._cover(pending, at, count)
            reply.holes.append((at - offset, count))
        elif kind in (_STATUS, _STATUS_EXT):
            assert kind == (_STATUS_EXT if extended else _STATUS)
            context, found = self._descriptors(content, extended=extended)
            assert context not in reply.statuses, "one chunk a context"
            reply.statuses[context] = found
            if context == CONTEXT:
                reply.extents = found
        else:
            assert (kind, content) == (_NONE, b"")
        if not flags & _CHUNK_DONE:
            assert kind != _NONE
            return None
        if pending.command == READ and not reply.error:
            assert sum(count for _, count in pending.covered) == pending.length, "a read with parts missing"
            assert len(pending.covered) <= 1 or not pending.flags & DF, "DF forbids more than one chunk"
            reply.data = bytes(pending.buffer)
        if pending.command == BLOCK_STATUS and not reply.error:
            assert sorted(reply.statuses) == sorted(self._wanted)
        return int(cookie)

    @staticmethod
    def _cover(pending: _Pending, at: int, count: int) -> None:
        assert pending.command == READ
        assert count, "chunks of a read must not be empty"
        assert pending.offset <= at
        assert at + count <= pending.offset + pending.length
        assert all(at + count <= start or start + length <= at for start, length in pending.covered), "bytes told twice"
        pending.covered.append((at, count))

    def _descriptors(self, content: bytes, *, extended: bool) -> tuple[str, list[tuple[int, int]]]:
        if extended:
            context, count = struct.unpack(">II", content[:8])
            found = list(struct.iter_unpack(">QQ", content[8:]))
            assert count == len(found)
        else:
            (context,) = struct.unpack(">I", content[:4])
            found = list(struct.iter_unpack(">II", content[4:]))
        assert found
        assert all(length for length, _ in found)
        return self._contexts[context], found

    # End

    def disconnect(self) -> None:
        """Says goodbye and waits until the server has closed."""
        self.send(DISCONNECT)
        assert self._input.read(1) == b""
        self.close()

    def close(self) -> None:
        """Hangs up."""
        self._input.close()
        self.socket.close()

    def _take(self, length: int) -> bytes:
        data = self._input.read(length)
        if len(data) < length:
            raise ConnectionError(f"the server hung up, {length - len(data)} bytes short")
        return data
