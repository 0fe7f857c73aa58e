"""Messages of the vhost-user protocol: bytes to values and back.

Pure. A message is a header (request, flags, size of the payload) and a payload; numbers are in the order of the CPU.
Source: QEMU docs/interop/vhost-user.rst.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Final, Self

import msgspec

from blkloom.errors import BlkloomError

HEADER: Final = struct.Struct("=III")
MOST_PAYLOAD: Final = 4096
"""Bytes of a payload. The longest is a memory table, of 264 bytes, or a configuration, of 268."""
MOST_REGIONS: Final = 8
"""Regions of a memory table."""
MOST_SLOTS: Final = 64
"""Regions that are added one by one."""
MOST_CONFIGURATION: Final = 256
_VERSION: Final = 1
_VERSION_BITS: Final = 3
_REPLY: Final = 1 << 2
_NEEDS_REPLY: Final = 1 << 3

_U64: Final = struct.Struct("=Q")
_PAIR: Final = struct.Struct("=II")
_ADDRESSES: Final = struct.Struct("=IIQQQQ")
_REGION: Final = struct.Struct("=QQQQ")
_SINGLE_REGION: Final = struct.Struct("=QQQQQ")
_CONFIGURATION: Final = struct.Struct("=III")
_INFLIGHT: Final = struct.Struct("=QQHHI")
"""The C structure ends with padding."""
_INFLIGHT_LEAST: Final = 20
_LOG: Final = struct.Struct("=QQ")
_VRING_LOG: Final = 1
"""Flag of a vring: VHOST_VRING_F_LOG."""


class Request(IntEnum):
    """Requests of the front-end, as far as they are known here."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38


CONFIGURATION_CHANGED: Final = 2
"""Request of the back-end: the front-end is to read the configuration again."""


class Feature(IntFlag):
    """Features of virtio, of a virtio block device, and of the protocol itself."""

    SIZE_MAX = 1 << 1
    SEG_MAX = 1 << 2
    READ_ONLY = 1 << 5
    BLOCK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    CACHE_SWITCH = 1 << 11
    """VIRTIO_BLK_F_CONFIG_WCE."""
    QUEUES = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14
    LOG = 1 << 26
    """Written pages are marked in a log (VHOST_F_LOG_ALL): the front-end negotiates it during a live migration."""
    INDIRECT = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL = 1 << 30
    """The other features of the protocol can be negotiated."""
    VERSION_1 = 1 << 32


class ProtocolFeature(IntFlag):
    """Features of the protocol."""

    QUEUES = 1 << 0
    LOG_MEMORY = 1 << 1
    """The log is memory of the front-end (LOG_SHMFD)."""
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIGURATION = 1 << 9
    INFLIGHT = 1 << 12
    MEMORY_SLOTS = 1 << 15
    """Regions of memory are added and removed one by one."""


class ProtocolError(BlkloomError):
    """A front-end has broken the protocol, or asks for something that is not served."""


class Header(msgspec.Struct, frozen=True):
    """A header. request: a `Request`, if it is known. size: of the payload."""

    request: int
    needs_reply: bool
    size: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Raises ProtocolError."""
        request, flags, size = HEADER.unpack(data)
        if flags & _VERSION_BITS != _VERSION or flags & _REPLY:
            raise ProtocolError(f"a message with the flags {flags:#x} is no request of version {_VERSION}")
        if size > MOST_PAYLOAD:
            raise ProtocolError(f"a payload of {size} bytes for request {request}; {MOST_PAYLOAD} are possible")
        return cls(request, bool(flags & _NEEDS_REPLY), size)


def reply(request: int, payload: bytes) -> bytes:
    """The answer of a request."""
    return HEADER.pack(request, _VERSION | _REPLY, len(payload)) + payload


def request(number: int, payload: bytes = b"", *, needs_reply: bool = False) -> bytes:
    """A request, of either side."""
    return HEADER.pack(number, _VERSION | (_NEEDS_REPLY if needs_reply else 0), len(payload)) + payload


def number(value: int) -> bytes:
    """A payload that is a number of 64 bits."""
    return _U64.pack(value)


def parse_number(payload: bytes) -> int:
    """A number of 64 bits. Raises ProtocolError."""
    (value,) = _unpacked(_U64, payload)
    return int(value)


class VringValue(msgspec.Struct, frozen=True):
    """A number that concerns a vring."""

    vring: int
    value: int

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Raises ProtocolError."""
        return cls(*_unpacked(_PAIR, payload))

    def format(self) -> bytes:
        """As a payload."""
        return _PAIR.pack(self.vring, self.value)


