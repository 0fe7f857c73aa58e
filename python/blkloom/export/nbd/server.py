"""The NBD server: exports by name, the sessions of clients within limits, hand-over and a clean stop.

Python's part ends with the handshake: then the connection is handed to the engine. Runs on one event loop, and never
touches data. At most `connections` clients are served, `refusals` more are told that they are refused, and others are
closed at once. Nothing that a client does can end more than its own connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import msgspec

from blkloom import _engine, open_files
from blkloom.errors import UsageError
from blkloom.export.exporter import Unfinished
from blkloom.export.limited_log import LimitedLog
from blkloom.export.nbd.accepting import Acceptor
from blkloom.export.nbd.access import Identity
from blkloom.export.nbd.burst import Burst
from blkloom.export.nbd.codes import Reply
from blkloom.export.nbd.events import Transmission
from blkloom.export.nbd.handshake import Handshake
from blkloom.export.nbd.listening import Listener, adopt, listen_tcp, listen_unix
from blkloom.export.nbd.offer import Catalogue
from blkloom.export.nbd.session import Admission, Moving, NbdExport, Session, closing_reason
from blkloom.export.nbd.tls import Tls, TlsSettings
from blkloom.forked import OwnProcess
from blkloom.printing import described

if TYPE_CHECKING:
    from blkloom.control.states import SocketPermissions

_MOVE_GRACE: Final = 2.0
"""Seconds for a handshake to end before the clients are handed over to another server."""
_CUT_GRACE: Final = 0.5
"""Seconds before the end of a stop at which clients that do not read their replies are disconnected."""
_NAMED: Final = 8
"""Most clients that a message names."""
_STOP_GRACE: Final = 1.0
"""Seconds for a handshake to end with ERR_SHUTDOWN when the server stops."""


class ServerLimits(msgspec.Struct, frozen=True):
    """Limits of one server.

    connections: clients at the same time, in handshake or transmission. refusals: further clients that
    get the reason why they are refused, at the same time. handshake: seconds from accept to the choice
    of an export. refusal: the same for a client that is refused. accept_retry: seconds before accept is
    tried again with no descriptor free. stall: seconds that a client may stop in the middle of a
    request. reserve: descriptors that clients do not use up; at most a quarter of the limit. per_host:
    clients at the same time from one address, or of one user on Unix sockets; 0: as many as `connections`.
    """

    connections: int = 1024
    refusals: int = 32
    handshake: float = 10.0
    refusal: float = 2.0
    accept_retry: float = 1.0
    stall: float = 60.0
    reserve: int = open_files.WORKER_RESERVE
    per_host: int = 0


class NbdServer:
    """Serves exports to NBD clients; the first export is also found by the empty name.

    Use as `async with`, or call `stop`. Not thread-safe: call from the event loop's thread.
    """

    def __init__(
        self,
        engine: _engine.Engine,
        exports: Iterable[NbdExport] = (),
        *,
        limits: ServerLimits | None = None,
        log: logging.Logger | None = None,
        on_change: Callable[[], None] | None = None,
        tls: TlsSettings | Tls | None = None,
    ) -> None:
        """on_change: called when a client has entered transmission or has left. tls: None: without TLS. Raises
        UsageError if its credentials cannot be used; a `Tls` is taken as it is.
        """
        self._tls = tls if isinstance(tls, Tls) else Tls(tls or TlsSettings())
        if self._tls is not tls:
            self._tls.reload()
        self._engine = engine
        self._process = OwnProcess("an NBD server")
        self._limits = limits or ServerLimits()
        self._log = log or logging.getLogger("blkloom.nbd")
        self._exports: dict[str, NbdExport] = {}
        self._catalogue = Catalogue({})
        self._on_change = on_change or _nothing
        self._acceptor = Acceptor(
            self._welcome, reserve=self._limits.reserve, retry=self._limits.accept_retry, log=self._log
        )
        self._tokens = count(1)
        self._sessions: dict[int, Session] = {}
        self._refused: dict[int, Session] = {}
        self._negotiating: dict[int, asyncio.Task[str]] = {}
        self._notices: _engine.Notices | None = None
        self._ended = asyncio.Event()
        self._burst = Burst(self._log)
        self._intruders = LimitedLog(self._log, lambda: "access refused", "clients")
        self._paused = False
        self._moved: list[Moving] = []
        self._stopping = False
        self._served = 0
        for export in exports:
            self.add_export(export)

    # exports

    def add_export(self, export: NbdExport) -> None:
        """Offers one more export to clients that connect from now on. Raises UsageError if the name is taken."""
        if export.name in self._exports:
            raise UsageError(f"two exports are called '{export.name}'", cure="give each its own name")
        self._publish({**self._exports, export.name: export})

    def remove_export(self, name: str) -> NbdExport:
        """Stops offering an export; connected clients stay. Raises UsageError if there is no export of that name."""
        if name not in self._exports:
            known = ", ".join(f"'{known}'" for known in self._exports)
            raise UsageError(f"there is no export '{name}'", cure=f"there are: {known}")
        removed = self._exports[name]
        self._publish({key: export for key, export in self._exports.items() if key != name})
        return removed

    def rename_export(self, name: str, export: NbdExport) -> None:
        """Replaces the export `name` by `export`, which also gets its clients. Raises UsageError as `add_export` and
        `remove_export` do.
        """
        former = self.remove_export(name)
        try:
            self.add_export(export)
        except UsageError:
            self.add_export(former)
            raise
        for session in self._sessions.values():
            if session.export == name:
                session.export = export.name

    def _publish(self, exports: dict[str, NbdExport]) -> None:
        self._exports = exports
        self._catalogue = Catalogue({name: export.offer for name, export in exports.items()})

    # listening

    async def listen_unix(self, path: str | os.PathLike[str], permissions: SocketPermissions | None = None) -> Listener:
        """Listens on a Unix socket. permissions: see `listening.listen_unix`. Raises ListenError."""
        return self._listen(listen_unix(path, permissions))

    async def listen_tcp(
        self, host: str = "localhost", port: int = 10809, *, allow_remote: bool = False
    ) -> list[Listener]:
        """Listens on every address of `host` ("" for all, port 0 for a free one).

        allow_remote: `host` may be an address that other hosts reach; without it, and without TLS that proves who
        every client is, that raises UsageError. Raises ListenError.
        """
        allow_remote |= self._tls.settings.requires_proof
        return [self._listen(listener) for listener in await listen_tcp(host, port, allow_remote=allow_remote)]

    def reload_tls(self) -> None:
        """Reads certificates and keys again, for clients that connect from now on. Raises UsageError, and keeps those
        before, if they cannot be used.
        """
        self._tls.reload()

    def adopt(self, listening: socket.socket) -> Listener:
        """Accepts from a socket that already listens, and owns it. Raises ListenError."""
        return self._listen(adopt(listening))

    def _listen(self, listener: Listener) -> Listener:
        self._process.check()
        if self._stopping:
            listener.close()
            raise UsageError("this server has been stopped", cure="make a new one")
        self._acceptor.add(listener)
        return listener

    def _started_notices(self) -> _engine.Notices:
        if self._notices is None:
            self._notices = _engine.Notices()
            asyncio.get_running_loop().add_reader(self._notices.fileno(), self._take_notices)
        return self._notices

    @property
    def listeners(self) -> list[Listener]:
        """The listening sockets."""
        return list(self._acceptor)

    def uris(self, name: str | None = None) -> list[str]:
        """A URI of the export `name` (None: the default export) for each listening socket."""
        if name is None:
            name = next(iter(self._exports), "")
        return [listener.uri(name, tls=self._tls.mode == "require") for listener in self._acceptor]

    # clients

    @property
    def connections(self) -> int:
        """Number of clients in handshake or transmission."""
        return len(self._sessions)

    @property
    def serving(self) -> int:
        """Number of clients in transmission."""
        return sum(session.connection is not None for session in self._sessions.values())

    @property
    def served(self) -> int:
        """Number of clients that have reached transmission since the start."""
        return self._served

    async def wait_for_last_client(self) -> None:
        """Returns when a client has been served and none is connected any more (for `--once`)."""
        while not self._served or self._sessions:
            await self._next_end()

    async def _next_end(self) -> None:
        self._ended.clear()
        await self._ended.wait()

    def _welcome(self, connected: socket.socket) -> None:
        try:
            identity = Identity.of(connected)
        except OSError:  # it has gone already
            connected.close()
            return
        admission = Admission(identity, self._exports)
        if (reason := admission.refused_address()) is not None:
            self._intruders.log(logging.WARNING, "%s: %s", identity.address or "no address", reason)
            connected.close()
            return
        if (reason := self._crowded(identity)) is None:
            self._begin(self._sessions, connected, admission, self._limits.handshake)
            return
        self._burst.refused(reason)
        if len(self._refused) < self._limits.refusals:
            self._begin(self._refused, connected, admission, self._limits.refusal, refusal=reason)
        else:
            connected.close()

    def _crowded(self, client: Identity) -> str | None:
        """Why the limits do not allow one more client; None: they do."""
        limits = self._limits
        if len(self._sessions) >= limits.connections:
            return f"the server has {limits.connections} connections, the most it takes; try again later"
        if not limits.per_host or client.host is None:
            return None
        others = sum(session.admission.identity.host == client.host for session in self._sessions.values())
        who = f"user {client.uid}" if client.address is None else client.address
        most = f"the most of one {'user' if client.address is None else 'address'}"
        return None if others < limits.per_host else f"{who} has {limits.per_host} connections, {most}"

    def _session(self, connected: socket.socket, admission: Admission, timeout: float) -> Session:
        return Session(
            next(self._tokens),
            connected,
            Handshake(self._catalogue, tls=self._tls.mode, admit=admission),
            timeout=timeout,
            admission=admission,
            tls=self._tls,
            hand_over=partial(self._serve, self._exports),
            log=self._log,
        )

    def _begin(
        self,
        among: dict[int, Session],
        connected: socket.socket,
        admission: Admission,
        timeout: float,
        *,
        refusal: str | None = None,
    ) -> None:
        session = self._session(connected, admission, timeout)
        token = session.token
        if refusal is not None:
            session.handshake.refuse(Reply.ERR_POLICY, refusal)
        among[token] = session
        task = asyncio.create_task(session.run(), name=f"NBD handshake {token}")
        self._negotiating[token] = task
        task.add_done_callback(lambda done: self._negotiated(session, done))

    def _negotiated(self, session: Session, task: asyncio.Task[str]) -> None:
        del self._negotiating[session.token]
        session.release()  # a task cancelled before its first step has not done so
        # "": it was handed to the engine, whose notice of its end may even have come before this.
        if reason := "dropped, the server stops" if task.cancelled() else task.result():
            self._end(session, reason)

    def _serve(self, exports: Mapping[str, NbdExport], session: Session, outcome: Transmission) -> _engine.Transport:
        return self._hand_over(exports, Unfinished(outcome.initial), session)

    def _hand_over(
        self, exports: Mapping[str, NbdExport], unfinished: Unfinished, session: Session
    ) -> _engine.Transport:
        """Hands the connection to the engine. Raises OSError if the engine cannot take it."""
        connection = _engine.serve_nbd(
            self._engine,
            exports[session.export].export,
            session.descriptor,
            self._started_notices(),
            session.token,
            structured=session.agreed.structured,
            extended=session.agreed.extended,
            contexts=session.agreed.contexts,
            initial=unfinished.initial,
            unsent=unfinished.unsent,
            skipping=unfinished.skipping,
            max_payload=session.agreed.max_payload,
            stall_timeout=self._limits.stall,
            read_only=session.agreed.read_only,
            tls=session.tls,
        )
        self._served += 1
        if self._stopping or self._paused:
            connection.detach(drain=self._stopping)
        asyncio.get_running_loop().call_soon(self._on_change)
        return connection

    def _take_notices(self) -> None:
        if self._notices is None:
            return
        for token, result, error in self._notices.take():
            if (session := self._sessions.get(token)) is None:
                continue
            if isinstance(result, _engine.Detached):
                unfinished = Unfinished(result.initial, result.unsent, result.skipping)
                moving = Moving(session.export, session.agreed, result.take_descriptor(), unfinished)
                if self._stopping and result.unsent:
                    missed = (
                        f"export '{session.export}': it did not take its last {len(result.unsent)} bytes of replies"
                    )
                    self._log.warning("%s, %s", session.peer, missed)
                self._end(session, "disconnected" if self._stopping else "handed over")
                if self._stopping:
                    moving.close()
                elif self._paused:
                    self._moved.append(moving)
                else:  # it took longer than `pause` has waited
                    self._take_back(moving)
            else:
                self._end(session, closing_reason(result, error))

    def _end(self, session: Session, reason: str) -> None:
        session.connection = None
        if session.intruding:
            self._intruders.log(logging.WARNING, "%s: %s", session.peer, reason)
        else:
            self._log.info("%s: %s", session.peer, reason)
        if self._refused.pop(session.token, None) is None:
            del self._sessions[session.token]
            # Not when the first client leaves: otherwise each that leaves would end and begin a burst.
            if len(self._sessions) <= self._limits.connections * 7 // 8:
                self._burst.over()
        self._ended.set()
        self._acceptor.freed()
        self._on_change()

    # moving to another server

    def hold_back(self) -> None:
        """Accepts no clients until `go_on`."""
        self._process.check()
        self._paused = True
        self._acceptor.pause()

    async def end_handshakes(self) -> None:
        """Accepts no clients until `go_on`. A client in its handshake has a short time to end it."""
        self.hold_back()
        await self._stop_negotiating(_MOVE_GRACE)

    async def pause(self, timeout: float | None = None) -> list[Moving]:
        """Accepts no clients, and takes the present ones out of the engine without closing them; the sockets still
        listen. Returns the clients, with their unread replies: this waits for no client.

        timeout: seconds for requests in flight to end. Raises TimeoutError, whose text names the clients that still
        have some. `go_on` then continues with the clients that were taken out.
        """
        await self.end_handshakes()
        for session in self._sessions.values():
            if session.connection is not None:
                session.connection.detach()
        try:
            async with asyncio.timeout(timeout):
                while self._sessions:
                    await self._next_end()
        except TimeoutError as error:
            raise TimeoutError(errno.ETIMEDOUT, self._named()) from error
        moved, self._moved = self._moved, []
        return moved

    def _named(self) -> str:
        """The names of the present clients, for a message: at most _NAMED."""
        names = [f"{session.peer} (export '{session.export}')" for session in self._sessions.values()]
        more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
        return ", ".join(names[:_NAMED] + more)

    def go_on(self, moving: Iterable[Moving] = ()) -> None:
        """Serves these clients, and those that `pause` did not return, and accepts again."""
        self._process.check()
        self._paused = False
        returned, self._moved = self._moved, []
        for client in (*returned, *moving):
            self._take_back(client)
        self._acceptor.go_on()

    def _take_back(self, moving: Moving) -> None:
        connected = socket.socket(fileno=moving.descriptor)
        hand_over = partial(self._hand_over, self._exports, moving.unfinished)
        session = self._session(connected, Admission(Identity(), self._exports), timeout=0)
        self._sessions[session.token] = session
        try:
            session.admission.identity = Identity.of(connected)
            session.go_on(hand_over, moving)
        except (OSError, KeyError) as error:
            self._end(session, f"lost while it was handed over: {described(error)}")

    # the end

    async def stop(self, timeout: float = 10.0) -> int:
        """Stops listening, ends handshakes with ERR_SHUTDOWN, and waits until requests in flight have ended and clients
        have read their replies. A client that does not read them is disconnected, and the log names it.

        timeout: seconds for all of this. Returns the number of connections that still had requests in flight then (the
        engine's `close` ends those); 0 is a clean stop. May be called again. In a fork it does nothing: sockets,
        their files and the clients belong to the parent.
        """
        if not self._process.is_current:
            return 0
        self._stopping = True
        deadline = asyncio.get_running_loop().time() + timeout
        cut = deadline - min(_CUT_GRACE, timeout / 2)
        self._acceptor.stop()
        for session in (*self._sessions.values(), *self._refused.values()):
            session.handshake.refuse(Reply.ERR_SHUTDOWN, "the server is shutting down")
            if session.connection is not None:
                session.connection.detach(drain=True)  # unlike close, it does not wait for a suspended device
        await self._stop_negotiating(min(timeout / 2, _STOP_GRACE))
        await self._wait_for_all(cut)
        for session in self._sessions.values():
            if session.connection is not None:
                session.connection.detach()
        if not await self._wait_for_all(deadline):
            self._log.error("requests in flight had not ended %g s after the stop began: %s", timeout, self._named())
        if self._notices is not None:
            asyncio.get_running_loop().remove_reader(self._notices.fileno())
            self._notices = None
        self._intruders.close()
        return len(self._sessions)

    async def _wait_for_all(self, deadline: float) -> bool:
        """Waits until all clients have gone, or until `deadline`. Returns whether they have."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                while self._sessions:
                    await self._next_end()
        return not self._sessions

    async def _stop_negotiating(self, grace: float) -> None:
        if not self._negotiating:
            return
        _, late = await asyncio.wait(self._negotiating.values(), timeout=grace)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()


def _nothing() -> None:
    return
