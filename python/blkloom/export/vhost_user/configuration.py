"""Features and configuration space of a device as a virtio block device.

Pure. Source: VIRTIO 1.2, 5.2 Block Device; linux/virtio_blk.h.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from blkloom.export.vhost_user.messages import MOST_CONFIGURATION, Feature, ProtocolFeature
from blkloom.units import SECTOR

MOST_QUEUES: Final = 64
MOST_DESCRIPTORS: Final = 1024
"""Of a queue; the engine has the same limit."""
_MOST_PIECES: Final = 126
"""Of a read or write: with header and status, the smallest queue that is in use (128) has room for a chain of them."""
_LONGEST_PIECE: Final = 256 << 10
"""So that no read or write is longer than the engine's limit of 32 MiB."""
_MOST_SEGMENTS: Final = 32
"""Of a request to discard or to write zeroes; the engine has the same limit."""
_LONGEST_RANGE: Final = 2 << 30
LARGEST_BLOCK: Final = 4096

_SPACE: Final = struct.Struct("<QII4xIBBHIBxHIIIIIB3x")
WRITE_CACHE: Final = 32
"""Offset of the only field that the driver may change: one byte, 1 for a write cache."""

PROTOCOL_FEATURES: Final = (
    ProtocolFeature.QUEUES
    | ProtocolFeature.LOG_MEMORY
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIGURATION
    | ProtocolFeature.INFLIGHT
    | ProtocolFeature.MEMORY_SLOTS
)


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """What the configuration depends on. Bytes; block sizes are powers of two."""

    size: int
    logical: int = SECTOR
    optimal: int = LARGEST_BLOCK
    discard: int = LARGEST_BLOCK
    """Granularity."""
    read_only: bool = False
    write_cache: bool = True
    raw: bool = False
    """See `Device.is_raw`."""

    def features(self) -> Feature:
        """The features that are offered."""
        offered = (
            Feature.SIZE_MAX
            | Feature.SEG_MAX
            | Feature.BLOCK_SIZE
            | Feature.FLUSH
            | Feature.TOPOLOGY
            | Feature.CACHE_SWITCH
            | Feature.QUEUES
            | Feature.INDIRECT
            | Feature.EVENT_IDX
            | Feature.PROTOCOL
            | Feature.VERSION_1
        )
        offered |= Feature.LOG if self.raw else Feature(0)
        return offered | (Feature.READ_ONLY if self.read_only else Feature.DISCARD | Feature.WRITE_ZEROES)

    def space(self) -> bytes:
        """The configuration space, filled up with zeros to the longest that a front-end reads."""
        physical = max(self.logical, LARGEST_BLOCK)
        most_sectors = _LONGEST_RANGE // SECTOR
        space = _SPACE.pack(
            self.size // SECTOR,
            _LONGEST_PIECE,
            _MOST_PIECES,
            self.logical,
            (physical // self.logical).bit_length() - 1,
            0,
            physical // self.logical,
            max(self.optimal, physical) // self.logical,
            self.write_cache,
            MOST_QUEUES,
            most_sectors,
            _MOST_SEGMENTS,
            max(self.discard, self.logical) // SECTOR,
            most_sectors,
            _MOST_SEGMENTS,
            1,
        )
        return space.ljust(MOST_CONFIGURATION, b"\0")
