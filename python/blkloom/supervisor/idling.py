"""The end of a supervisor that nobody needs: it has had neither devices nor clients for a time.

The next command starts another, or systemd does, which has kept the socket. No client may find the one that
ends: whoever looks for its socket from then on waits for `start.lock`, which the process holds until it is
gone, and whoever has connected already is served. On the event loop.
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
"""After a command was just about to look for the supervisor."""


class Idling:
    """Of one supervisor. seconds: 0 for never. is_idle: whether there are neither devices nor clients."""

    def __init__(self, run_dir: RunDir, seconds: float, is_idle: Callable[[], bool], end: Callable[[], None]) -> None:
        self._run_dir = run_dir
        self._seconds = seconds
        self._is_idle = is_idle
        self._end = end
        self._control: socket.socket | None = None
        self._ours = False
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, control: socket.socket, *, ours: bool) -> None:
        """Clients are answered from now on. ours: whether the socket's file is the supervisor's to remove."""
        self._control, self._ours = control, ours
        self.look()

    def look(self) -> None:
        """A device or a client has gone."""
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
            asyncio.get_running_loop().remove_reader(self._control)  # a client of systemd's socket is the next one's
            self._end()
        else:
            self._wait(_AGAIN_SECONDS)

    def _withdraw(self, control: socket.socket) -> bool:
        """Whether no client can come any more, and none has."""
        if not self._ours:
            return not _has_clients(control)  # those that come later wait in the socket for who is started next
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
        return True  # the lock goes with the process


def _has_clients(control: socket.socket) -> bool:
    """Whether there are some that have connected and have not been accepted."""
    waiting = select.poll()
    waiting.register(control, select.POLLIN)
    return bool(waiting.poll(0))
