"""An NBD server whose replies a test writes itself.

It does the handshake; after that a function of the test gets each connection, with its number from 0. `Honest` serves
memory. The requests are parsed here by hand.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
SIZE = 1 << 20
FLAGS = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8
"""HAS_FLAGS, flush, FUA, trim, write zeroes, several connections."""
CONTEXT = 5


class Request(NamedTuple):
    """A request. payload: of a write."""

    flags: int
    kind: int
    cookie: int
    offset: int
    length: int
    payload: bytes = b""


class Connection:
    """A connection after its handshake."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock = sock
        self.number = number

    def request(self) -> Request | None:
        """The next request; None: the client has ended the stream."""
        head = self._receive(28)
        if head is None:
            return None
        magic, flags, kind, cookie, offset, length = struct.unpack(">IHHQQI", head)
        assert magic == 0x25609513
        payload = self._receive(length) if kind == WRITE else b""
        return None if payload is None else Request(flags, kind, cookie, offset, length, payload)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def _receive(self, count: int) -> bytes | None:
        found = b""
        while len(found) < count:
            try:
                more = self.sock.recv(count - len(found))
            except ConnectionError:
                return None
            if not more:
                return None
            found += more
        return found


def chunk(cookie: int, kind: int, payload: bytes = b"", *, done: bool = True) -> bytes:
    """A chunk of a structured reply."""
    return struct.pack(">IHHQI", 0x668E33EF, int(done), kind, cookie, len(payload)) + payload


def simple(cookie: int, error: int = 0) -> bytes:
    """A simple reply."""
    return struct.pack(">IIQ", 0x67446698, error, cookie)


def data(cookie: int, offset: int, content: bytes, *, done: bool = True) -> bytes:
    """A chunk of read data."""
    return chunk(cookie, 1, struct.pack(">Q", offset) + content, done=done)


class Honest:
    """Memory, and the replies of a server that keeps the rules."""

    def __init__(self) -> None:
        self.memory = bytearray(SIZE)
        self.requests: list[tuple[int, Request]] = []
        """All requests that were executed: (number of the connection, request)."""

    def execute(self, connection: Connection, request: Request) -> bytes:
        """Executes a request; returns the reply."""
        self.requests.append((connection.number, request))
        end = request.offset + request.length
        match request.kind:
            case 0:
                return data(request.cookie, request.offset, bytes(self.memory[request.offset : end]))
            case 1:
                self.memory[request.offset : end] = request.payload
            case 4 | 6:
                self.memory[request.offset : end] = bytes(request.length)
            case 7:
                return chunk(request.cookie, 5, struct.pack(">III", CONTEXT, request.length, 0))
        return chunk(request.cookie, 0)

    def serve(self, connection: Connection) -> None:
        """Serves until the client ends the connection."""
        while (request := connection.request()) is not None and request.kind != DISC:
            connection.send(self.execute(connection, request))


class ByHand:
    """The server, on a Unix socket in `folder`. serve: called for each connection, on a thread of its own. flags: those
    of the next connections. blocks: the block sizes of the export.
    """

    def __init__(
        self,
        folder: Path,
        serve: Callable[[Connection], None],
        *,
        flags: int = FLAGS,
        blocks: tuple[int, int, int] = (1, 4096, 1 << 20),
    ) -> None:
        self.path = folder / "by-hand.sock"
        self._serve = serve
        self.flags = flags
        self._blocks = blocks
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(self.path))
        self._socket.listen(16)
        self._threads = [threading.Thread(target=self._accept)]
        self._errors: list[BaseException] = []
        self.accepted = 0

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.path}"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._socket.close()
        if self._errors:
            raise self._errors[0]

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                return
            number, self.accepted = self.accepted, self.accepted + 1
            thread = threading.Thread(target=self._run, args=(sock, number))
            self._threads.append(thread)
            thread.start()

    def _run(self, sock: socket.socket, number: int) -> None:
        with sock:
            try:
                connection = Connection(sock, number)
                self._handshake(sock, connection)
                self._serve(connection)
            except ConnectionError:
                pass  # the client has cut it
            except BaseException as error:
                self._errors.append(error)

    def _handshake(self, sock: socket.socket, connection: Connection) -> None:
        sock.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        receive = connection._receive
        assert receive(4) is not None
        while True:
            head = receive(16)
            if head is None:
                raise ConnectionError
            option, length = struct.unpack(">II", head[8:])
            receive(length)

            def reply(kind: int, payload: bytes = b"", option: int = option) -> None:
                sock.sendall(struct.pack(">QIII", 0x3E889045565A9, option, kind, len(payload)) + payload)

            match option:
                case 8:
                    reply(1)
                case 10:
                    reply(4, struct.pack(">I", CONTEXT) + b"base:allocation")
                    reply(1)
                case 7:
                    reply(3, struct.pack(">HQH", 0, SIZE, self.flags))
                    reply(3, struct.pack(">HIII", 3, *self._blocks))
                    reply(1)
                    return
                case _:
                    reply(1 << 31 | 1)
