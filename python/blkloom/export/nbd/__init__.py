"""NBD: the handshake as pure functions of bytes (`handshake`), and the sockets around it (`server`).

The names here need no engine and do no I/O. `blkloom.export.nbd.server.NbdServer`, which listens
and hands connections to the engine, is imported from its own module, so fuzzers and other servers
can use the handshake alone. Source: NetworkBlockDevice/nbd doc/proto.md and, for extended headers,
its branch extension-ext-header.
"""

from blkloom.export.nbd.codes import ClientFlag, Info, Option, Reply, TransmissionFlag
from blkloom.export.nbd.events import (
    Aborted,
    Answered,
    ClientGreeted,
    Disconnected,
    Dropped,
    Event,
    Greeting,
    Secured,
    StartTls,
    Transmission,
)
from blkloom.export.nbd.handshake import Handshake
from blkloom.export.nbd.offer import BlockSizes, Catalogue, Offer
from blkloom.export.nbd.state import TRANSITIONS, ProtocolError, State
from blkloom.export.nbd.tls import TlsMode
from blkloom.export.nbd.uri import tcp_uri, unix_uri

__all__ = [
    "TRANSITIONS",
    "Aborted",
    "Answered",
    "BlockSizes",
    "Catalogue",
    "ClientFlag",
    "ClientGreeted",
    "Disconnected",
    "Dropped",
    "Event",
    "Greeting",
    "Handshake",
    "Info",
    "Offer",
    "Option",
    "ProtocolError",
    "Reply",
    "Secured",
    "StartTls",
    "State",
    "TlsMode",
    "Transmission",
    "TransmissionFlag",
    "tcp_uri",
    "unix_uri",
]
