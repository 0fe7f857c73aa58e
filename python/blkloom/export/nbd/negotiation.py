"""The I/O of a handshake, over a connected socket.

Uses non-blocking sockets and no asyncio transports: a transport would read ahead, also bytes of the
transmission phase. Runs on the event loop; raises ProtocolError and OSError.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Final

from blkloom.export.nbd.events import (
    Aborted,
    Answered,
    ClientGreeted,
    Disconnected,
    Dropped,
    Greeting,
    Transmission,
)
from blkloom.export.nbd.handshake import Handshake

RECEIVE_SIZE: Final = 16 * 1024
"""Bytes read at once; also the most bytes of the transmission phase that can be read too early."""

Outcome = Transmission | Aborted | Dropped | Disconnected


async def negotiate(connected: socket.socket, handshake: Handshake) -> Outcome:
    """Runs the handshake to its end, and sends all its replies. The socket stays open."""
    loop = asyncio.get_running_loop()
    while True:
        match handshake.next_event():
            case None:
                handshake.receive_data(await loop.sock_recv(connected, RECEIVE_SIZE))
            case Transmission() as event:
                await loop.sock_sendall(connected, event.data)
                return event
            case Aborted() as event:
                # proto.md: the client may close without waiting for this reply.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    await loop.sock_sendall(connected, event.data)
                return event
            case Dropped() | Disconnected() as event:
                return event
            case Greeting() | Answered() as event:
                await loop.sock_sendall(connected, event.data)
            case ClientGreeted():
                pass
