"""Replacement of workers that have died.

A worker that dies is replaced after a pause, which grows with every death. After too many deaths the devices become
FAILED, with the reason. No worker starts before the former process has ended: a killed process can stay for a while
because one of its threads waits for storage in the kernel, and it may still write. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from blkloom.control.endpoint import Opener
from blkloom.errors import WorkerGone
from blkloom.printing import described
from blkloom.supervisor import exporting, states
from blkloom.supervisor.group import Group

if TYPE_CHECKING:
    from blkloom.supervisor.workers import Workers

_log = logging.getLogger(__name__)

DEATHS_WITHIN: Final = 60.0
"""Period in seconds in which the deaths of a worker are counted."""
_STATUS_SECONDS: Final = 0.2
"""Seconds for the zygote to report the exit status."""
_LOOK_SECONDS: Final = 1.0
"""Period in seconds of the search for killed workers that cannot end."""
_END_SECONDS: Final = 1.0
"""Seconds from the end of the main thread to the end of the process, if no thread waits for storage."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 0.5
"""Seconds between two restarts."""


class Restarts:
    """Replaces dead workers of `workers`. deaths: after more deaths within DEATHS_WITHIN seconds, the devices fail.
    recovery: seconds that I/O waits for a killed worker to end; after that, the devices fail.
    """

    def __init__(self, workers: Workers, deaths: int, recovery: float) -> None:
        self._workers = workers
        self._deaths = deaths
        self.recovery = recovery
        self._looking: asyncio.Task[None] | None = None
        self._awaited: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        """Starts the search for killed workers that cannot end, if it is not running."""
        if self._looking is None:
            self._looking = asyncio.create_task(self._look(), name="look at workers")

    def end(self) -> None:
        """Ends the search."""
        for task in (self._looking, *self._awaited):
            if task is not None:
                task.cancel()

    async def _look(self) -> None:
        """Polls killed workers that cannot end; this takes about ten microseconds for each."""
        while True:
            await asyncio.sleep(max(_LOOK_SECONDS, len(self._workers.groups) / 1000))
            for group in self._workers.groups.values():
                if group.look():
                    task = asyncio.create_task(self._await_end(group, group.pid), name=f"end of worker {group.id}")
                    self._awaited.add(task)
                    task.add_done_callback(self._awaited.discard)

    async def _await_end(self, group: Group, pid: int) -> None:
        """Notes a worker that was killed and has not ended soon after: one of its threads waits for storage in the
        kernel.
        """
        if await group.wait_for_end(_END_SECONDS) or group.pid != pid or self._workers.resting:
            return
        if group.link:  # the process no longer answers
            await group.link.close()
            group.link = None
        group.waiting = f"waits for its former worker, process {pid}, which was killed and has not ended"
        for entry in self._workers.registry.lower_first(group.minors):
            _log.warning("device '%s' %s: storage hangs; at most %g s", entry.name, group.waiting, self.recovery)
            self._workers.changed(entry)
        ended = await group.wait_for_end(self.recovery)
        if not ended and group.pid == pid and not group.leaving and not self._workers.resting:
            group.waiting = ""
            self._workers.fail(group, f"{group.unended}, for {self.recovery:g} s")

    def died(self, group: Group) -> None:
        """Starts the replacement of a worker whose process has ended, unless it was to end."""
        group.waiting = ""
        failed = False
        for minor in group.minors:
            if entry := self._workers.registry.get(minor):
                failed |= bool(entry.failed)
                self._workers.registry.lost_clients(entry)
                self._workers.changed(entry)
        if not group.leaving and not self._workers.resting and group.id in self._workers.groups and not failed:
            group.restarting = asyncio.create_task(self._replace(group), name=f"restart {group.id}")

    async def _replace(self, group: Group) -> None:
        async with group.lock:
            if group.leaving or group.pid or self._workers.ending or group.id not in self._workers.groups:
                return
            try:
                await self.restart(group, await self._reason(group))
            except Exception as error:
                _log.exception("worker %s", group.id)
                self._workers.fail(group, f"worker cannot be replaced: {described(error)}")

    async def _reason(self, group: Group) -> str:
        if group.forked:  # the zygote reports the status just after the end, unless it has ended too
            with suppress(TimeoutError):
                async with asyncio.timeout(_STATUS_SECONDS):
                    await group.status_told.wait()
        status = group.status
        if status is None:
            return "its worker ended"
        if status < 0:
            return f"its worker was killed by {signal.Signals(-status).name}"
        return f"its worker ended with status {status}"

    async def restart(self, group: Group, reason: str, *, opener: Opener | None = None, died: bool = True) -> None:
        """Starts a new worker with the devices of the group; after too many deaths sets them to FAILED instead. died:
        False if no worker has died just now.
        """
        loop = asyncio.get_running_loop()
        while True:
            for former in (group, group.after):  # it runs but does not answer
                if former is not None and former.pidfd >= 0 and not await former.leave(flush=False):
                    self._workers.fail(group, former.unended)
                    return
            group.after = None
            if group.link:
                await group.link.close()
                group.link = None
            for minor in group.minors:  # clients of a failed hand-over
                self._workers.store.drop(self._workers.store.passing(minor))
            now = loop.time()
            if died:
                group.deaths.append(now)
            while group.deaths and group.deaths[0] < now - DEATHS_WITHIN:
                group.deaths.popleft()
            if len(group.deaths) > self._deaths:
                self._workers.fail(group, f"{reason}, {len(group.deaths)} times within {DEATHS_WITHIN:g} s")
                return
            if len(group.deaths) > 1:
                await asyncio.sleep(min(_FIRST_PAUSE * 2 ** min(len(group.deaths) - 2, 16), _LONGEST_PAUSE))
            entries = self._workers.registry.lower_first(group.minors)
            if not entries or self._workers.ending:
                return
            for entry in entries:
                entry.event += 1
                entry.restarts += 1
            try:
                await exporting.reopen_lost(self._workers.store, entries)
                await self._workers.start(group)
                await self._workers.hold(group, [entry.state() for entry in entries], opener=opener)
            except (OSError, ValueError) as error:
                again = (
                    "died while it came up"
                    if isinstance(error, WorkerGone)
                    else f"could not take over the devices again: {described(error)}"
                )
                reason = f"its worker {again}"
                died = isinstance(error, WorkerGone) or not group.pid
                await group.leave(flush=False)
                if died:
                    continue
                self._workers.fail(group, reason)
                return
            _log.warning("%s: %s; started again", ", ".join(entry.name for entry in entries), reason)
            for entry in entries:
                entry.failed = ""
                states.save(self._workers.run_dir, entry)
                self._workers.changed(entry)
            return

    def check(self, group: Group) -> None:
        """Handles the end of a worker that ended before its group had devices."""
        if not group.pid and group.minors:
            self.died(group)
