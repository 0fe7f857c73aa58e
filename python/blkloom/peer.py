"""Who is at the other end of a Unix socket, as the kernel says. Source: unix(7), SO_PEERCRED."""

from __future__ import annotations

import os
import socket
import struct
from typing import Final

import msgspec

_CREDENTIALS: Final = struct.Struct("iII")


class Peer(msgspec.Struct, frozen=True):
    """A process, as it was when it connected (or listened)."""

    pid: int
    uid: int
    gid: int

    @property
    def may_command(self) -> bool:
        """It is of this process's user, or root."""
        return self.uid in (0, os.geteuid())


def peer_of(connected: socket.socket) -> Peer:
    """The other end. Raises OSError for what is no connected Unix socket."""
    return Peer(*_CREDENTIALS.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)))
