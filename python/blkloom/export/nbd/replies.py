"""Encodes the replies of the server in a handshake. Pure functions; source: proto.md "Option reply types"."""

from __future__ import annotations

import struct

from blkloom.export.nbd.codes import (
    NBD_MAGIC,
    OPTION_MAGIC,
    REPLY_MAGIC,
    STRING_LIMIT,
    HandshakeFlag,
    Info,
    Reply,
    TransmissionFlag,
)
from blkloom.export.nbd.offer import Offer


def greeting() -> bytes:
    """The first 18 bytes: fixed newstyle, without the zeroes if the client agrees."""
    return struct.pack(">QQH", NBD_MAGIC, OPTION_MAGIC, HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)


def reply(option: int, kind: Reply, data: bytes = b"") -> bytes:
    """One reply to `option`, with the number as the client has sent it."""
    return struct.pack(">QIII", REPLY_MAGIC, option, kind, len(data)) + data


def error(option: int, kind: Reply, message: str) -> bytes:
    """An error reply; the message is cut to the longest string of the protocol."""
    text = message.replace("\0", "").encode(errors="replace")[:STRING_LIMIT].decode(errors="ignore")
    return reply(option, kind, text.encode())


def server(option: int, offer: Offer) -> bytes:
    """One line of LIST: the name, followed by the description."""
    name = offer.name.encode()
    return reply(option, Reply.SERVER, struct.pack(">I", len(name)) + name + offer.description.encode())


def info_export(option: int, offer: Offer, flags: TransmissionFlag) -> bytes:
    """NBD_INFO_EXPORT: size and transmission flags."""
    return reply(option, Reply.INFO, struct.pack(">HQH", Info.EXPORT, offer.size, flags))


def info_text(option: int, kind: Info, text: str) -> bytes:
    """NBD_INFO_NAME or NBD_INFO_DESCRIPTION."""
    return reply(option, Reply.INFO, struct.pack(">H", kind) + text.encode())


def info_block_size(option: int, offer: Offer) -> bytes:
    """NBD_INFO_BLOCK_SIZE: minimum, preferred, maximum payload."""
    sizes = offer.block_sizes
    return reply(
        option,
        Reply.INFO,
        struct.pack(">HIII", Info.BLOCK_SIZE, sizes.minimum, sizes.preferred, sizes.maximum),
    )


def meta_context(option: int, number: int, name: str) -> bytes:
    """One metadata context and its id."""
    return reply(option, Reply.META_CONTEXT, struct.pack(">I", number) + name.encode())


def export_name(offer: Offer, flags: TransmissionFlag, *, zeroes: bool) -> bytes:
    """The answer to EXPORT_NAME, which has no reply header. zeroes: 124 of them follow."""
    return struct.pack(">QH", offer.size, flags) + bytes(124 if zeroes else 0)
