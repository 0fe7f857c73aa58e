"""Accepting of NBD clients from listening sockets.

Accepting never awaits, so no client is lost between accept and its session. If no descriptor is free, accepting waits
until a client has left, or for a second; it never spins. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Iterator
from typing import Final

from blkloom import open_files
from blkloom.export.nbd.listening import Listener

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


class Acceptor:
    """Accepts clients from its listeners, which it owns. accepted: called with the socket of each client. reserve:
    descriptors that clients do not use up. retry: seconds before accept is tried again with no descriptor free.
    """

    def __init__(
        self, accepted: Callable[[socket.socket], None], *, reserve: int, retry: float, log: logging.Logger
    ) -> None:
        self._accepted = accepted
        self._reserve = reserve
        self._retry = retry
        self._log = log
        self._listeners: list[Listener] = []
        self._waiting: set[asyncio.Task[None]] = set()
        self._freed = asyncio.Event()
        self._starved = False
        """The log says that no descriptor is free."""
        self._paused = False

    def __iter__(self) -> Iterator[Listener]:
        return iter(list(self._listeners))

    def add(self, listener: Listener) -> None:
        """Accepts from one more listener."""
        self._listeners.append(listener)
        if not self._paused:
            self._watch(listener)

    def pause(self) -> None:
        """Accepts no clients until `go_on`; the sockets still listen."""
        self._paused = True
        for listener in self._listeners:
            self._ignore(listener)

    def go_on(self) -> None:
        """Accepts clients again."""
        self._paused = False
        for listener in self._listeners:
            self._watch(listener)

    def stop(self) -> None:
        """Closes the listeners."""
        for task in self._waiting:
            task.cancel()
        for listener in self._listeners:
            self._ignore(listener)
            try:
                listener.close()
            except OSError as error:
                self._log.error("a socket file could not be removed: %s", error)
        self._listeners.clear()

    def freed(self) -> None:
        """A client has left: its descriptor is free."""
        self._freed.set()

    def _watch(self, listener: Listener) -> None:
        asyncio.get_running_loop().add_reader(listener.socket.fileno(), self._accept, listener)

    def _ignore(self, listener: Listener) -> None:
        asyncio.get_running_loop().remove_reader(listener.socket.fileno())

    def _accept(self, listener: Listener) -> None:
        """Accepts one client; the event loop calls again for others, after it has run everything else once."""
        try:
            if open_files.are_scarce(self._reserve):
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
        self._accepted(connected)

    async def _wait_for_descriptors(self, listener: Listener, error: OSError) -> None:
        if not self._starved:
            self._starved = True
            self._log.error("%s: clients wait, nothing is left to accept them with: %s", listener, error)
        # There is no event when a descriptor is closed elsewhere: try again after a while.
        self._freed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._retry):
                await self._freed.wait()
        if listener in self._listeners and not self._paused:
            self._watch(listener)
