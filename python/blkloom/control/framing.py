"""Framing of messages and descriptors on a Unix stream socket, without blocking.

A message is a line of JSON. Its descriptors are sent with the first bytes of the line (SCM_RIGHTS), and its field `fds`
counts them. So a receiver that gets several lines at once, or a line in parts, assigns the descriptors correctly. The
receiver owns what it has received; after any error no descriptor is leaked. Source: unix(7), cmsg(3).
"""

from __future__ import annotations

import array
import functools
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from blkloom import json_text
from blkloom.control.messages import LONGEST_LINE, MOST_DESCRIPTORS
from blkloom.errors import UsageError
from blkloom.printing import quoted

_PIECE: Final = 256 << 10
_ROOM: Final = socket.CMSG_SPACE(253 * struct.calcsize("i"))
"""Buffer size for the most descriptors that the kernel passes at once (SCM_MAX_FD)."""


class ChannelClosed(ConnectionError):
    """The other side has closed the connection."""


class PeerStalled(ChannelClosed):
    """The other side has not read for too long; the channel has been closed."""


class BadMessage(ConnectionError):
    """The other side does not follow the protocol; the channel cannot be used any more."""


class InvalidMessage(BadMessage):
    """A message has an invalid value; the channel can still be used. id: of the message, or None."""

    def __init__(self, what: str, identifier: int | None) -> None:
        super().__init__(what)
        self.id = identifier


class _Envelope(msgspec.Struct):
    """The readable part of an invalid message."""

    id: int | None = None
    fds: int = 0


@functools.cache
def decoder_of(expected: Any) -> msgspec.json.Decoder[Any]:
    """The decoder for messages of this type. Made only once, because it takes a megabyte in each worker."""
    return msgspec.json.Decoder(expected)


def encode(message: Any, descriptors: Sequence[int]) -> bytes:
    """Encodes a message as a line, and sets its `fds` to the number of descriptors. Raises UsageError for text that
    cannot be a path.
    """
    if descriptors or hasattr(message, "fds"):
        message.fds = len(descriptors)
    if len(descriptors) > MOST_DESCRIPTORS:
        raise ValueError(f"{len(descriptors)} descriptors in a message, {MOST_DESCRIPTORS} are the most")
    try:
        return json_text.encode(message) + b"\n"
    except OverflowError as error:
        raise UsageError(f"{type(message).__name__}: {error}", cure="numbers in messages have 64 bits") from error
    except UnicodeEncodeError as error:
        raise UsageError(
            f"'{error.object}' cannot be said: it is not Unicode", cure="use names and paths that are"
        ) from error


def ancillary_of(descriptors: Sequence[int]) -> list[tuple[int, int, bytes]]:
    """Ancillary data for sendmsg(2)."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors).tobytes())] if descriptors else []


def _explain(line: bytes, error: str) -> str:
    """Adds the offending value to an error of the decoder."""
    what, at, path = error.partition(" - at `$.")
    if not at:
        return f"{error}: {quoted(line[:200])}"
    try:
        value = msgspec.json.decode(line)
    except msgspec.MsgspecError:  # a number with thousands of digits
        return f"{error}: {quoted(line[:200])}"
    names = path.removesuffix("`").split(".")
    for name in names:
        if not isinstance(value, dict) or name not in value:
            return f"{error}: {quoted(line[:200])}"
        value = value[name]
    if isinstance(value, str):
        shown = quoted(value[:100].encode("utf-8", "surrogatepass"))
    else:
        shown = str(value) if isinstance(value, float) else msgspec.json.encode(value).decode()[:100]
    return f"{names[-1]} is {shown}: {what}"


class Arrivals:
    """Buffer of received bytes and descriptors."""

    def __init__(self, expected: Any) -> None:
        self._decoder = decoder_of(expected)
        self._pieces = bytearray()
        self._seen = 0
        self._descriptors: deque[int | None] = deque()
        """None marks lost descriptors of a message: this process had no free ones."""
        self.length = 0
        """Size of the message that `next` has returned last."""

    def receive(self, connected: socket.socket, flags: int = 0) -> None:
        """Receives the available bytes. Raises ChannelClosed at end of stream, BlockingIOError if there are none."""
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
            self._descriptors.append(None)
        if not data:
            raise ChannelClosed("the other side has closed the connection")
        if len(self._descriptors) > 2 * MOST_DESCRIPTORS:  # no receive while a message is complete
            raise BadMessage(f"{len(self._descriptors)} descriptors have come that no message promises")
        self._pieces += data
        if len(self._pieces) > LONGEST_LINE:
            raise BadMessage(f"a message is longer than {LONGEST_LINE} bytes")

    def next(self) -> tuple[Any, list[int]] | None:
        """The next complete message and its descriptors. These are fewer than its `fds` if this process had no free
        ones. Raises BadMessage; or InvalidMessage, after which more messages may follow.
        """
        end = self._pieces.find(b"\n", self._seen)
        if end < 0:
            self._seen = len(self._pieces)
            return None
        line = bytes(self._pieces[:end])
        del self._pieces[: end + 1]
        self._seen = 0
        self.length = len(line)
        try:
            message = json_text.decode(line, self._decoder)
        except msgspec.ValidationError as error:
            raise self._invalid(line, error) from error
        except msgspec.MsgspecError as error:
            raise BadMessage(f"not understood: {error}: {quoted(line[:200])}") from error
        return message, self._take(getattr(message, "fds", 0))

    def _take(self, count: int) -> list[int]:
        if count < 0 or (count > len(self._descriptors) and None not in self._descriptors):
            raise BadMessage(f"a message promises {count} descriptors, {len(self._descriptors)} have come")
        taken: list[int] = []
        while len(taken) < count:  # the descriptors of a message come together, so later ones belong to other messages
            if (fd := self._descriptors.popleft()) is None:
                break
            taken.append(fd)
        return taken

    def _invalid(self, line: bytes, error: msgspec.ValidationError) -> BadMessage:
        try:
            envelope = msgspec.json.decode(line, type=_Envelope)
        except msgspec.MsgspecError:
            return BadMessage(f"not understood: {error}: {quoted(line[:200])}")
        for descriptor in self._take(envelope.fds):
            os.close(descriptor)
        return InvalidMessage(_explain(line, str(error)), envelope.id)

    def close(self) -> None:
        """Closes the remaining descriptors."""
        while self._descriptors:
            if (fd := self._descriptors.popleft()) is not None:
                os.close(fd)
