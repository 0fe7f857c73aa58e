"""Peer credentials of a Unix socket: process, user and group. Source: unix(7), SO_PEERCRED."""

from __future__ import annotations

import os
import socket
import struct
from typing import Final

import msgspec

_CREDENTIALS: Final = struct.Struct("iII")


class PeerCredentials(msgspec.Struct, frozen=True):
    """Process, user and group of the peer at the time of its connect(2) or listen(2)."""

    pid: int
    uid: int
    gid: int

    @property
    def may_command(self) -> bool:
        """Whether the peer is root or the user of this process."""
        return self.uid in (0, os.geteuid())


def peer_credentials(connected: socket.socket) -> PeerCredentials:
    """Credentials of the peer of `connected`. Raises OSError if it is not a connected Unix socket."""
    answer = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return PeerCredentials(*_CREDENTIALS.unpack(answer))
