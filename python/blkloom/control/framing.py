"""Messages and descriptors as they cross a Unix stream socket, without waiting for any.

A message is a line of JSON. Its descriptors ride with the line's first bytes (SCM_RIGHTS), and its
`fds` says how many there are, so a receiver that gets several lines at once, or one in pieces, gives
each its own. What is received belongs to the receiver; whatever goes wrong, no descriptor is leaked.
Source: unix(7), cmsg(3).
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

from blkloom.control.messages import LONGEST_LINE, MOST_DESCRIPTORS
from blkloom.errors import UsageError

_PIECE: Final = 256 << 10
_ROOM: Final = socket.CMSG_SPACE(253 * struct.calcsize("i"))
"""For as many descriptors as the kernel passes at once (SCM_MAX_FD)."""
_ENCODER: Final = msgspec.json.Encoder()


class ChannelClosed(ConnectionError):
    """The other side has gone."""


class PeerStalled(ChannelClosed):
    """The other side has not taken what was sent to it for too long; the channel has been closed."""


class BadMessage(ConnectionError):
    """The other side does not speak this protocol; the channel is of no use any more."""


class InvalidMessage(BadMessage):
    """A message with a value that is none, or out of range; the channel can go on. id: the message's, or None."""

    def __init__(self, what: str, identifier: int | None) -> None:
        super().__init__(what)
        self.id = identifier


class _Envelope(msgspec.Struct):
    """What can be read of a message that is invalid."""

    id: int | None = None
    fds: int = 0


@functools.cache
def decoder_of(expected: Any) -> msgspec.json.Decoder[Any]:
    """The decoder for messages of that type: made once, because making it costs a worker a megabyte."""
    return msgspec.json.Decoder(expected)


def encode(message: Any, descriptors: Sequence[int]) -> bytes:
    """The message as a line. Its `fds` is set to how many descriptors go along. Raises UsageError for
    text that is not UTF-8.
    """
    if descriptors or hasattr(message, "fds"):
        message.fds = len(descriptors)
    if len(descriptors) > MOST_DESCRIPTORS:
        raise ValueError(f"{len(descriptors)} descriptors in a message, {MOST_DESCRIPTORS} are the most")
    try:
        return _ENCODER.encode(message) + b"\n"
    except OverflowError as error:
        raise UsageError(f"{message!r:.200}: {error}", cure="numbers in messages have 64 bits") from error
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{error.object!r} cannot be said: it is not UTF-8", cure="use names and paths that are"
        ) from error


def ancillary_of(descriptors: Sequence[int]) -> list[tuple[int, int, bytes]]:
    """What sendmsg takes to send them along."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors).tobytes())] if descriptors else []


def _explain(line: bytes, error: str) -> str:
    """The decoder's error with the value it is about."""
    what, at, path = error.partition(" - at `$.")
    if not at:
        return f"{error}: {line[:200]!r}"
    try:
        value = msgspec.json.decode(line)
    except msgspec.MsgspecError:  # a number with thousands of digits
        return f"{error}: {line[:200]!r}"
    names = path.removesuffix("`").split(".")
    for name in names:
        if not isinstance(value, dict) or name not in value:
            return f"{error}: {line[:200]!r}"
        value = value[name]
    return f"{names[-1]} is {value!r:.100}: {what}"


class Arrivals:
    """What has been received and not been asked for."""

    def __init__(self, expected: Any) -> None:
        self._decoder = decoder_of(expected)
        self._pieces = bytearray()
        self._seen = 0
        self._descriptors: deque[int | None] = deque()
        """None: the rest of a message's descriptors was lost, for want of free ones here."""
        self.length = 0
        """Bytes of the message that `next` returned last."""

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
            self._descriptors.append(None)
        if not data:
            raise ChannelClosed("the other side has closed the connection")
        if len(self._descriptors) > 2 * MOST_DESCRIPTORS:  # nothing is asked for while a message is whole
            raise BadMessage(f"{len(self._descriptors)} descriptors have come that no message promises")
        self._pieces += data
        if len(self._pieces) > LONGEST_LINE:
            raise BadMessage(f"a message is longer than {LONGEST_LINE} bytes")

    def next(self) -> tuple[Any, list[int]] | None:
        """The next whole message, and the descriptors that came with it: fewer than its `fds` where this process had no
        more free. Raises BadMessage; InvalidMessage, after which there may be others.
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
            message = self._decoder.decode(line)
        except msgspec.ValidationError as error:
            raise self._invalid(line, error) from error
        except msgspec.MsgspecError as error:
            raise BadMessage(f"not understood: {error}: {line[:200]!r}") from error
        return message, self._take(getattr(message, "fds", 0))

    def _take(self, count: int) -> list[int]:
        if count < 0 or (count > len(self._descriptors) and None not in self._descriptors):
            raise BadMessage(f"a message promises {count} descriptors, {len(self._descriptors)} have come")
        taken: list[int] = []
        while len(taken) < count:  # one message's ride together, so those behind a loss are not this one's
            if (fd := self._descriptors.popleft()) is None:
                break
            taken.append(fd)
        return taken

    def _invalid(self, line: bytes, error: msgspec.ValidationError) -> BadMessage:
        try:
            envelope = msgspec.json.decode(line, type=_Envelope)
        except msgspec.MsgspecError:
            return BadMessage(f"not understood: {error}: {line[:200]!r}")
        for descriptor in self._take(envelope.fds):
            os.close(descriptor)
        return InvalidMessage(_explain(line, str(error)), envelope.id)

    def close(self) -> None:
        """Closes the descriptors nobody has asked for."""
        while self._descriptors:
            if (fd := self._descriptors.popleft()) is not None:
                os.close(fd)
