"""A group: the devices that are stacked on each other, and the worker process that serves them.

The lock of the group serializes all changes of its devices and its worker. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgspec

from blkloom.control import messages as m
from blkloom.control.endpoint import Opener
from blkloom.errors import WorkerGone, WorkerStuck
from blkloom.supervisor.link import ANSWER_SECONDS, Link

_log = logging.getLogger(__name__)

LEAVE_SECONDS: Final = 120.0
"""Seconds for a worker to drain and flush all its devices. Each device has its own, shorter limit."""
STOPPED_SECONDS: Final = 3.0
"""Seconds for a stopped process to go on, before calls to it fail."""
_LOOK_SECONDS: Final = 0.1
"""Seconds between looks whether a process is stopped, while a call waits for it. There is no event for that."""
_STOPPED: Final = ("T", "t")
_ENDED: Final = ("Z", "X")
"""States of processes. Source: proc_pid_stat(5)."""
KILL_SECONDS: Final = 10.0
"""Seconds for a killed process to end. A process that waits for storage in the kernel takes longer."""


class Group(msgspec.Struct):
    """A group of devices with their worker. id: unique in the run directory; also the name of the worker's socket.
    minors: its devices.
    """

    id: str
    minors: set[int] = msgspec.field(default_factory=set)
    link: Link | None = None
    pid: int = 0
    pidfd: int = -1
    lock: asyncio.Lock = msgspec.field(default_factory=asyncio.Lock)
    deaths: deque[float] = msgspec.field(default_factory=deque)
    leaving: bool = False
    """The worker is expected to end."""
    ended: asyncio.Event = msgspec.field(default_factory=asyncio.Event)
    """The worker process has ended."""
    status: int | None = None
    """Exit status of the worker, if the zygote has reported it."""
    status_told: asyncio.Event = msgspec.field(default_factory=asyncio.Event)
    forked: bool = False
    """The present zygote has forked the worker, so it will report the exit status."""
    restarting: asyncio.Task[None] | None = None
    targets: frozenset[str] = frozenset()
    """Targets in the tables of its devices when the worker was forked."""
    began: int = 0
    """Start time of the worker's process from /proc. Together with the pid it identifies the process."""
    dying: bool = False
    """The main thread of the worker has ended, but the process has not."""
    stopped_at: float | None = None
    """Time of the event loop when the process was first seen stopped, by SIGSTOP or a debugger; None if it runs."""
    waiting: str = ""
    """The reason why its devices wait."""
    after: Group | None = None
    """A group whose worker may also have these devices. That worker must end first."""
    arriving: set[int] = msgspec.field(default_factory=set)
    """Devices that another group is handing over to this one: messages of the new worker already count for them."""

    async def call(
        self,
        call: m.WorkerCall,
        *fds: int,
        opener: Opener | None = None,
        wait: float | None = None,
        answer: float = ANSWER_SECONDS,
        late: bool = False,
    ) -> Any:
        """As `Link.call`. Raises WorkerGone when there is no worker, and WorkerStuck as `check_running`; the worker
        has not got the call then, unless it was stopped meanwhile. late: it gets it, and executes it when it goes on.
        """
        if not late:
            await self.check_running()
        if self.link is None:
            raise WorkerGone(f"worker {self.id} is not running", cure="its devices come back; try again")
        asked = asyncio.create_task(self.link.call(call, fds, opener=opener, wait=wait, answer=answer))
        try:
            while not (await asyncio.wait({asked}, timeout=_LOOK_SECONDS))[0]:
                self._check_not_stopped()
            return asked.result()
        finally:
            if not asked.done():
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)  # it uses the descriptors until then

    async def check_running(self) -> None:
        """Raises WorkerStuck if the process is stopped, and has been so for STOPPED_SECONDS; waits as long as it is
        stopped for less.
        """
        while True:
            if not self._check_not_stopped():
                return
            await asyncio.sleep(_LOOK_SECONDS)

    def _check_not_stopped(self) -> bool:
        """Whether the process is stopped. Raises WorkerStuck if it has been so for STOPPED_SECONDS."""
        if not self.is_stopped() or self.stopped_at is None:
            return False
        if asyncio.get_running_loop().time() - self.stopped_at < STOPPED_SECONDS:
            return True
        raise WorkerStuck(
            f"worker {self.id} is stopped, by SIGSTOP or a debugger",
            cure=f"continue it (kill -CONT {self.pid}), or end it with `remove --force` or `stop --force`",
        )

    def go_on(self) -> None:
        """Continues the process if it is stopped."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGCONT)

    def watch(self, died: Callable[[Group], None]) -> None:
        """Calls `died` when the process ends. Source: pidfd_open(2)."""
        self.ended.clear()
        self.dying, self.stopped_at = False, None
        self.began = process_began(self.pid)
        self.status = None
        self.status_told.clear()
        loop = asyncio.get_running_loop()
        descriptor = self.pidfd

        def ended() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            if self.pidfd == descriptor:  # not a group that was given up
                self.pidfd, self.pid = -1, 0
                self.ended.set()
                died(self)

        loop.add_reader(descriptor, ended)

    def look(self) -> bool:
        """Updates `stopped_at` and `dying`, and returns whether the latter has become true: the process was killed, but
        one of its threads cannot end yet. There is no event for this: a pidfd becomes readable when all threads have
        ended.
        """
        state = self._look_at_state()
        if self.dying or state not in _ENDED:
            return False
        self.dying = True
        return True

    def is_stopped(self) -> bool:
        """Whether the process is stopped, by SIGSTOP or a debugger."""
        return self._look_at_state() in _STOPPED

    def _look_at_state(self) -> str:
        state = _state(self.pid) if self.pidfd >= 0 else ""
        if state not in _STOPPED:
            self.stopped_at = None
        elif self.stopped_at is None:
            self.stopped_at = asyncio.get_running_loop().time()
        return state

    def kill(self) -> None:
        """Kills the process. Its end is handled like any other."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    @property
    def unended(self) -> str:
        """Why nothing may replace a killed worker that has not ended."""
        return f"its former worker, process {self.pid}, was killed and has not ended: storage hangs; it may still write"

    async def wait_for_end(self, seconds: float = KILL_SECONDS) -> bool:
        """Waits for the end of the process. Returns whether it has ended in time."""
        if self.pidfd >= 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self.ended.wait()
        return self.pidfd < 0

    async def leave(self, *, flush: bool) -> bool:
        """Asks the worker to end, kills it if it does not, and waits for its end. Returns False if it has not ended
        even then, because it waits for storage.
        """
        self.leaving = True
        asked = self.link is not None and not self.dying
        if self.link:
            try:
                await self.call(m.Leave(flush=flush), wait=LEAVE_SECONDS if flush else None)
            except (OSError, ValueError) as error:
                if not isinstance(error, WorkerGone):
                    _log.error("worker %s does not leave: %s", self.id, error)
                asked = asked and not isinstance(error, WorkerStuck) and not self.dying
        if asked and not await self.wait_for_end(LEAVE_SECONDS):
            _log.error("worker %s does not end and is killed", self.id)
        if self.pidfd >= 0:
            self.kill()
            if not await self.wait_for_end():
                _log.error("worker %s, process %d, was killed and does not end: storage hangs", self.id, self.pid)
        if self.link:
            await self.link.close()
            self.link = None
        return self.pidfd < 0


def process_began(pid: int) -> int:
    """Start time of the process in clock ticks since boot; 0 if there is no such process."""
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def _state(pid: int) -> str:
    """State of the main thread; Z when it has ended."""
    fields = _stat(pid)
    return fields[0] if fields else ""


def _stat(pid: int) -> list[str]:
    """The fields after the name of the process. Source: proc_pid_stat(5)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].decode("ascii").split()
    except OSError:
        return []


def still_there(identifier: str, pid: int, began: int) -> Group | None:
    """A group for a former worker that cannot be reached, if its process has not ended yet; else None."""
    if not began or process_began(pid) != began:
        return None
    try:
        group = Group(identifier, pid=pid, pidfd=os.pidfd_open(pid))
    except OSError:
        return None
    group.watch(lambda _group: None)
    return group if group.began == began else None
