"""The I/O of a handshake, over a connected socket: in plain text, and after NBD_OPT_STARTTLS over TLS.

Runs on the event loop; raises ProtocolError and OSError.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from typing import Final

from blkloom import _engine
from blkloom.export.nbd.channel import Channel, PlainChannel, TlsChannel
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
from blkloom.export.nbd.handshake import Handshake

RECEIVE_SIZE: Final = 16 * 1024
"""Bytes read at once; also the most bytes of the transmission phase that can be read too early."""

Outcome = Transmission | Aborted | Dropped | Disconnected


async def negotiate(
    connected: socket.socket,
    handshake: Handshake,
    start_tls: Callable[[], _engine.TlsSession],
    secured: Callable[[], None],
) -> Outcome:
    """Runs the handshake to its end, and sends all its replies. The socket stays open. start_tls: begins a TLS session
    on it, which the caller owns. secured: called after its handshake.
    """
    channel: Channel = PlainChannel(connected)
    while True:
        match handshake.next_event():
            case None:
                handshake.receive_data(await channel.receive(RECEIVE_SIZE))
            case StartTls() as event:
                await channel.send(event.data)
                channel = encrypted = TlsChannel(connected, start_tls())
                await encrypted.handshake()
                secured()
                handshake.secured()
            case Transmission() as event:
                await channel.send(event.data)
                return event
            case Aborted() as event:
                # proto.md: the client may close without waiting for this reply.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    await channel.send(event.data)
                return event
            case Dropped() | Disconnected() as event:
                return event
            case Greeting() | Answered() as event:
                await channel.send(event.data)
            case ClientGreeted() | Secured():
                pass
