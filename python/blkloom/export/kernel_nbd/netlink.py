"""Generic netlink: messages as bytes and back, and a socket for one command at a time.

Blocks until the kernel has answered, so it is called on threads. A library for this (pyroute2) takes 0.4 s to import,
which a worker that replaces another one would do while I/O waits. The tests compare the messages with that library's.
Source: Linux include/uapi/linux/netlink.h, genetlink.h, Documentation/userspace-api/netlink/intro.rst.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable
from types import TracebackType
from typing import Final, Self

_PROTOCOL: Final = 16
"""NETLINK_GENERIC."""
_HEADER: Final = struct.Struct("=IHHII")
_GENERIC: Final = struct.Struct("=BBH")
_ATTRIBUTE: Final = struct.Struct("=HH")
_REQUEST, _ACK = 1, 4
_ERROR: Final = 2
"""Message type of errors and acknowledgements."""
_CONTROL: Final = 16
"""The family that knows the other families."""
_GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 3, 1, 2
_TYPE_MASK: Final = (1 << 14) - 1
_LONGEST: Final = 1 << 16

Attribute = tuple[int, bytes]


def attribute(number: int, payload: bytes) -> bytes:
    """One attribute, padded to a multiple of four bytes."""
    length = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(length, number) + payload + bytes(-length % 4)


def attributes(given: Iterable[Attribute]) -> bytes:
    """Attributes one after the other, also as the payload of another one."""
    return b"".join(attribute(number, payload) for number, payload in given)


def parse_attributes(data: bytes) -> list[Attribute]:
    """The attributes in `data`. Raises ValueError if one is cut off."""
    found, at = [], 0
    while at < len(data):
        if len(data) - at < _ATTRIBUTE.size:
            raise ValueError(f"netlink: {len(data) - at} bytes at the end are no attribute")
        length, number = _ATTRIBUTE.unpack_from(data, at)
        if not _ATTRIBUTE.size <= length <= len(data) - at:
            raise ValueError(f"netlink: an attribute of {length} bytes, {len(data) - at} are left")
        found.append((number & _TYPE_MASK, data[at + _ATTRIBUTE.size : at + length]))
        at += length + -length % 4
    return found


def message(family: int, command: int, given: Iterable[Attribute], *, version: int, sequence: int) -> bytes:
    """A request that the kernel acknowledges."""
    body = _GENERIC.pack(command, version, 0) + attributes(given)
    return _HEADER.pack(_HEADER.size + len(body), family, _REQUEST | _ACK, sequence, 0) + body


def parse_messages(data: bytes) -> list[tuple[int, int, bytes]]:
    """(type, sequence, body) of each message in a datagram. Raises ValueError if one is cut off."""
    found, at = [], 0
    while at < len(data):
        if len(data) - at < _HEADER.size:
            raise ValueError(f"netlink: {len(data) - at} bytes at the end are no message")
        length, kind, _, sequence, _ = _HEADER.unpack_from(data, at)
        if not _HEADER.size <= length <= len(data) - at:
            raise ValueError(f"netlink: a message of {length} bytes, {len(data) - at} are left")
        found.append((kind, sequence, data[at + _HEADER.size : at + length]))
        at += length + -length % 4
    return found


class GenericNetlink:
    """A socket to the kernel. Use it as `with`, on one thread."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _PROTOCOL)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._socket.close()

    def family(self, name: str) -> int:
        """The number of a family. Raises OSError: ENOENT if the kernel, or this network namespace, does not have it."""
        wanted = [(_FAMILY_NAME, name.encode() + b"\0")]
        for reply in self.call(_CONTROL, _GET_FAMILY, wanted, version=1):
            if _FAMILY_ID in reply:
                return int.from_bytes(reply[_FAMILY_ID], "little" if _is_little() else "big")
        raise FileNotFoundError(errno.ENOENT, f"generic netlink has no family '{name}'")

    def call(self, family: int, command: int, given: Iterable[Attribute], *, version: int) -> list[dict[int, bytes]]:
        """Sends a command and waits for its end. Returns the attributes of each reply. Raises OSError if it fails."""
        self._sequence += 1
        self._socket.send(message(family, command, given, version=version, sequence=self._sequence))
        replies: list[dict[int, bytes]] = []
        while True:
            for kind, sequence, body in parse_messages(self._socket.recv(_LONGEST)):
                if sequence != self._sequence:
                    continue
                if kind != _ERROR:
                    replies.append(dict(parse_attributes(body[_GENERIC.size :])))
                    continue
                (error,) = struct.unpack_from("=i", body)
                if error:
                    raise OSError(-error, os.strerror(-error))
                return replies


def _is_little() -> bool:
    return struct.pack("=H", 1)[0] == 1
