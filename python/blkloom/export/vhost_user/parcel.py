"""A paused session as one descriptor and some bytes, for another worker.

The descriptor is a socket in which all descriptors of the session wait to be received; the bytes are its state as JSON.
"""

from __future__ import annotations

import array
import os
import socket
from typing import TYPE_CHECKING, Final

import msgspec

from blkloom.errors import ListenError
from blkloom.export.vhost_user.connection import Connection
from blkloom.export.vhost_user.session import Session, SessionState
from blkloom.export.vhost_user.vring import Vring

if TYPE_CHECKING:
    from collections.abc import Callable

_TOGETHER: Final = 64
"""Descriptors in one packet of the socket; the kernel allows 253."""
_EVENTS: Final = ("kick", "called", "error")


class _Parcel(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What the descriptors are: the connection, those of `received`, the regions of memory, the requests in flight, the
    log and its eventfd, the channel for requests to the front-end, and the eventfds of `events`.
    """

    state: SessionState
    received: bytes
    descriptors: int
    regions: int
    has_inflight: bool
    has_log: bool
    has_log_event: bool
    has_backend: bool
    events: list[tuple[int, str]]


def pack(session: Session) -> tuple[int, bytes]:
    """Closes a paused session. Returns a descriptor, which the caller owns, and bytes. Raises OSError."""
    state = session.state
    state.vrings = {index: vring.state for index, vring in session.vrings.items()}
    events = [(index, name) for index, vring in session.vrings.items() for name in _EVENTS if getattr(vring, name) >= 0]
    inside, outside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with inside:
        try:
            rest = [
                *session.shared.regions,
                *([session.shared.inflight] if session.shared.inflight >= 0 else []),
                *([session.shared.log] if session.shared.log >= 0 else []),
                *([session.shared.log_event] if session.shared.log_event >= 0 else []),
                *([session.backend.fileno()] if session.backend else []),
                *(getattr(session.vrings[index], name) for index, name in events),
            ]
            received, descriptors = session.unhandled
            parcel = _Parcel(
                state=state,
                received=received,
                descriptors=len(descriptors),
                regions=len(session.shared.regions),
                has_inflight=session.shared.inflight >= 0,
                has_log=session.shared.log >= 0,
                has_log_event=session.shared.log_event >= 0,
                has_backend=session.backend is not None,
                events=events,
            )
            everything = [session.connected, *descriptors, *rest]
            for at in range(0, len(everything), _TOGETHER):
                some = array.array("i", everything[at : at + _TOGETHER])
                inside.sendmsg([b"d"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, some)])
        except BaseException:
            outside.close()
            raise
    session.close()
    return outside.detach(), msgspec.json.encode(parcel)


def unpack(descriptor: int, data: bytes, new: Callable[[Connection], Session]) -> Session:
    """The session, which is not served yet. Owns the descriptor. new: makes a session of a connection. Raises
    ListenError, OSError.
    """
    with socket.socket(fileno=descriptor) as outside:
        parcel = msgspec.json.decode(data, type=_Parcel)
        single = (parcel.has_inflight, parcel.has_log, parcel.has_log_event, parcel.has_backend)
        count = 1 + parcel.descriptors + parcel.regions + sum(single) + len(parcel.events)
        found = _received(outside, count)
    if len(found) < count:
        for left in found:
            os.close(left)
        raise ListenError(f"{count - len(found)} descriptors of a virtual machine were lost")
    take = iter(found).__next__
    connected = socket.socket(fileno=take())
    try:
        session = new(Connection(connected, parcel.received, [take() for _ in range(parcel.descriptors)]))
    except BaseException:
        connected.close()
        for left in found[1:]:
            os.close(left)
        raise
    session.state = parcel.state
    session.shared.regions = [take() for _ in range(parcel.regions)]
    session.shared.inflight = take() if parcel.has_inflight else -1
    session.shared.log = take() if parcel.has_log else -1
    session.shared.log_event = take() if parcel.has_log_event else -1
    session.backend = socket.socket(fileno=take()) if parcel.has_backend else None
    session.vrings = {index: Vring(state) for index, state in parcel.state.vrings.items()}
    setters = {"kick": Vring.set_kick, "called": Vring.set_call, "error": Vring.set_error}
    for index, name in parcel.events:
        setters[name](session.vrings[index], take())
    return session


def _received(outside: socket.socket, count: int) -> list[int]:
    outside.setblocking(False)
    found: list[int] = []
    while len(found) < count:
        try:
            data, some, _, _ = socket.recv_fds(outside, 1, _TOGETHER, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            break
        if not data:
            break
        found += some
    return found
