"""The events of a handshake, one class each; `Handshake.next_event` returns them in order.

Events that carry `data` ask the caller to send those bytes before it asks for the next event.
"""

from __future__ import annotations

import msgspec

from blkloom.export.nbd.codes import ClientFlag, Reply
from blkloom.export.nbd.offer import Offer


class Greeting(msgspec.Struct, frozen=True):
    """The greeting of the server: send `data`."""

    data: bytes


class ClientGreeted(msgspec.Struct, frozen=True):
    """The flags of the client have arrived."""

    flags: ClientFlag


class Answered(msgspec.Struct, frozen=True):
    """An option was answered; the handshake continues. `data` holds every reply, `reply` is the final one."""

    option: int
    reply: Reply
    message: str
    data: bytes


class StartTls(msgspec.Struct, frozen=True):
    """NBD_OPT_STARTTLS was accepted: send `data`, then run the TLS handshake, then call `Handshake.secured`."""

    data: bytes


class Secured(msgspec.Struct, frozen=True):
    """The TLS handshake has succeeded: the negotiation begins again, over TLS."""


class Transmission(msgspec.Struct, frozen=True):
    """The handshake succeeded: send `data`, then transmission begins.

    structured, extended: which replies were agreed (extended implies structured).
    contexts: (id, name) of the metadata contexts selected for this export.
    initial: bytes of the transmission phase that have already arrived.
    read_only: the client may not write, whatever the export is.
    """

    offer: Offer
    structured: bool
    extended: bool
    contexts: tuple[tuple[int, str], ...]
    data: bytes
    initial: bytes
    read_only: bool = False


class Aborted(msgspec.Struct, frozen=True):
    """The client has sent NBD_OPT_ABORT: send `data` (the client may have closed already) and close."""

    data: bytes


class Dropped(msgspec.Struct, frozen=True):
    """NBD_OPT_EXPORT_NAME cannot be satisfied and has no error reply: close."""

    reason: str


class Disconnected(msgspec.Struct, frozen=True):
    """The client has closed its side. midway: in the middle of a message."""

    midway: bool


Event = Greeting | ClientGreeted | Answered | StartTls | Secured | Transmission | Aborted | Dropped | Disconnected
