"""The session of one client: its handshake, the hand-over to the engine, and the reason of its end.

Runs on the event loop of the server. The Python socket is closed at the end of the handshake in any case; after the
hand-over the engine owns a duplicate of the descriptor, which stays non-blocking. The session keeps what was agreed, so
that another server can continue with the client.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping

import msgspec

from blkloom import _engine
from blkloom.export.exporter import Unfinished
from blkloom.export.nbd.access import AccessRules, Identity, Verdict
from blkloom.export.nbd.events import Aborted, Disconnected, Dropped, Transmission
from blkloom.export.nbd.handshake import Handshake
from blkloom.export.nbd.listening import peer_name
from blkloom.export.nbd.negotiation import negotiate
from blkloom.export.nbd.offer import BlockSizes, Offer, check_string, negotiable
from blkloom.export.nbd.state import ProtocolError
from blkloom.export.nbd.tls import Tls
from blkloom.printing import described, printable


class NbdExport(msgspec.Struct, frozen=True):
    """An export of the engine with its name (may be "") and a description for users.

    multi_conn: leave True unless the device cannot make one connection's flush cover another's writes.
    block_sizes: None for those of the active table when a client asks. access: which clients may use it.
    Raises UsageError for a name or description that is no NBD string.
    """

    name: str
    export: _engine.Export
    description: str = ""
    multi_conn: bool = True
    block_sizes: BlockSizes | None = None
    access: AccessRules = AccessRules()

    def __post_init__(self) -> None:
        check_string("export name", self.name)
        check_string("description", self.description)

    def offer(self) -> Offer:
        """The offer for a handshake, with the present size."""
        device = self.export.device
        size = device.size
        return Offer(
            name=self.name,
            size=size,
            description=self.description,
            read_only=self.export.read_only or bool(getattr(device, "read_only", False)),
            multi_conn=self.multi_conn,
            block_sizes=self.block_sizes or _sizes_for(device, size),
            contexts=negotiable(getattr(device, "contexts", ())),
        )


class Agreed(msgspec.Struct, frozen=True):
    """What the handshake has agreed for the transmission phase; arguments of `_engine.serve_nbd`."""

    structured: bool = False
    extended: bool = False
    contexts: tuple[tuple[int, str], ...] = ()
    max_payload: int = 32 << 20
    read_only: bool = False


class Moving(msgspec.Struct, frozen=True):
    """A client during a hand-over. export: name of its export. descriptor: its socket, which the owner
    of this object owns.
    """

    export: str
    agreed: Agreed
    descriptor: int
    unfinished: Unfinished

    def close(self) -> None:
        """Closes the connection."""
        os.close(self.descriptor)


class Admission:
    """What is known of one client, and what the rules of the exports say about it."""

    def __init__(self, identity: Identity, exports: Mapping[str, NbdExport]) -> None:
        self.identity = identity
        self._exports = exports

    def __call__(self, name: str) -> Verdict:
        """The verdict about the export of that name."""
        return self._exports[name].access.verdict(self.identity)

    def refused_address(self) -> str | None:
        """Why no export is for the address of the client; None: one is, or there are none."""
        reasons = [export.access.refused_address(self.identity) for export in self._exports.values()]
        return reasons[0] if reasons and None not in reasons else None


class Session:
    """A client. hand_over: starts transmission and returns the engine's connection. tls: of the server."""

    def __init__(
        self,
        token: int,
        connected: socket.socket,
        handshake: Handshake,
        *,
        timeout: float,
        admission: Admission,
        tls: Tls,
        hand_over: Callable[[Session, Transmission], _engine.Transport],
        log: logging.Logger,
    ) -> None:
        self._socket = connected
        self._timeout = timeout
        self._hand_over = hand_over
        self._log = log
        self._tls = tls
        self.admission = admission
        self.tls: _engine.TlsSession | None = None
        self.intruding = False
        """It has failed to prove who it is, or a rule has refused it."""
        self.token = token
        self.handshake = handshake
        self.peer = "a client"
        self.connection: _engine.Transport | None = None
        self._said_of_tls: list[str] = []
        self.export = ""
        self.agreed = Agreed()

    @property
    def descriptor(self) -> int:
        """Descriptor of the connected socket, valid during the handshake and the hand-over."""
        return self._socket.fileno()

    def release(self) -> None:
        """Closes the Python socket; the duplicate of the engine stays open."""
        if self.tls is not None:
            self.tls.close()  # unless the engine has it
        self._socket.close()

    async def run(self) -> str:
        """Runs the handshake and the hand-over. Returns why the session has ended; "" if the engine serves
        `connection`.
        """
        try:
            self._prepare()
            return await self._negotiate()
        except ProtocolError as error:
            return f"dropped, it broke the protocol: {error}"
        except TimeoutError:
            return f"dropped, the handshake took more than {self._timeout:g} s"
        except OSError as error:
            return f"lost during the handshake: {described(error)}"
        except Exception:
            self._log.exception("%s: unexpected error in the handshake", self.peer)
            return "dropped, the server failed"
        finally:
            self.intruding |= self.handshake.refused is not None and self.connection is None
            self.release()

    def go_on(self, hand_over: Callable[[Session], _engine.Transport], moving: Moving) -> None:
        """Takes over a client that another server has served. Raises OSError."""
        self.peer = peer_name(self._socket)
        self.export, self.agreed = moving.export, moving.agreed
        try:
            self.connection = hand_over(self)
        finally:
            self.release()

    def _prepare(self) -> None:
        self._socket.setblocking(False)
        if self._socket.family != socket.AF_UNIX:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.peer = peer_name(self._socket)

    async def _negotiate(self) -> str:
        async with asyncio.timeout(self._timeout):
            outcome = await negotiate(self._socket, self.handshake, self._start_tls, self._secured)
        if (refused := self.handshake.refused) is not None and not isinstance(outcome, Transmission):
            return f"refused: {refused}"
        match outcome:
            case Transmission():
                self.export = outcome.offer.name
                self.agreed = Agreed(
                    outcome.structured,
                    outcome.extended,
                    outcome.contexts,
                    outcome.offer.block_sizes.maximum,
                    outcome.read_only,
                )
                self.connection = self._hand_over(self, outcome)
                agreed = ", ".join([_agreed(outcome), *self._said_of_tls])
                self._log.info("%s: serving export '%s' (%s)", self.peer, outcome.offer.name, agreed)
                return ""
            case Aborted():
                return "left during the handshake"
            case Dropped():
                return f"dropped: {outcome.reason}"
            case Disconnected():
                return f"disconnected during the handshake{', midway in a message' if outcome.midway else ''}"

    def _start_tls(self) -> _engine.TlsSession:
        self.intruding = True  # until it has succeeded
        self.tls = self._tls.accept(self.descriptor)
        return self.tls

    def _secured(self) -> None:
        assert self.tls is not None
        peer = self.tls.peer
        self.admission.identity = self.admission.identity.with_tls(peer)
        self._said_of_tls = [self.tls.agreed] + ([] if peer is None else [f"{peer[0]} '{printable(peer[1])}'"])
        self.intruding = False


def closing_reason(result: object, errno: int) -> str:
    """The text of a closing notice of the engine, for the log."""
    said = str(result) if result else "closed"
    return f"{said} ({os.strerror(errno)})" if errno else said


def _sizes_for(device: _engine.Device, size: int) -> BlockSizes:
    """The block sizes of a device; the defaults of the protocol for one without `limits`."""
    limits = getattr(device, "limits", None)
    return BlockSizes() if limits is None else BlockSizes.fitting(size, limits.logical, limits.optimal)


def _agreed(outcome: Transmission) -> str:
    replies = (
        "extended headers" if outcome.extended else "structured replies" if outcome.structured else "simple replies"
    )
    return ", ".join([replies, *(name for _, name in outcome.contexts)])
