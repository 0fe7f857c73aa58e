"""Client of NBD over TLS, with Python's ssl: it sends what it likes, when it likes."""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from blkloom.export.nbd.codes import OPTION_MAGIC, REPLY_MAGIC, Option, Reply

FLAGS = struct.pack(">I", 3)
READ, WRITE, DISCONNECT = 0, 1, 2


def option(number: int, data: bytes = b"") -> bytes:
    return struct.pack(">QII", OPTION_MAGIC, number, len(data)) + data


def request(command: int, offset: int = 0, length: int = 0) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, 0, command, 7, offset, length)


def exactly(stream: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        more = stream.recv(count - len(received))
        assert more, "the server has closed the connection"
        received += more
    return received


def reply(stream: socket.socket) -> tuple[int, int, bytes]:
    magic, number, kind, length = struct.unpack(">QIII", exactly(stream, 20))
    assert magic == REPLY_MAGIC
    return number, kind, exactly(stream, length)


def closed(stream: socket.socket) -> bool:
    """Whether the server closes the connection; waits for it."""
    try:
        while stream.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


@contextmanager
def plain(port: int) -> Iterator[socket.socket]:
    """A client that was greeted."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as stream:
        assert exactly(stream, 18)[:8] == b"NBDMAGIC"
        stream.sendall(FLAGS)
        yield stream


def context(files: Path | None = None) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    if files is not None:
        made.load_cert_chain(files / "client-cert.pem", files / "client-key.pem")
    return made


@contextmanager
def encrypted(port: int, using: ssl.SSLContext | None = None) -> Iterator[ssl.SSLSocket]:
    with plain(port) as stream:
        stream.sendall(option(Option.STARTTLS))
        assert reply(stream) == (Option.STARTTLS, Reply.ACK, b"")
        with closing((using or context()).wrap_socket(stream, suppress_ragged_eofs=False)) as secret:
            yield secret


def go(stream: socket.socket) -> None:
    stream.sendall(option(Option.GO, struct.pack(">IH", 0, 0)))
    assert reply(stream)[1] == Reply.INFO
    assert reply(stream)[1] == Reply.ACK