class VringAddresses(msgspec.Struct, frozen=True):
    """User addresses of the areas of a vring. log: guest address of the used ring, for the log."""

    vring: int
    flags: int
    descriptors: int
    used: int
    available: int
    log: int = 0

    @property
    def used_log(self) -> int | None:
        """Where stores to the used ring are marked in the log. None: they are not."""
        return self.log if self.flags & _VRING_LOG else None

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Raises ProtocolError."""
        return cls(*_unpacked(_ADDRESSES, payload))

    def format(self) -> bytes:
        """As a payload."""
        return _ADDRESSES.pack(self.vring, self.flags, self.descriptors, self.used, self.available, self.log)


class VringEvent(msgspec.Struct, frozen=True):
    """An eventfd of a vring. present: it comes with the message; otherwise there is none."""

    vring: int
    present: bool

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Raises ProtocolError."""
        value = parse_number(payload)
        return cls(value & 0xFF, not value & 0x100)

    def format(self) -> bytes:
        """As a payload."""
        return number(self.vring | (0 if self.present else 0x100))


class Region(msgspec.Struct, frozen=True):
    """A region of a memory table. Its file comes with the message."""

    guest: int
    size: int
    user: int
    offset: int

    def format(self) -> bytes:
        """As a part of a payload."""
        return _REGION.pack(self.guest, self.size, self.user, self.offset)


def parse_regions(payload: bytes) -> list[Region]:
    """A memory table. Raises ProtocolError."""
    count, _ = _unpacked(_PAIR, payload[: _PAIR.size])
    regions = payload[_PAIR.size :]
    if count > MOST_REGIONS or len(regions) < count * _REGION.size:
        raise ProtocolError(f"a memory table of {count} regions in {len(payload)} bytes; {MOST_REGIONS} are possible")
    return [Region(*_REGION.unpack_from(regions, at * _REGION.size)) for at in range(count)]


def parse_region(payload: bytes) -> Region:
    """One region. Raises ProtocolError."""
    _, *region = _unpacked(_SINGLE_REGION, payload)
    return Region(*region)


def format_regions(regions: list[Region]) -> bytes:
    """A memory table."""
    return _PAIR.pack(len(regions), 0) + b"".join(region.format() for region in regions)


class Configuration(msgspec.Struct, frozen=True):
    """A part of the configuration space. flags: why it is set."""

    offset: int
    size: int
    flags: int
    data: bytes = b""

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Raises ProtocolError."""
        offset, size, flags = _unpacked(_CONFIGURATION, payload[: _CONFIGURATION.size])
        return cls(offset, size, flags, payload[_CONFIGURATION.size :])

    def format(self) -> bytes:
        """As a payload."""
        return _CONFIGURATION.pack(self.offset, self.size, self.flags) + self.data


class Inflight(msgspec.Struct, frozen=True):
    """Memory for the requests in flight of all queues. size, offset: of the memory in its file."""

    size: int
    offset: int
    queues: int
    queue_size: int

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Raises ProtocolError."""
        if len(payload) < _INFLIGHT_LEAST:
            raise ProtocolError(f"a payload of {len(payload)} bytes in place of {_INFLIGHT_LEAST}")
        size, offset, queues, queue_size, _ = _INFLIGHT.unpack(payload[: _INFLIGHT.size].ljust(_INFLIGHT.size, b"\0"))
        return cls(size, offset, queues, queue_size)

    def format(self) -> bytes:
        """As a payload."""
        return _INFLIGHT.pack(self.size, self.offset, self.queues, self.queue_size, 0)


class Log(msgspec.Struct, frozen=True):
    """Memory for the log of written pages. size, offset: of the memory in its file."""

    size: int
    offset: int

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Raises ProtocolError."""
        return cls(*_unpacked(_LOG, payload))

    def format(self) -> bytes:
        """As a payload."""
        return _LOG.pack(self.size, self.offset)


def _unpacked(form: struct.Struct, payload: bytes) -> tuple[int, ...]:
    if len(payload) != form.size:
        raise ProtocolError(f"a payload of {len(payload)} bytes in place of {form.size}")
    return form.unpack(payload)
