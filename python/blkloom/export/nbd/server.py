"""The NBD server: listening sockets on asyncio, exports by name, bounds, and a clean stop.

Python's part ends with the handshake; each agreed connection is handed to the engine. Everything here
runs on one event loop and none of it is on the way of the data. Promises:

- accepting never awaits, so no client is lost between accept and its session;
- never more than `connections` clients plus `refusals` being told no; over that, closed at once;
- no descriptor left for accept means waiting for one (or a second), never spinning;
- what a client does ends at most its own connection.
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
from typing import Final, Self

import msgspec

from blkloom import _engine, open_files
from blkloom.errors import UsageError
from blkloom.export.nbd.burst import Burst
from blkloom.export.nbd.codes import Reply
from blkloom.export.nbd.events import Transmission
from blkloom.export.nbd.handshake import Handshake
from blkloom.export.nbd.listening import Listener, adopt, listen_tcp, listen_unix
from blkloom.export.nbd.offer import Catalogue
from blkloom.export.nbd.session import Moving, NbdExport, Session, Unfinished, closing_reason
from blkloom.forked import OwnProcess

_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
# accept(2): errors already pending on the new connection, "treat them like EAGAIN by retrying".
_GONE: Final = frozenset(
    {
        errno.ECONNABORTED,
        errno.EPROTO,
        errno.EPERM,
        errno.ENETDOWN,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.EHOSTUNREACH,
        errno.EOPNOTSUPP,
        errno.ENETUNREACH,
        errno.ETIMEDOUT,
    }
)
_MOVE_GRACE: Final = 2.0
"""Seconds a handshake has to end when the clients move to another server."""
_CUT_GRACE: Final = 0.5
"""Seconds of a stop that are left when clients that do not take their replies are cut."""
_NAMED: Final = 8
"""Clients that a message names."""
_STOP_GRACE: Final = 1.0
"""Seconds a handshake may go on being told ERR_SHUTDOWN while the server stops."""


class ServerLimits(msgspec.Struct, frozen=True):
    """Bounds of one server.

    connections: clients at a time, in handshake or transmission. refusals: further clients that are
    told why at a time. handshake: seconds from accept to the choice of an export. refusal: the same
    for a client that is refused. accept_retry: seconds before accept is tried again with no
    descriptor free. stall: seconds the engine lets a client stop in the middle of a request. reserve:
    descriptors that clients do not use up, or a quarter of all there may be.
    """

    connections: int = 1024
    refusals: int = 32
    handshake: float = 10.0
    refusal: float = 2.0
    accept_retry: float = 1.0
    stall: float = 60.0
    reserve: int = open_files.WORKER_RESERVE


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
    ) -> None:
        """on_change: called when a client has entered transmission or has left."""
        self._engine = engine
        self._process = OwnProcess("an NBD server")
        self._limits = limits or ServerLimits()
        self._log = log or logging.getLogger("blkloom.nbd")
        self._exports: dict[str, NbdExport] = {}
        self._catalogue = Catalogue({})
        self._on_change = on_change or _nothing
        self._listeners: list[Listener] = []
        self._waiting: set[asyncio.Task[None]] = set()
        self._tokens = count(1)
        self._sessions: dict[int, Session] = {}
        self._refused: dict[int, Session] = {}
        self._negotiating: dict[int, asyncio.Task[str]] = {}
        self._notices: _engine.Notices | None = None
        self._ended = asyncio.Event()
        self._burst = Burst(self._log)
        self._starved = False
        self._paused = False
        self._moved: list[Moving] = []
        self._stopping = False
        self._served = 0
        for export in exports:
            self.add_export(export)

    # exports

    def add_export(self, export: NbdExport) -> None:
        """Offer one more export to clients that connect from now on. UsageError if the name is taken."""
        if export.name in self._exports:
            raise UsageError(f"two exports are called {export.name!r}", cure="give each its own name")
        self._publish({**self._exports, export.name: export})

    def remove_export(self, name: str) -> NbdExport:
        """Offer it no more; clients already connected stay. UsageError if there is none of that name."""
        if name not in self._exports:
            raise UsageError(f"there is no export {name!r}", cure=f"there are: {', '.join(map(repr, self._exports))}")
        removed = self._exports[name]
        self._publish({key: export for key, export in self._exports.items() if key != name})
        return removed

    def rename_export(self, name: str, export: NbdExport) -> None:
        """Offer `export` in place of the one called `name`; its clients are the new one's. UsageError
        as of `add_export` and `remove_export`.
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

    async def listen_unix(self, path: str | os.PathLike[str]) -> Listener:
        """Listen on a Unix socket (mode 0600). Raises ListenError."""
        return self._listen(listen_unix(path))

    async def listen_tcp(
        self, host: str = "localhost", port: int = 10809, *, allow_remote: bool = False
    ) -> list[Listener]:
        """Listen on every address of `host` ("" for all, port 0 for a free one).

        allow_remote: `host` may be an address that other hosts reach. Raises ListenError, and UsageError for an
        address that has not been allowed.
        """
        return [self._listen(listener) for listener in await listen_tcp(host, port, allow_remote=allow_remote)]

    def adopt(self, listening: socket.socket) -> Listener:
        """Accept from a socket that already listens, and own it. Raises ListenError."""
        return self._listen(adopt(listening))

    def _listen(self, listener: Listener) -> Listener:
        self._process.check()
        if self._stopping:
            listener.close()
            raise UsageError("this server has been stopped", cure="make a new one")
        self._listeners.append(listener)
        if not self._paused:
            self._watch(listener)
        return listener

    def _watch(self, listener: Listener) -> None:
        asyncio.get_running_loop().add_reader(listener.socket.fileno(), self._accept, listener)

    def _ignore(self, listener: Listener) -> None:
        asyncio.get_running_loop().remove_reader(listener.socket.fileno())

    def _started_notices(self) -> _engine.Notices:
        if self._notices is None:
            self._notices = _engine.Notices()
            asyncio.get_running_loop().add_reader(self._notices.fileno(), self._take_notices)
        return self._notices

    @property
    def listeners(self) -> list[Listener]:
        """What it listens on."""
        return list(self._listeners)

    def uris(self, name: str | None = None) -> list[str]:
        """One URI a listening socket for the export `name` (None: the default export)."""
        if name is None:
            name = next(iter(self._exports), "")
        return [listener.uri(name) for listener in self._listeners]

    # clients

    @property
    def connections(self) -> int:
        """Clients now, in handshake or transmission."""
        return len(self._sessions)

    @property
    def serving(self) -> int:
        """Clients in transmission now."""
        return sum(session.connection is not None for session in self._sessions.values())

    @property
    def served(self) -> int:
        """Clients that have reached transmission since the start."""
        return self._served

    async def wait_for_last_client(self) -> None:
        """Return once a client has been served and none is connected any more (for `--once`)."""
        while not self._served or self._sessions:
            await self._next_end()

    async def _next_end(self) -> None:
        self._ended.clear()
        await self._ended.wait()

    def _accept(self, listener: Listener) -> None:
        """One client; the event loop calls again while others wait, after it has served them all once."""
        try:
            if open_files.are_scarce(self._limits.reserve):
                raise OSError(errno.EMFILE, f"{os.strerror(errno.EMFILE)}; {open_files.advice()}")
            connected, _ = listener.socket.accept()
        except (BlockingIOError, InterruptedError):
            return  # another process on the same socket was faster
        except OSError as error:
            if error.errno in _EXHAUSTED:
                self._ignore(listener)
                task = asyncio.create_task(self._wait_for_descriptors(listener, error))
                self._waiting.add(task)
                task.add_done_callback(self._waiting.discard)
            elif error.errno not in _GONE:
                self._log.critical("%s: accepts no more clients: %s", listener, error)
                self._ignore(listener)
            return
        self._starved = False
        self._welcome(connected)

    async def _wait_for_descriptors(self, listener: Listener, error: OSError) -> None:
        if not self._starved:
            self._starved = True
            self._log.error("%s: clients wait, nothing is left to accept them with: %s", listener, error)
        # Somebody else may close a descriptor unseen: looks again after a while in any case.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.accept_retry):
                await self._next_end()
        if listener in self._listeners and not self._paused:
            self._watch(listener)

    def _welcome(self, connected: socket.socket) -> None:
        handshake = Handshake(self._catalogue)
        if len(self._sessions) < self._limits.connections:
            self._begin(self._sessions, connected, handshake, self._limits.handshake)
            return
        reason = f"the server has {self._limits.connections} connections, the most it takes; try again later"
        self._burst.refused(reason)
        if len(self._refused) < self._limits.refusals:
            handshake.refuse(Reply.ERR_POLICY, reason)
            self._begin(self._refused, connected, handshake, self._limits.refusal)
        else:
            connected.close()

    def _begin(self, among: dict[int, Session], connected: socket.socket, handshake: Handshake, timeout: float) -> None:
        token = next(self._tokens)
        hand_over = partial(self._serve, self._exports)
        session = Session(token, connected, handshake, timeout=timeout, hand_over=hand_over, log=self._log)
        among[token] = session
        task = asyncio.create_task(session.run(), name=f"NBD handshake {token}")
        self._negotiating[token] = task
        task.add_done_callback(lambda done: self._negotiated(session, done))

    def _negotiated(self, session: Session, task: asyncio.Task[str]) -> None:
        del self._negotiating[session.token]
        session.release()  # a task cancelled before its first step has not done so
        # "" says it was handed over; the engine's notice of its end may even have come before this.
        if reason := "dropped, the server stops" if task.cancelled() else task.result():
            self._end(session, reason)

    def _serve(self, exports: Mapping[str, NbdExport], session: Session, outcome: Transmission) -> _engine.Connection:
        return self._hand_over(exports, Unfinished(outcome.initial), session)

    def _hand_over(
        self, exports: Mapping[str, NbdExport], unfinished: Unfinished, session: Session
    ) -> _engine.Connection:
        """Hand the connection to the engine. Raises OSError when the engine cannot take it."""
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
                        f"export {session.export!r}: it did not take its last {len(result.unsent)} bytes of replies"
                    )
                    self._log.warning("%s, %s", session.peer, missed)
                self._end(session, "disconnected" if self._stopping else "handed over")
                if self._stopping:
                    moving.close()
                elif self._paused:
                    self._moved.append(moving)
                else:  # it took longer than anybody waited
                    self._take_back(moving)
            else:
                self._end(session, closing_reason(result, error))

    def _end(self, session: Session, reason: str) -> None:
        session.connection = None
        self._log.info("%s: %s", session.peer, reason)
        if self._refused.pop(session.token, None) is None:
            del self._sessions[session.token]
            # Not at the first free place: a burst would be reported once for every client that leaves.
            if len(self._sessions) <= self._limits.connections * 7 // 8:
                self._burst.over()
        self._ended.set()
        self._on_change()

    # moving to another server

    def hold_back(self) -> None:
        """Accept nobody until `go_on`."""
        self._process.check()
        self._paused = True
        for listener in self._listeners:
            self._ignore(listener)

    async def end_handshakes(self) -> None:
        """Accept nobody until `go_on`. A client still in its handshake has a moment to end it, and is dropped then."""
        self.hold_back()
        await self._stop_negotiating(_MOVE_GRACE)

    async def pause(self, timeout: float | None = None) -> list[Moving]:
        """Accept nobody and let every client go, without their noticing; the sockets go on listening. No client
        is waited for: what it has not taken of its replies goes along.

        timeout: seconds for requests in flight to end. Raises TimeoutError, whose text names the clients that still
        have some; in any case `go_on` takes up what was let go and not returned here.
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
        """The clients there are, for people: at most _NAMED."""
        names = [f"{session.peer} (export {session.export!r})" for session in self._sessions.values()]
        more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
        return ", ".join(names[:_NAMED] + more)

    def go_on(self, moving: Iterable[Moving] = ()) -> None:
        """Serve these clients, and those `pause` did not return, and accept again."""
        self._process.check()
        self._paused = False
        returned, self._moved = self._moved, []
        for client in (*returned, *moving):
            self._take_back(client)
        for listener in self._listeners:
            self._watch(listener)

    def _take_back(self, moving: Moving) -> None:
        token = next(self._tokens)
        connected = socket.socket(fileno=moving.descriptor)
        hand_over = partial(self._hand_over, self._exports, moving.unfinished)
        session = Session(
            token,
            connected,
            Handshake(self._catalogue),
            timeout=0,
            hand_over=partial(self._serve, self._exports),
            log=self._log,
        )
        self._sessions[token] = session
        try:
            session.go_on(hand_over, moving)
        except (OSError, KeyError) as error:
            self._end(session, f"lost while it was handed over: {error!r}")

    # the end

    async def stop(self, timeout: float = 10.0) -> int:
        """Stop listening, end handshakes with ERR_SHUTDOWN, let the engine finish what is in flight and clients
        take their replies. One that does not is cut, and the log names it.

        timeout: seconds for all of it. Returns how many connections still had requests in flight then (the
        engine's `close` ends those); 0 is a clean stop. May be called again. In a fork it does nothing: sockets,
        their files and the clients are the parent's.
        """
        if not self._process.is_current:
            return 0
        self._stopping = True
        deadline = asyncio.get_running_loop().time() + timeout
        cut = deadline - min(_CUT_GRACE, timeout / 2)
        for task in self._waiting:
            task.cancel()
        for listener in self._listeners:
            self._ignore(listener)
            self._stop_listening(listener)
        self._listeners.clear()
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
        return len(self._sessions)

    async def _wait_for_all(self, deadline: float) -> bool:
        """Whether all clients have gone by then."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                while self._sessions:
                    await self._next_end()
        return not self._sessions

    def _stop_listening(self, listener: Listener) -> None:
        try:
            listener.close()
        except OSError as error:
            self._log.error("a socket file could not be removed: %s", error)

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
