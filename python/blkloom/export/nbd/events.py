"""What happens in a handshake, one class an event; `Handshake.next_event` returns them in order.

Events that carry `data` ask the caller to send those bytes before it asks for the next event.
"""

from __future__ import annotations

from dataclasses import dataclass

from blkloom.export.nbd.codes import ClientFlag, Reply
from blkloom.export.nbd.offer import Offer


@dataclass(frozen=True, slots=True)
class Greeting:
    """The server opens: send `data`."""

    data: bytes


@dataclass(frozen=True, slots=True)
class ClientGreeted:
    """The client's flags are in."""

    flags: ClientFlag


@dataclass(frozen=True, slots=True)
class Answered:
    """An option was answered; haggling goes on. `data` holds every reply, `reply` is the final one."""

    option: int
    reply: Reply
    message: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Transmission:
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


@dataclass(frozen=True, slots=True)
class Aborted:
    """The client said NBD_OPT_ABORT: send `data` (it may be gone already) and close."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Dropped:
    """NBD_OPT_EXPORT_NAME cannot be satisfied and has no error reply: close."""

    reason: str


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The client closed its side. midway: in the middle of a message."""

    midway: bool


Event = Greeting | ClientGreeted | Answered | Transmission | Aborted | Dropped | Disconnected
