"""Connects to an NBD server, and runs the handshake on the socket.

May block until a deadline. Raises OSError, HandshakeError.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from typing import Final

from blkloom.nbd_client.handshake import HandshakeError, ServerExport, dialogue
from blkloom.nbd_client.uri import NbdUri

_USER_TIMEOUT: Final = 60_000
"""Milliseconds until the kernel gives up a TCP connection whose other end acknowledges nothing."""
_KEEP_ALIVE: Final = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 9))


def connect(uri: NbdUri, deadline: float) -> tuple[socket.socket, ServerExport]:
    """A socket in the transmission phase, and what the server offers. deadline: of time.monotonic."""
    if uri.tls:
        raise HandshakeError("the nbd target does not support TLS", "use an nbd URI, over a tunnel if need be")
    sock = _reach(uri, deadline)
    try:
        return sock, _negotiate(sock, uri.export, deadline)
    except BaseException:
        sock.close()
        raise


def _reach(uri: NbdUri, deadline: float) -> socket.socket:
    if uri.transport == "tcp":
        sock = socket.create_connection((uri.host, uri.port), timeout=_left(deadline))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT)
        for option, value in _KEEP_ALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        return sock
    family = socket.AF_UNIX if uri.transport == "unix" else socket.AF_VSOCK
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(_left(deadline))
        sock.connect(uri.path if uri.transport == "unix" else (int(uri.host), uri.port))
    except BaseException:
        sock.close()
        raise
    return sock


def _negotiate(sock: socket.socket, name: str, deadline: float) -> ServerExport:
    steps = dialogue(name)
    answer: bytes | None = None
    try:
        while True:
            wanted = next(steps) if answer is None else steps.send(answer)
            sock.settimeout(_left(deadline))
            if isinstance(wanted, int):
                answer = _receive(sock, wanted, deadline)
            else:
                sock.sendall(wanted)
                answer = b""
    except StopIteration as stop:
        found: ServerExport = stop.value
        return found


def _receive(sock: socket.socket, count: int, deadline: float) -> bytes:
    """Exactly `count` bytes: those after them belong to the transmission phase."""
    received = bytearray()
    while len(received) < count:
        sock.settimeout(_left(deadline))
        more = sock.recv(count - len(received))
        if not more:
            raise ConnectionResetError(errno.ECONNRESET, "the server closed the connection during the handshake")
        received += more
    return bytes(received)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    return left
