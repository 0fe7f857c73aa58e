"""What happens in a handshake, one class an event; `Handshake.next_event` returns them in order.

Events that carry `data` ask the caller to send those bytes before it asks for the next event.
"""

from __future__ import annotations

import msgspec

from blkloom.export.nbd.codes import ClientFlag, Reply
from blkloom.export.nbd.offer import Offer


class Greeting(msgspec.Struct, frozen=True):
    """The server opens: send `data`."""

    data: bytes


class ClientGreeted(msgspec.Struct, frozen=True):
    """The client's flags are in."""

    flags: ClientFlag


class Answered(msgspec.Struct, frozen=True):
    """An option was answered; haggling goes on. `data` holds every reply, `reply` is the final one."""

    option: int
    reply: Reply
    message: str
    data: bytes


class Transmission(msgspec.Struct, frozen=True):
    """The handshake succeeded: send `data`, then transmission begins.

    structured, extended: which replies were agreed (extended implies structured).
    contexts: (id, name) of the metadata contexts selected for this very export.
    initial: bytes of the transmission phase that had already arrived.
    """

    offer: Offer
    structured: bool
    extended: bool
    contexts: tuple[tuple[int, str], ...]
    data: bytes
    initial: bytes


class Aborted(msgspec.Struct, frozen=True):
    """The client said NBD_OPT_ABORT: send `data` (it may be gone already) and close."""

    data: bytes


class Dropped(msgspec.Struct, frozen=True):
    """NBD_OPT_EXPORT_NAME cannot be satisfied and has no error reply: close."""

    reason: str


class Disconnected(msgspec.Struct, frozen=True):
    """The client closed its side. midway: in the middle of a message."""

    midway: bool


Event = Greeting | ClientGreeted | Answered | Transmission | Aborted | Dropped | Disconnected
