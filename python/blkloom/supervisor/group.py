"""A group: devices that stand on each other, and the worker process they share.

The group's lock serializes everything that changes its devices or its worker. A worker that dies is
replaced, after a pause that grows with every death, and given the states and descriptors of what it
held; one that dies too often leaves its devices FAILED, with the reason. On the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from blkloom.control import messages as m
from blkloom.errors import WorkerGone, WorkerStuck
from blkloom.supervisor.link import Link, Opener

_log = logging.getLogger(__name__)

LEAVE_SECONDS: Final = 120.0
"""For a worker to drain and flush all it has; each device has a bound of its own, which is shorter."""
KILL_SECONDS: Final = 10.0
"""For a killed process to end; one that waits for storage in the kernel does not."""


@dataclass
class Group:
    """id: unique in the run directory, the worker's socket is called so. minors: its devices."""

    id: str
    minors: set[int] = field(default_factory=set)
    link: Link | None = None
    pid: int = 0
    pidfd: int = -1
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    deaths: deque[float] = field(default_factory=deque)
    leaving: bool = False
    """Its worker is meant to end."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """The worker process has ended."""
    status: int | None = None
    """How, if the zygote said so."""
    status_told: asyncio.Event = field(default_factory=asyncio.Event)
    forked: bool = False
    """The zygote there is forked its worker, and will say how it ended."""
    restarting: asyncio.Task[None] | None = None
    targets: frozenset[str] = frozenset()
    """That tables of its devices named when its worker was forked."""
    arriving: set[int] = field(default_factory=set)
    """Devices that another group hands over to it: what its worker says of them counts already."""

    async def call(self, call: m.WorkerCall, *fds: int, opener: Opener | None = None, wait: float | None = None) -> Any:
        """As `Link.call`. Raises WorkerGone when there is no worker."""
        if self.link is None:
            raise WorkerGone(f"worker {self.id} is not running", cure="its devices come back; try again")
        return await self.link.call(call, fds, opener=opener, wait=wait)

    def watch(self, died: Callable[[Group], None]) -> None:
        """Has `died` called when the process ends. pidfd_open(2)."""
        self.ended.clear()
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

    def kill(self) -> None:
        """Ends the process at once. Its end is noticed as any other."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    async def wait_for_end(self) -> bool:
        """After `kill`: whether the process has ended within KILL_SECONDS."""
        try:
            async with asyncio.timeout(KILL_SECONDS):
                await self.ended.wait()
        except TimeoutError:
            _log.error("worker %s, process %d, was killed and does not end: its storage holds it", self.id, self.pid)
            return False
        return True

    async def leave(self, *, flush: bool) -> None:
        """Has the worker end, by force if it does not, and waits for that."""
        self.leaving = True
        if self.link:
            try:
                await self.link.call(m.Leave(flush=flush), wait=LEAVE_SECONDS if flush else None)
            except (OSError, ValueError) as error:
                if not isinstance(error, WorkerGone):
                    _log.error("worker %s does not leave: %s", self.id, error)
                if isinstance(error, WorkerStuck):
                    self.kill()
        else:
            self.kill()  # nobody speaks to it any more, so it cannot be asked
        if self.pidfd >= 0:
            try:
                async with asyncio.timeout(LEAVE_SECONDS):
                    await self.ended.wait()
            except TimeoutError:
                _log.error("worker %s does not end, and is killed", self.id)
                self.kill()
                await self.wait_for_end()
        if self.link:
            await self.link.close()
            self.link = None


Restart = Callable[[Group], Awaitable[None]]
