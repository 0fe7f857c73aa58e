"""Idle timeout: ends a supervisor that has had neither devices nor clients for some time.

The next command starts another supervisor, or systemd does, which has kept the socket. No client is lost meanwhile: a
command that looks for the socket waits for `start.lock`, which this process holds until it has ended, and clients that
have already connected are served. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import socket
from collections.abc import Callable
from typing import Final

from blkloom.control.rundir import RunDir

_AGAIN_SECONDS: Final = 1.0
"""Seconds until the next try, if a command was about to connect."""


class Idling:
    """The idle timeout of one supervisor. seconds: 0 for never. is_idle: returns whether there are neither devices nor
    clients.
    """

    def __init__(self, run_dir: RunDir, seconds: float, is_idle: Callable[[], bool], end: Callable[[], None]) -> None:
        self._run_dir = run_dir
        self._seconds = seconds
        self._is_idle = is_idle
        self._end = end
        self._control: socket.socket | None = None
        self._ours = False
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, control: socket.socket, *, ours: bool) -> None:
        """Starts the timeout. ours: whether the supervisor owns the file of the socket and may remove it."""
        self._control, self._ours = control, ours
        self.look()

    def look(self) -> None:
        """Checks for idleness, after a device or a client has gone."""
        self._wait(self._seconds)

    def _wait(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._seconds and self._control is not None and self._is_idle():
            self._timer = asyncio.get_running_loop().call_later(seconds, self._expired)

    def _expired(self) -> None:
        if self._control is None or not self._is_idle():
            return
        if self._withdraw(self._control):
            asyncio.get_running_loop().remove_reader(self._control)  # the next supervisor has systemd's clients
            self._end()
        else:
            self._wait(_AGAIN_SECONDS)

    def _withdraw(self, control: socket.socket) -> bool:
        """Makes the supervisor unreachable for new clients. Returns False if a client has connected or is about to."""
        if not self._ours:
            return not _has_clients(control)  # later clients wait in the socket for the next supervisor
        lock = os.open(self._run_dir.start_lock, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        aside = self._run_dir.control.with_suffix(".idle")
        os.rename(self._run_dir.control, aside)
        if _has_clients(control):
            os.rename(aside, self._run_dir.control)
            os.close(lock)
            return False
        os.unlink(aside)
        return True  # the lock ends with the process


def _has_clients(control: socket.socket) -> bool:
    """Whether clients have connected that are not accepted yet."""
    waiting = select.poll()
    waiting.register(control, select.POLLIN)
    return bool(waiting.poll(0))
