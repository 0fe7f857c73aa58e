"""Messages and descriptors over a connected Unix stream socket, for threads and for asyncio.

A message is a line of JSON. Its descriptors ride with the line's first bytes (SCM_RIGHTS), and its
`fds` says how many there are, so a receiver that gets several lines at once, or one in pieces, gives
each its own. What is received belongs to the receiver; whatever goes wrong, no descriptor is leaked.
A `Channel` may be sent on by several threads and received from by one; an `AsyncChannel` belongs to
its event loop. Source: unix(7), cmsg(3).
"""

from __future__ import annotations

import array
import asyncio
import functools
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from blkloom.control.messages import LONGEST_LINE, MOST_DESCRIPTORS
from blkloom.errors import UsageError

_PIECE: Final = 256 << 10
_ROOM: Final = socket.CMSG_SPACE(253 * struct.calcsize("i"))
"""For as many descriptors as the kernel passes at once (SCM_MAX_FD)."""
_ENCODER: Final = msgspec.json.Encoder()


class ChannelClosed(ConnectionError):
    """The other side has gone."""


class BadMessage(ConnectionError):
    """The other side does not speak this protocol; the channel is of no use any more."""


@functools.cache
def decoder_of(expected: Any) -> msgspec.json.Decoder[Any]:
    """The decoder for messages of that type: made once, because making it costs a worker a megabyte."""
    return msgspec.json.Decoder(expected)


def _line(message: Any, descriptors: Sequence[int]) -> bytes:
    """The message as a line. Its `fds` is set to how many descriptors go along. Raises UsageError for
    text that is not UTF-8.
    """
    if descriptors or hasattr(message, "fds"):
        message.fds = len(descriptors)
    if len(descriptors) > MOST_DESCRIPTORS:
        raise ValueError(f"{len(descriptors)} descriptors in a message, {MOST_DESCRIPTORS} are the most")
    try:
        return _ENCODER.encode(message) + b"\n"
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{error.object!r} cannot be said: it is not UTF-8", cure="use names and paths that are"
        ) from error


def _with_descriptors(descriptors: Sequence[int]) -> list[tuple[int, int, bytes]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors).tobytes())] if descriptors else []


class _Arrivals:
    """What has been received and not been asked for."""

    def __init__(self, expected: Any) -> None:
        self._decoder = decoder_of(expected)
        self._pieces = bytearray()
        self._seen = 0
        self._descriptors: deque[int] = deque()

    def receive(self, connected: socket.socket, flags: int = 0) -> None:
        """Takes what has come. Raises ChannelClosed at the end, BlockingIOError where nothing has come."""
        try:
            data, ancillary, message_flags, _ = connected.recvmsg(_PIECE, _ROOM, flags | socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            raise
        except OSError as error:
            raise ChannelClosed(error.errno, f"the connection broke: {error.strerror}") from error
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                self._descriptors.extend(numbers)
        if message_flags & socket.MSG_CTRUNC:
            raise BadMessage("descriptors were lost on the way; raise the limit of open files (ulimit -n)")
        if not data:
            raise ChannelClosed("the other side has closed the connection")
        self._pieces += data
        if len(self._pieces) > LONGEST_LINE:
            raise BadMessage(f"a message is longer than {LONGEST_LINE} bytes")

    def next(self) -> tuple[Any, list[int]] | None:
        """The next whole message. Raises BadMessage."""
        end = self._pieces.find(b"\n", self._seen)
        if end < 0:
            self._seen = len(self._pieces)
            return None
        line = bytes(self._pieces[:end])
        del self._pieces[: end + 1]
        self._seen = 0
        try:
            message = self._decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise BadMessage(f"not understood: {error}: {line[:200]!r}") from error
        count = getattr(message, "fds", 0)
        if not 0 <= count <= len(self._descriptors):
            raise BadMessage(f"a message promises {count} descriptors, {len(self._descriptors)} have come")
        return message, [self._descriptors.popleft() for _ in range(count)]

    def close(self) -> None:
        """Closes the descriptors nobody has asked for."""
        while self._descriptors:
            os.close(self._descriptors.popleft())


class Channel:
    """Blocking. expected: the type of messages that come (a Struct or a union of tagged ones)."""

    def __init__(self, connected: socket.socket, expected: Any) -> None:
        connected.setblocking(True)
        self._socket = connected
        self._arrivals = _Arrivals(expected)
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """The socket's."""
        return self._socket.fileno()

    def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """Sends; the descriptors stay the caller's. Raises ChannelClosed."""
        line = _line(message, fds)
        with self._sending:
            try:
                sent = self._socket.sendmsg([line], _with_descriptors(fds), socket.MSG_NOSIGNAL)
                if sent < len(line):
                    self._socket.sendall(line[sent:])
            except OSError as error:
                raise ChannelClosed(error.errno, f"the connection broke: {error.strerror}") from error

    def receive(self, timeout: float | None = None) -> tuple[Any, list[int]]:
        """The next message and its descriptors. timeout: seconds. Raises ChannelClosed, BadMessage,
        TimeoutError.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (found := self._arrivals.next()) is None:
            if deadline is not None and self._socket.fileno() >= 0:
                left = max(0.0, deadline - time.monotonic())
                waiting = select.poll()  # select(2) knows no descriptors above 1023
                waiting.register(self._socket, select.POLLIN)
                if not waiting.poll(left * 1000):
                    raise TimeoutError(f"no answer within {timeout:g} s")
            self._arrivals.receive(self._socket)
        return found

    def close(self) -> None:
        """Ends the connection. Does no harm twice."""
        self._arrivals.close()
        self._socket.close()


class AsyncChannel:
    """The same on the running event loop. One task receives; any may send."""

    def __init__(self, connected: socket.socket, expected: Any) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._arrivals = _Arrivals(expected)
        self._sending = asyncio.Lock()
        self._waiting: set[asyncio.Future[None]] = set()
        self._closed = False

    def fileno(self) -> int:
        """The socket's."""
        return self._socket.fileno()

    async def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """Sends; the descriptors stay the caller's, who keeps them open until this returns. Raises
        ChannelClosed. A send that is cancelled half-way ends the channel.
        """
        line = memoryview(_line(message, fds))
        ancillary = _with_descriptors(fds)
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
                        await self._ready(writing=True)
                    except OSError as error:
                        raise ChannelClosed(error.errno, f"the connection broke: {error.strerror}") from error
                whole = True
            finally:
                if not whole and sent:
                    self._close()

    async def receive(self) -> tuple[Any, list[int]]:
        """The next message and its descriptors. Raises ChannelClosed, BadMessage."""
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
            if not self._closed:  # closing has removed it, and the number may be somebody else's by now
                remove(descriptor)

    def _check_open(self) -> None:
        if self._closed:
            raise ChannelClosed("the connection has been closed")

    async def close(self) -> None:
        """Ends the connection; whoever waits on it gets ChannelClosed. Does no harm twice."""
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
