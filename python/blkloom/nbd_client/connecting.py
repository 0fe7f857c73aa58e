"""Connects to an NBD server, and runs the handshake on the socket, and in a TLS session on it if the URI says so.

May block until a deadline. Raises OSError, HandshakeError.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from blkloom.nbd_client.handshake import ServerExport, dialogue
from blkloom.nbd_client.uri import NbdUri

if TYPE_CHECKING:
    from blkloom._engine import TlsClient, TlsSession

_USER_TIMEOUT: Final = 60_000
"""Milliseconds until the kernel gives up a TCP connection whose other end acknowledges nothing."""
_KEEP_ALIVE: Final = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 9))


class Connected:
    """A connection in the transmission phase. found: what the server offers. session: on the socket, with TLS."""

    def __init__(self, sock: socket.socket, session: TlsSession | None, found: ServerExport) -> None:
        self.socket = sock
        self.session = session
        self.found = found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes its descriptors; those that the engine has stay open."""
        if self.session is not None:
            self.session.close()
        self.socket.close()


def connect(uri: NbdUri, deadline: float) -> Connected:
    """Connects, with the handshake. deadline: of time.monotonic. Raises ValueError for credentials that cannot be
    used.
    """
    client = uri.credentials.client() if uri.tls else None
    sock = _reach(uri, deadline)
    line = _Line(sock, deadline)
    try:
        found = _negotiate(line, uri, client)
    except BaseException:
        if line.session is not None:
            line.session.close()
        sock.close()
        raise
    return Connected(sock, line.session, found)


class _Line:
    """The bytes of a connection during its handshake."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._socket = sock
        self._deadline = deadline
        self.session: TlsSession | None = None

    def send(self, data: bytes) -> None:
        if self.session is None:
            self._socket.settimeout(_left(self._deadline))
            self._socket.sendall(data)
            return
        while data or self.session.has_unsent:
            sent = self.session.send(data)
            data = data[sent:]
            if self.session.has_unsent or not sent:
                self._wait("write")

    def receive(self, count: int) -> bytes:
        """Exactly `count` bytes: those after them belong to the transmission phase."""
        received = bytearray()
        while len(received) < count:
            more = self._some(count - len(received))
            if not more:
                raise ConnectionResetError(errno.ECONNRESET, "the server closed the connection during the handshake")
            received += more
        return bytes(received)

    def begin(self, client: TlsClient, host: str) -> None:
        """Begins TLS."""
        self._socket.setblocking(False)
        self.session = client.connect(self._socket.fileno(), host)
        while (wanted := self.session.handshake()) != "done":
            self._wait(wanted)

    def _some(self, count: int) -> bytes:
        if self.session is None:
            self._socket.settimeout(_left(self._deadline))
            return self._socket.recv(count)
        while (more := self.session.receive(count)) is None:
            self._wait("read")
        return more

    def _wait(self, wanted: Literal["read", "write"]) -> None:
        poller = select.poll()
        poller.register(self._socket, select.POLLIN if wanted == "read" else select.POLLOUT)
        if not poller.poll(_left(self._deadline) * 1000):
            _left(self._deadline)


def _reach(uri: NbdUri, deadline: float) -> socket.socket:
    if uri.transport == "tcp":
        sock = _reach_host(uri.host, uri.port, deadline)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT)
        for option, value in _KEEP_ALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        return sock
    if uri.transport == "unix":
        return _connected(socket.AF_UNIX, uri.path, _left(deadline))
    return _connected(socket.AF_VSOCK, (int(uri.host), uri.port), _left(deadline))


def _reach_host(host: str, port: int, deadline: float) -> socket.socket:
    """Connects to one of the addresses of a host. They share the time until the deadline."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    refused: OSError | None = None
    for place, (family, _, _, _, address) in enumerate(found):
        try:
            return _connected(family, address, _left(deadline) / (len(found) - place))
        except OSError as error:
            refused = error
    raise refused or OSError(errno.EADDRNOTAVAIL, f"{host} has no address")


def _connected(family: int, address: Any, seconds: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(seconds)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _negotiate(line: _Line, uri: NbdUri, client: TlsClient | None) -> ServerExport:
    steps = dialogue(uri.export, starttls=client is not None)
    answer: bytes | None = None
    try:
        while True:
            wanted = next(steps) if answer is None else steps.send(answer)
            answer = b""
            if isinstance(wanted, int):
                answer = line.receive(wanted)
            elif wanted is not None:
                line.send(wanted)
            elif client is not None:
                line.begin(client, uri.credentials.host or uri.host)
    except StopIteration as stop:
        found: ServerExport = stop.value
        return found


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    return left
