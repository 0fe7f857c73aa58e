"""The connections of an `_engine.NbdClient`: makes them again when they are lost.

One thread for each client. It waits for the engine, connects absent slots, and makes waiting requests fail when there
was no usable connection for too long. Any thread may ask for the state.
"""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec

from blkloom import _engine
from blkloom.nbd_client.connecting import Connected, connect
from blkloom.nbd_client.handshake import SEND_WRITE_ZEROES, HandshakeError, ServerExport
from blkloom.nbd_client.uri import NbdUri
from blkloom.printing import described

CONNECT_SECONDS: Final = 10.0
"""How long one attempt to connect may take."""
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0
_STABLE: Final = 5.0
"""Seconds after the last connection: a loss within them delays the next attempt."""


class Needs(msgspec.Struct, frozen=True):
    """What every connection must offer, because the device relies on it. size, block, longest: bytes. writable: the
    export may be written. multi_conn: there are several connections. extended, write_zeroes: the lengths of requests
    without data rely on extended headers, on NBD_CMD_WRITE_ZEROES.
    """

    size: int
    block: int
    longest: int
    writable: bool
    multi_conn: bool
    extended: bool
    write_zeroes: bool

    def check(self, found: ServerExport) -> None:
        """Raises HandshakeError if the server does not offer that (any more)."""
        what = ""
        if found.size < self.size:
            what = f"the export has {found.size} bytes, but {self.size} are needed"
        elif self.writable and found.read_only:
            what = "the export is read-only now"
        elif found.minimum > self.block or found.maximum < self.longest:
            what = f"the export's block sizes are {found.minimum} to {found.maximum} bytes now"
        elif self.multi_conn and not found.multi_conn:
            what = "the export does not allow several connections any more"
        elif self.extended and not found.extended:
            what = "the server does not have extended headers any more"
        elif self.write_zeroes and not found.flags & SEND_WRITE_ZEROES:
            what = "the server does not write zeroes any more"
        if what:
            raise HandshakeError(what, "load the table again")


class Links:
    """The connections of `client` to `uri`. reconnect: seconds that requests wait for a connection. tell: reports an
    event, on the thread of this class.
    """

    def __init__(
        self,
        client: _engine.NbdClient,
        engine: _engine.Engine,
        uri: NbdUri,
        needs: Needs,
        *,
        reconnect: float,
        tell: Callable[[str], None],
    ) -> None:
        self._client = client
        self._engine = engine
        self._uri = uri
        self._needs = needs
        self._reconnect = reconnect
        self._tell = tell
        self._closed = self._ended = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._error = ""
        self._thread = threading.Thread(target=self._run, name="blkloom-nbd")

    @property
    def error(self) -> str:
        """The last error; "" if there was none."""
        with self._lock:
            return self._error

    def report(self) -> dict[str, Any]:
        """The state of the engine's client."""
        return self._client.report()

    def start(self) -> None:
        """Starts the thread. Raises RuntimeError."""
        self._thread.start()

    def add(self, slot: int, connected: Connected) -> None:
        """Uses a connection for a slot. Raises OSError, HandshakeError."""
        found = connected.found
        self._needs.check(found)
        self._client.connect(
            self._engine,
            slot,
            connected.socket.fileno(),
            structured=found.structured,
            extended=found.extended,
            flags=found.flags,
            allocation=found.allocation,
            tls=connected.session,
        )

    def close(self) -> None:
        """Ends all connections. Requests fail. The thread may end later: it may be connecting."""
        with self._lock:
            self._closed = True
            if self._thread.ident is None:
                os.close(self._wake)
            elif not self._ended:
                os.eventfd_write(self._wake, 1)
        self._client.close()

    def _report(self) -> dict[str, Any]:
        report = self._client.report(take=True)
        if report["lost"]:
            self._note(report["lost"][-1][1])
        return report

    def _note(self, error: str) -> None:
        with self._lock:
            self._error = error

    def _run(self) -> None:
        try:
            self._connect_until_closed()
        finally:
            with self._lock:
                self._ended = True
                os.close(self._wake)

    def _connect_until_closed(self) -> None:
        poller = select.poll()
        poller.register(self._client.fileno(), select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        lost_at: float | None = None
        pause, next_try, connected_at = _FIRST_PAUSE, 0.0, 0.0
        said = False
        """Users were told of the loss."""
        while not self._closed:
            report = self._report()
            now = time.monotonic()
            if report["lost"] and now - connected_at < _STABLE:
                next_try = now + pause
                pause = min(pause * 2, _LONGEST_PAUSE)
            elif report["lost"]:
                pause = _FIRST_PAUSE
            if report["usable"]:
                if said:
                    self._tell(f"the NBD server {self._uri} is connected again")
                lost_at, said = None, False
            elif lost_at is None:
                lost_at = now
            if not report["usable"] and not said:
                self._tell(f"the NBD server {self._uri} is not connected: {self.error or 'it was not reached'}")
                said = True
            wait: float | None = None
            if lost_at is not None and not report["failing"]:
                wait = max(lost_at + self._reconnect - now, 0.0)
                if wait == 0 and self._client.give_up(errno.EIO):
                    self._tell(f"the NBD server {self._uri} was not connected for {self._reconnect:g} s: requests fail")
                    continue
            absent = [slot for slot, link in enumerate(report["links"]) if link == "absent"]
            if absent and now >= next_try:
                if self._try(absent[0], now, wait):
                    connected_at = time.monotonic()
                else:
                    next_try = time.monotonic() + pause
                    pause = min(pause * 2, _LONGEST_PAUSE)
                continue
            if absent:
                wait = min(next_try - now, wait if wait is not None else next_try - now)
            poller.poll(None if wait is None else max(wait * 1000, 1))

    def _try(self, slot: int, now: float, most: float | None) -> bool:
        """One attempt to connect. Returns whether it succeeded."""
        try:
            with connect(self._uri, now + min(CONNECT_SECONDS, most or CONNECT_SECONDS)) as connected:
                self.add(slot, connected)
        except HandshakeError as error:
            self._note(f"{error}{f'; {error.cure}' if error.cure else ''}")
            return False
        except (OSError, ValueError) as error:
            self._note(described(error))
            return False
        return True
