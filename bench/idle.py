"""Idle clients: NBD connections that finish the handshake and then send nothing.

The client is small, so one process can have thousands of them. Source: NetworkBlockDevice doc/proto.md, fixed newstyle,
NBD_OPT_GO.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

_GREETING: Final = b"NBDMAGICIHAVEOPT"
_REPLY_MAGIC: Final = 0x3E889045565A9
_GO, _ABORT_BIT = 7, 1 << 31
_ACK: Final = 1
_TIMEOUT: Final = 30.0


@contextmanager
def idle_connections(path: Path, count: int) -> Iterator[None]:
    """Open `count` connections to the default export of the server at `path`, and finish their handshakes. Raises
    OSError, also if the server refuses one.
    """
    with ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.settimeout(_TIMEOUT)
            connection.connect(str(path))
            _enter_transmission(connection)
        yield


def _enter_transmission(connection: socket.socket) -> None:
    if _receive(connection, 18)[:16] != _GREETING:
        raise ConnectionError("no NBD server here")
    connection.sendall(struct.pack(">I", 3))  # fixed newstyle, no zeroes
    option = struct.pack(">IH", 0, 0)  # the default export, no information asked for
    connection.sendall(struct.pack(">8sII", b"IHAVEOPT", _GO, len(option)) + option)
    while True:
        magic, _, kind, length = struct.unpack(">QIII", _receive(connection, 20))
        detail = _receive(connection, length)
        if magic != _REPLY_MAGIC or kind & _ABORT_BIT:
            raise ConnectionError(f"the server refuses NBD_OPT_GO: {kind:#x} {detail!r}")
        if kind == _ACK:
            return


def _receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        if not (piece := connection.recv(count - len(data))):
            raise ConnectionError("the server closed the connection during the handshake")
        data += piece
    return data
