"""Channel for messages and descriptors over a connected Unix stream socket, for one asyncio event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Any

from blkloom.control.framing import Arrivals, ChannelClosed, PeerStalled, ancillary_of, encode


class AsyncChannel:
    """A channel. expected: type of the received messages (a Struct or a union of tagged ones). One task receives; any
    task may send. stall: seconds without progress of a send before the channel is closed; None: no limit.
    """

    def __init__(self, connected: socket.socket, expected: Any, *, stall: float | None = None) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._arrivals = Arrivals(expected)
        self._sending = asyncio.Lock()
        self._stall = stall
        self._waiting: set[asyncio.Future[None]] = set()
        self._closed = False

    def fileno(self) -> int:
        """Descriptor of the socket."""
        return self._socket.fileno()

    async def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """Sends a message. The caller owns the descriptors and keeps them open until this returns. Raises
        ChannelClosed, PeerStalled. If a send is cancelled half-way, the channel is closed.
        """
        line = memoryview(encode(message, fds))
        ancillary = ancillary_of(fds)
        async with self._sending:
            whole = False
            sent = 0
            try:
                while sent < len(line):
                    self._check_open()
                    try:
                        sent += self._socket.sendmsg([line[sent:]], ancillary, socket.MSG_NOSIGNAL)
                        ancillary = []
                    except BlockingIOError:
                        await self._writable()
                    except OSError as error:
                        raise ChannelClosed(error.errno, f"the connection broke: {error.strerror}") from error
                whole = True
            finally:
                if not whole and sent:
                    self._close()

    async def _writable(self) -> None:
        try:
            async with asyncio.timeout(self._stall):
                await self._ready(writing=True)
        except TimeoutError:
            self._close()
            raise PeerStalled(f"the other side has taken nothing for {self._stall:g} s") from None

    @property
    def length(self) -> int:
        """Size in bytes of the last received message."""
        return self._arrivals.length

    async def receive(self) -> tuple[Any, list[int]]:
        """Receives the next message and its descriptors. Raises ChannelClosed, BadMessage."""
        while True:
            self._check_open()
            if (found := self._arrivals.next()) is not None:
                return found
            try:
                self._arrivals.receive(self._socket)
            except BlockingIOError:
                await self._ready(writing=False)

    async def _ready(self, *, writing: bool) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        add, remove = (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)
        descriptor = self._socket.fileno()
        add(descriptor, _wake, ready)
        self._waiting.add(ready)
        try:
            await ready
        finally:
            self._waiting.discard(ready)
            if not self._closed:  # after a close the number may belong to another file
                remove(descriptor)

    def _check_open(self) -> None:
        if self._closed:
            raise ChannelClosed("the connection has been closed")

    async def close(self) -> None:
        """Closes the connection. Waiting tasks get ChannelClosed. A second call does nothing."""
        self._close()

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if (descriptor := self._socket.fileno()) >= 0:
            loop = asyncio.get_running_loop()
            loop.remove_reader(descriptor)
            loop.remove_writer(descriptor)
        self._arrivals.close()
        self._socket.close()
        for ready in self._waiting:
            _wake(ready)


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
