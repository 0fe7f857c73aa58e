"""A group: devices that stand on each other, and the worker process they share.

The group's lock serializes everything that changes its devices or its worker. A worker that dies is
replaced, after a pause that grows with every death, and given the states and descriptors of what it
held; one that dies too often leaves its devices FAILED, with the reason. A killed process of which a thread
waits for storage in the kernel has not ended, and may write yet: none takes its place before it has. On the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from blkloom.control import messages as m
from blkloom.errors import WorkerGone, WorkerStuck
from blkloom.supervisor.link import Link, Opener

_log = logging.getLogger(__name__)

LEAVE_SECONDS: Final = 120.0
"""For a worker to drain and flush all it has; each device has a bound of its own, which is shorter."""
KILL_SECONDS: Final = 10.0
"""For a killed process to end; one that waits for storage in the kernel does not."""


class Group(msgspec.Struct):
    """id: unique in the run directory, the worker's socket is called so. minors: its devices."""

    id: str
    minors: set[int] = msgspec.field(default_factory=set)
    link: Link | None = None
    pid: int = 0
    pidfd: int = -1
    lock: asyncio.Lock = msgspec.field(default_factory=asyncio.Lock)
    deaths: deque[float] = msgspec.field(default_factory=deque)
    leaving: bool = False
    """Its worker is meant to end."""
    ended: asyncio.Event = msgspec.field(default_factory=asyncio.Event)
    """The worker process has ended."""
    status: int | None = None
    """How, if the zygote said so."""
    status_told: asyncio.Event = msgspec.field(default_factory=asyncio.Event)
    forked: bool = False
    """The zygote there is forked its worker, and will say how it ended."""
    restarting: asyncio.Task[None] | None = None
    targets: frozenset[str] = frozenset()
    """That tables of its devices named when its worker was forked."""
    began: int = 0
    """When its worker's process began, as /proc says: with its number it names one process."""
    dying: bool = False
    """The worker's main thread has ended, and the process has not."""
    waiting: str = ""
    """What its devices wait for."""
    after: Group | None = None
    """One whose worker may have this one's devices, too: that has to end first."""
    arriving: set[int] = msgspec.field(default_factory=set)
    """Devices that another group hands over to it: what its worker says of them counts already."""

    async def call(self, call: m.WorkerCall, *fds: int, opener: Opener | None = None, wait: float | None = None) -> Any:
        """As `Link.call`. Raises WorkerGone when there is no worker."""
        if self.link is None:
            raise WorkerGone(f"worker {self.id} is not running", cure="its devices come back; try again")
        return await self.link.call(call, fds, opener=opener, wait=wait)

    def watch(self, died: Callable[[Group], None]) -> None:
        """Has `died` called when the process ends. pidfd_open(2)."""
        self.ended.clear()
        self.dying = False
        self.began = process_began(self.pid)
        self.status = None
        self.status_told.clear()
        loop = asyncio.get_running_loop()
        descriptor = self.pidfd

        def ended() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            if self.pidfd == descriptor:  # not one that was given up
                self.pidfd, self.pid = -1, 0
                self.ended.set()
                died(self)

        loop.add_reader(descriptor, ended)

    def look(self) -> bool:
        """Whether `dying` has become true: the process was killed, and a thread of it cannot end yet. Nothing tells: a
        pidfd is readable when all have ended (one of the main thread, too, from Linux 6.15 on).
        """
        if self.dying or self.pidfd < 0 or _state(self.pid) not in ("Z", "X"):
            return False
        self.dying = True
        return True

    def kill(self) -> None:
        """Ends the process at once. Its end is noticed as any other."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    async def wait_for_end(self, seconds: float = KILL_SECONDS) -> bool:
        """Whether the process has ended within so many seconds."""
        if self.pidfd >= 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self.ended.wait()
        return self.pidfd < 0

    async def leave(self, *, flush: bool) -> bool:
        """Has the worker end, by force if it does not, and waits for that. False: it has not ended even so, because
        storage holds it.
        """
        self.leaving = True
        asked = self.link is not None and not self.dying
        if self.link:
            try:
                await self.link.call(m.Leave(flush=flush), wait=LEAVE_SECONDS if flush else None)
            except (OSError, ValueError) as error:
                if not isinstance(error, WorkerGone):
                    _log.error("worker %s does not leave: %s", self.id, error)
                asked = asked and not isinstance(error, WorkerStuck) and not self.dying
        if asked and not await self.wait_for_end(LEAVE_SECONDS):
            _log.error("worker %s does not end, and is killed", self.id)
        if self.pidfd >= 0:
            self.kill()
            if not await self.wait_for_end():
                _log.error("worker %s, process %d, was killed and does not end: storage holds it", self.id, self.pid)
        if self.link:
            await self.link.close()
            self.link = None
        return self.pidfd < 0


Restart = Callable[[Group], Awaitable[None]]


def process_began(pid: int) -> int:
    """Clock ticks from the machine's start to the process's; 0 where there is none."""
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def _state(pid: int) -> str:
    """Of its main thread: Z where that has ended."""
    fields = _stat(pid)
    return fields[0] if fields else ""


def _stat(pid: int) -> list[str]:
    """The fields behind its name. Source: proc_pid_stat(5)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].decode("ascii").split()
    except OSError:
        return []


def still_there(identifier: str, pid: int, began: int) -> Group | None:
    """The group of a worker that nobody can speak to, if its process has not ended."""
    if not began or process_began(pid) != began:
        return None
    try:
        group = Group(identifier, pid=pid, pidfd=os.pidfd_open(pid))
    except OSError:
        return None
    group.watch(lambda _group: None)
    return group if group.began == began else None
