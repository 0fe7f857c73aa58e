"""Channels: the bytes of a handshake, in plain text or over TLS.

Sockets are non-blocking, and there are no asyncio transports: a transport would read ahead. Runs on the event loop;
raises OSError.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol

from blkloom import _engine


class Channel(Protocol):
    """Bytes to and from a client."""

    async def receive(self, size: int) -> bytes:
        """Received bytes, at least one; b"": the client has closed its side."""

    async def send(self, data: bytes) -> None:
        """Sends all of the data."""


class PlainChannel:
    """A socket without encryption."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    async def receive(self, size: int) -> bytes:
        """See `Channel`."""
        return await asyncio.get_running_loop().sock_recv(self._socket, size)

    async def send(self, data: bytes) -> None:
        """See `Channel`."""
        await asyncio.get_running_loop().sock_sendall(self._socket, data)


class TlsChannel:
    """A TLS session on a socket."""

    def __init__(self, connected: socket.socket, session: _engine.TlsSession) -> None:
        self._socket = connected
        self._session = session

    async def handshake(self) -> None:
        """Runs the TLS handshake. Raises OSError: EPROTO if it fails."""
        while (wanted := self._session.handshake()) != "done":
            await _ready(self._socket, write=wanted == "write")

    async def receive(self, size: int) -> bytes:
        """See `Channel`."""
        while (received := self._session.receive(size)) is None:
            await _ready(self._socket, write=False)
        return received

    async def send(self, data: bytes) -> None:
        """See `Channel`."""
        while data:
            accepted = self._session.send(data)
            data = data[accepted:]
            if not accepted:
                await _ready(self._socket, write=True)
        while self._session.has_unsent:
            await _ready(self._socket, write=True)
            self._session.send(b"")


async def _ready(connected: socket.socket, *, write: bool) -> None:
    """Waits until a socket can be read, or written."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    descriptor = connected.fileno()
    watch, ignore = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    watch(descriptor, _set, ready)
    try:
        await ready
    finally:
        ignore(descriptor)


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
