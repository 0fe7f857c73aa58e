"""The numbers of NBD's handshake, named as the specification names them (without `NBD_`).

Source: proto.md "Values", "Handshake phase". Constants only.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

NBD_MAGIC: Final = 0x4E42444D41474943
"""`NBDMAGIC`, the first eight bytes a server sends."""
OPTION_MAGIC: Final = 0x49484156454F5054
"""`IHAVEOPT`: newstyle, and the beginning of every option."""
REPLY_MAGIC: Final = 0x0003E889045565A9
STRING_LIMIT: Final = 4096
"""Most bytes of a string of the protocol, in UTF-8 (proto.md "Conventions")."""
DEFAULT_PORT: Final = 10809
"""TCP port assigned by IANA."""
BASE_ALLOCATION: Final = "base:allocation"
"""The metadata context that every export has."""
DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"
"""The prefix of the names of all QEMU dirty bitmaps, which is also the query for all of them."""


class HandshakeFlag(IntFlag):
    """Handshake flags of the server's greeting (16 bits)."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(IntFlag):
    """Handshake flags of the client's answer (32 bits)."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlag(IntFlag):
    """Transmission flags of an export (16 bits)."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Option(IntEnum):
    """Options of a client."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Reply(IntEnum):
    """Option replies of a server; errors have bit 31 set and carry a message for the user."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 1 << 31 | 1
    ERR_POLICY = 1 << 31 | 2
    ERR_INVALID = 1 << 31 | 3
    ERR_PLATFORM = 1 << 31 | 4
    ERR_TLS_REQD = 1 << 31 | 5
    ERR_UNKNOWN = 1 << 31 | 6
    ERR_SHUTDOWN = 1 << 31 | 7
    ERR_BLOCK_SIZE_REQD = 1 << 31 | 8
    ERR_TOO_BIG = 1 << 31 | 9
    ERR_EXT_HEADER_REQD = 1 << 31 | 10

    @property
    def is_error(self) -> bool:
        """Bit 31 is set."""
        return bool(self & 1 << 31)


class Info(IntEnum):
    """Information types of INFO and GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


def option_name(option: int) -> str:
    """`NBD_OPT_GO`, or the number of an unknown option; for messages and logs."""
    try:
        return f"NBD_OPT_{Option(option).name}"
    except ValueError:
        return f"option {option}"
