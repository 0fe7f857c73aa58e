"""The states of the handshake, and the table of transitions between them.

TRANSITIONS has all transitions; an event that is missing from the row of its state cannot happen. TRANSMISSION and
CLOSED are final. What is agreed during the handshake (structured replies, contexts) is not a state: it changes the
contents of replies, but not the next possible events.
"""

from __future__ import annotations

import errno
from enum import Enum
from typing import ClassVar, Final

from blkloom.errors import BlkloomError
from blkloom.export.nbd.events import (
    Aborted,
    Answered,
    ClientGreeted,
    Disconnected,
    Dropped,
    Greeting,
    Secured,
    StartTls,
    Transmission,
)


class ProtocolError(BlkloomError):
    """The client has broken a MUST of the protocol where no error reply is possible: close the connection."""

    errno = errno.EPROTO
    exit_code: ClassVar[int] = 76  # EX_PROTOCOL


class State(Enum):
    """The state of a handshake."""

    GREETING = "nothing was said"
    FLAGS = "greeted; the client's flags are awaited"
    OPTIONS = "haggling"
    TLS = "the TLS handshake runs"
    TRANSMISSION = "agreed; the connection is the engine's"
    CLOSED = "over"


TRANSITIONS: Final[dict[State, dict[type, State]]] = {
    State.GREETING: {
        Greeting: State.FLAGS,
    },
    State.FLAGS: {
        ClientGreeted: State.OPTIONS,
        Disconnected: State.CLOSED,
        ProtocolError: State.CLOSED,
    },
    State.OPTIONS: {
        Answered: State.OPTIONS,
        StartTls: State.TLS,
        Transmission: State.TRANSMISSION,
        Aborted: State.CLOSED,
        Dropped: State.CLOSED,
        Disconnected: State.CLOSED,
        ProtocolError: State.CLOSED,
    },
    State.TLS: {
        Secured: State.OPTIONS,
    },
    State.TRANSMISSION: {},
    State.CLOSED: {},
}


def transitions_as_markdown() -> str:
    """TRANSITIONS as the table in docs/nbd.md."""
    rows = ["| state | event | next state |", "|---|---|---|"]
    for state, row in TRANSITIONS.items():
        rows += [f"| {state.name} | {event.__name__} | {after.name} |" for event, after in row.items()]
        rows += [] if row else [f"| {state.name} | | (final: {state.value}) |"]
    return "\n".join(rows) + "\n"
