"""Values of the ublk driver's interface: features, information about a device, its parameters.

Pure: bytes to values and back. Source: Linux include/uapi/linux/ublk_cmd.h, Documentation/block/ublk.rst.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Final

import msgspec

from blkloom.units import SECTOR

NEW: Final = (1 << 32) - 1
"""Number of a device for which the driver is to choose one."""
FEATURES_LENGTH: Final = 8

_INFO: Final = struct.Struct("=HHHHIIiIQQIIQQ")
_BASIC: Final = struct.Struct("=IBBBBIIQQ")
_DISCARD: Final = struct.Struct("=IIIIHH")
_HEADER: Final = struct.Struct("=II")
_HAS_BASIC, _HAS_DISCARD = 1, 2
_READ_ONLY, _ROTATIONAL, _VOLATILE_CACHE, _FUA = 1, 2, 4, 8
_MOST_SECTORS: Final = ((1 << 32) - 1) // SECTOR


class Feature(IntFlag):
    """Bits of a device's flags, and of GET_FEATURES."""

    USER_RECOVERY = 1 << 3
    """Requests wait for another server when one ends."""
    USER_RECOVERY_REISSUE = 1 << 4
    """Those that a server had and did not answer, too; otherwise they fail."""
    COMMANDS_ENCODED = 1 << 6
    """Commands have numbers as of ioctl(2)."""
    USER_RECOVERY_FAIL_IO = 1 << 9
    """Requests fail while there is no server."""
    UPDATE_SIZE = 1 << 10
    """The size may change."""
    QUIESCE = 1 << 12
    """A server may have the driver send it no more requests, before it ends."""
    NO_AUTO_PART_SCAN = 1 << 18
    """The driver does not read the partition table when the device is started."""


class State(IntEnum):
    """Of a device."""

    DEAD = 0
    """It has no block device: not yet, or no longer."""
    LIVE = 1
    QUIESCED = 2
    """It has no server, and requests wait for one."""
    FAIL_IO = 3
    """It has no server, and requests fail."""


class DeviceInfo(msgspec.Struct, frozen=True, kw_only=True):
    """struct ublksrv_ctrl_dev_info. most_bytes: of a read or write. tag: 64 bits of the server that made the device,
    which mean nothing to the driver.
    """

    queues: int
    depth: int
    most_bytes: int
    number: int = NEW
    state: int = State.DEAD
    server: int = 0
    """Process id; -1 or 0 for none."""
    flags: int = 0
    tag: int = 0

    @classmethod
    def parse(cls, data: bytes) -> DeviceInfo:
        """Raises struct.error."""
        queues, depth, state, _, most_bytes, number, server, _, flags, tag, *_ = _INFO.unpack(data)
        return cls(
            queues=queues,
            depth=depth,
            most_bytes=most_bytes,
            number=number,
            state=state,
            server=server,
            flags=flags,
            tag=tag,
        )

    def format(self) -> bytes:
        """As ADD_DEV wants it."""
        return _INFO.pack(
            self.queues,
            self.depth,
            self.state,
            0,
            self.most_bytes,
            self.number,
            self.server,
            0,
            self.flags,
            self.tag,
            0,
            0,
            0,
            0,
        )


INFO_LENGTH: Final = _INFO.size


class Parameters(msgspec.Struct, frozen=True, kw_only=True):
    """struct ublk_params, as far as it is used. Bytes; block sizes are powers of two. discard: 0 for none, else the
    granularity.
    """

    size: int
    logical: int = SECTOR
    physical: int = 4096
    minimum: int = 4096
    optimal: int = 4096
    most_bytes: int
    discard: int = 4096
    read_only: bool = False
    rotational: bool = False

    def format(self) -> bytes:
        """As SET_PARAMS wants it."""
        attributes = _VOLATILE_CACHE | _FUA
        attributes |= _READ_ONLY * self.read_only | _ROTATIONAL * self.rotational
        basic = _BASIC.pack(
            attributes,
            _shift(self.logical),
            _shift(self.physical),
            _shift(self.optimal),
            _shift(self.minimum),
            self.most_bytes // SECTOR,
            0,
            self.size // SECTOR,
            0,
        )
        # A multiple of the granularity, so that no discard ends in the middle of a block.
        longest = _MOST_SECTORS // (self.discard // SECTOR) * (self.discard // SECTOR) if self.discard else 0
        zeroes = 0 if self.read_only else _MOST_SECTORS
        discard = _DISCARD.pack(0, self.discard or self.logical, longest, zeroes, min(longest, 1), 0)
        whole = basic + discard
        return _HEADER.pack(_HEADER.size + len(whole), _HAS_BASIC | _HAS_DISCARD) + whole


def parse_features(data: bytes) -> Feature:
    """What GET_FEATURES has written. Bits without a name are kept."""
    return Feature(int.from_bytes(data, "little" if _is_little() else "big"))


def _is_little() -> bool:
    return struct.pack("=H", 1)[0] == 1


def _shift(size: int) -> int:
    """The exponent of a power of two."""
    return size.bit_length() - 1
