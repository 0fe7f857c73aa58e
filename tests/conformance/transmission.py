"""Raw client of NBD's transmission phase, for tests that check every byte.

The connection begins after the handshake: the engine gets one end of a socket pair.
"""

from __future__ import annotations

import select
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count

from blkloom import _engine

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP = 1, 5, 22, 28, 75, 95
CONTEXT = 7
STYLES = ("simple", "structured", "extended")
_HEADS = {"simple": ">IIQ", "structured": ">IHHQI", "extended": ">IHHQQQ"}
_MAGICS = {"simple": 0x67446698, "structured": 0x668E33EF, "extended": 0x6E8A278C}


@dataclass
class Chunk:
    flags: int
    kind: int
    payload: bytes


@dataclass
class Reply:
    """A whole reply. data: a read's bytes put together. holes: (offset, length) sent as holes."""

    cookie: int
    error: int = 0
    data: bytes = b""
    chunks: list[Chunk] = field(default_factory=list)
    holes: list[tuple[int, int]] = field(default_factory=list)
    extents: list[tuple[int, int]] = field(default_factory=list)


class Hangup(Exception):
    """The server closed the connection."""


class Transmission:
    """One connection. style: what the handshake would have agreed."""

    def __init__(self, engine: _engine.Engine, export: _engine.Export, style: str, **options: object) -> None:
        self.style = style
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        ours.settimeout(30)
        self.socket = ours
        self.notices = _engine.Notices()
        self.connection = _engine.serve_nbd(
            engine,
            export,
            theirs.fileno(),
            self.notices,
            1,
            structured=style == "structured",
            extended=style == "extended",
            contexts=() if style == "simple" else [(CONTEXT, "base:allocation")],
            **options,  # type: ignore[arg-type]
        )
        theirs.close()
        self._cookies = count(0x1234_5678_9ABC_DEF0)
        self._asked: dict[int, tuple[int, int, int]] = {}

    def send(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        data: bytes = b"",
        flags: int = 0,
        *,
        payload: int | None = None,
    ) -> int:
        """
        Sends a request and returns its cookie. payload: a length that is not that of `data`.

        A server that hangs up may do so before it has all of the request: what it answered before is still to be
        read, and after that reading raises Hangup.
        """
        cookie = next(self._cookies)
        length = len(data) if data and payload is None else length if payload is None else payload
        if self.style == "extended" and (command == WRITE or data):
            flags |= PAYLOAD_LEN
        self._asked[cookie] = (command, offset, length)
        with suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(self.header(command, cookie, offset, length, flags) + data)
        return cookie

    def header(self, command: int, cookie: int, offset: int, length: int, flags: int) -> bytes:
        if self.style == "extended":
            return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length)
        return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)

    def exactly(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            try:
                more = self.socket.recv(length - len(data))
            except ConnectionResetError:
                more = b""
            if not more:
                raise Hangup(f"{len(data)} of {length} bytes, then the end")
            data += more
        return bytes(data)

    def reply(self) -> Reply:
        """The next whole reply; chunks of different replies must not be mixed by the server here."""
        head = _HEADS[self.style]
        fields = struct.unpack(head, self.exactly(struct.calcsize(head)))
        assert fields[0] == _MAGICS[self.style], f"magic {fields[0]:#x}"
        if self.style == "simple":
            _, error, cookie = fields
            command, _, length = self._asked.pop(cookie)
            data = self.exactly(length) if command == READ and not error else b""
            return Reply(cookie, error, data)
        reply = Reply(fields[3])
        command, offset, length = self._asked.pop(fields[3])
        parts: list[tuple[int, bytes]] = []
        while True:
            _, flags, kind, cookie, *rest = fields
            assert cookie == reply.cookie
            if self.style == "extended":
                assert rest[0] == offset, "an extended reply repeats its request's offset"
            payload = self.exactly(rest[-1])
            reply.chunks.append(Chunk(flags, kind, payload))
            self._take(reply, kind, payload, offset, length, parts)
            if flags & 1:
                if command == READ and not reply.error:
                    content = bytearray(length)
                    for at, data in parts:
                        content[at : at + len(data)] = data
                    reply.data = bytes(content)
                return reply
            fields = struct.unpack(head, self.exactly(struct.calcsize(head)))

    def _take(
        self, reply: Reply, kind: int, payload: bytes, offset: int, length: int, parts: list[tuple[int, bytes]]
    ) -> None:
        if kind & 0x8000:
            reply.error, message = struct.unpack(">IH", payload[:6])
            assert reply.error
            assert len(payload) == 6 + message
        elif kind == 1:
            at = struct.unpack(">Q", payload[:8])[0] - offset
            assert 0 <= at <= at + len(payload) - 8 <= length
            parts.append((at, payload[8:]))
        elif kind == 2:
            start, size = struct.unpack(">QI", payload)
            assert size > 0
            reply.holes.append((start, size))
        elif kind == 5:
            assert struct.unpack(">I", payload[:4]) == (CONTEXT,)
            reply.extents = list(struct.iter_unpack(">II", payload[4:]))
        elif kind == 6:
            context, number = struct.unpack(">II", payload[:8])
            assert context == CONTEXT
            reply.extents = list(struct.iter_unpack(">QQ", payload[8:]))
            assert number == len(reply.extents)
        else:
            assert kind == 0
            assert not payload

    def ask(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> Reply:
        """One request and its reply."""
        cookie = self.send(command, offset, length, data, flags)
        reply = self.reply()
        assert reply.cookie == cookie
        return reply

    def ended(self, timeout: float = 30.0) -> str:
        """Waits until the engine has forgotten the connection; says why it ended."""
        assert select.select([self.notices.fileno()], [], [], timeout)[0], "the connection did not end"
        ((token, reason, error),) = self.notices.take()
        assert (token, error) == (1, 0)
        return str(reason)

    def close(self) -> None:
        self.socket.close()


def chunks_cover(reply: Reply, offset: int, length: int) -> bool:
    """Whether data and hole chunks cover the range exactly once."""
    ranges: list[tuple[int, int]] = list(reply.holes)
    for chunk in reply.chunks:
        if chunk.kind == 1:
            ranges.append((struct.unpack(">Q", chunk.payload[:8])[0], len(chunk.payload) - 8))
    at = offset
    for start, size in sorted(ranges):
        if start != at:
            return False
        at += size
    return at == offset + length
