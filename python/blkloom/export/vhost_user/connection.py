"""`Connection`: messages of one front-end, with descriptors, on a connected socket.

Reading may be cancelled at any time: what was received stays here, for the next call or another worker. Owns the socket
and all received descriptors. Runs on the event loop.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec

from blkloom.export.vhost_user.descriptors import Closing
from blkloom.export.vhost_user.messages import HEADER, MOST_REGIONS, Header, ProtocolError, request

_MOST_DESCRIPTORS: Final = MOST_REGIONS
"""Of a message."""
_MOST_AT_ONCE: Final = 253
"""Descriptors that the kernel passes together. All are received: the kernel would close the others here."""


class Message(msgspec.Struct):
    """A request of the front-end. descriptors: the receiver takes them out, or closes them."""

    header: Header
    payload: bytes
    descriptors: list[int]

    def take(self) -> int:
        """Takes the only descriptor. Raises ProtocolError."""
        if len(self.descriptors) != 1:
            what = f"request {self.header.request} has {len(self.descriptors)} descriptors in place of one"
            raise ProtocolError(what)
        return self.descriptors.pop()


class Connection:
    """A connection, which owns the socket. received, descriptors: of a former worker, which has not handled them.
    Raises OSError, without owning anything.
    """

    def __init__(self, connected: socket.socket, received: bytes = b"", descriptors: Sequence[int] = ()) -> None:
        self._watch = select.epoll()
        """Only for the end of the connection: it may be readable while messages wait."""
        self._watch.register(connected.fileno(), 0)
        self._socket = connected
        self._received = bytearray(received)
        self._descriptors = list(descriptors)
        self.closing = Closing()
        connected.setblocking(False)

    @property
    def socket(self) -> socket.socket:
        """The socket."""
        return self._socket

    @property
    def unhandled(self) -> tuple[bytes, list[int]]:
        """What was received and is no whole message, or was put back."""
        return bytes(self._received), self._descriptors

    async def receive(self) -> Message | None:
        """The next message. None: the front-end has closed the connection. Raises ProtocolError, OSError."""
        while True:
            needed = HEADER.size
            if len(self._received) >= needed:
                header = Header.parse(bytes(self._received[: HEADER.size]))
                needed += header.size
                if len(self._received) >= needed:
                    payload, descriptors = bytes(self._received[HEADER.size : needed]), self._descriptors
                    del self._received[:needed]
                    self._descriptors = []
                    return Message(header, payload, descriptors)
            if not await self._fill(needed - len(self._received)):
                return None

    def put_back(self, message: Message) -> None:
        """Makes a message that was not handled the next one."""
        header = message.header
        self._received[:0] = request(header.request, message.payload, needs_reply=header.needs_reply)
        self._descriptors[:0] = message.descriptors
        message.descriptors = []

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Sends an answer, as a whole or not at all. Raises OSError, ProtocolError."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            sent = self._socket.sendmsg([data], ancillary)
        except BlockingIOError as error:
            raise ProtocolError("the front-end reads no answers") from error
        if sent < len(data):
            raise ProtocolError("the front-end reads no answers")

    async def _fill(self, most: int) -> bool:
        """Receives up to so many bytes: never those of a later message, whose descriptors are another's. False: there
        are no more.
        """
        while True:
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    most, socket.CMSG_SPACE(_MOST_AT_ONCE * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await readable(self._socket)
                continue
            except ConnectionResetError:
                return False
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    got = array.array("i")
                    got.frombytes(content[: len(content) - len(content) % got.itemsize])
                    self._descriptors += got
            if flags & socket.MSG_CTRUNC:
                raise ProtocolError("a message with descriptors, and none are free here")
            if len(self._descriptors) > _MOST_DESCRIPTORS:
                raise ProtocolError(f"a message with more than {_MOST_DESCRIPTORS} descriptors")
            self._received += data
            return bool(data)

    @contextlib.contextmanager
    def calling_at_hang_up(self, call: Callable[[], None]) -> Iterator[None]:
        """Calls a function when the front-end hangs up, also if it has sent messages that were not received."""
        loop = asyncio.get_running_loop()

        def called() -> None:
            self._watch.modify(self._socket.fileno(), 0)
            loop.remove_reader(self._watch.fileno())
            call()

        self._watch.modify(self._socket.fileno(), select.EPOLLRDHUP)
        loop.add_reader(self._watch.fileno(), called)
        try:
            yield
        finally:
            loop.remove_reader(self._watch.fileno())
            self._watch.modify(self._socket.fileno(), 0)

    def hang_up(self) -> None:
        """Ends the connection, which may be closed a little later."""
        with contextlib.suppress(OSError):  # the front-end has closed it
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the connection, and descriptors of messages that were not handled."""
        self._watch.close()
        while self._descriptors:
            self.closing.close(self._descriptors.pop())
        self.closing.close(self._socket.detach())  # the kernel also closes the descriptors that were not received


async def readable(connected: socket.socket) -> None:
    """Waits until there is something to receive, or to accept."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(connected.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connected.fileno())
