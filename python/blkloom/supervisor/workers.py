"""Workers: started, given their devices, watched, replaced, merged.

Whoever calls a method that takes a group holds the group's lock. What a worker says to keep is in the
store before the answer to the call it came with is acted on. On the event loop.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, Final

import msgspec

from blkloom import open_files
from blkloom.control import messages as m
from blkloom.control.async_channel import AsyncChannel
from blkloom.control.rundir import RunDir
from blkloom.control.states import DeviceState, Label
from blkloom.errors import ResourceError, WorkerGone, WorkerStuck
from blkloom.supervisor import states
from blkloom.supervisor.forking import Forker
from blkloom.supervisor.group import Group
from blkloom.supervisor.link import Link, Opener
from blkloom.supervisor.registry import Entry, Registry
from blkloom.supervisor.store import Store
from blkloom.supervisor.zygote_process import ZygoteProcess

_log = logging.getLogger(__name__)

DEATHS_WITHIN: Final = 60.0
"""Seconds in which so many deaths are too many."""
_STATUS_SECONDS: Final = 0.2
_LOOK_SECONDS: Final = 1.0
_END_SECONDS: Final = 1.0
"""From the end of a process's main thread to its own, where storage does not hold it."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 0.5
FREEZE_SECONDS: Final = 30.0
_ASKED_AT_ONCE: Final = 64
DESCRIBE_SECONDS: Final = 10.0
"""For a worker to answer a supervisor that came back, which starts no sooner."""


class _Ears:
    """What a group's worker says goes here."""

    def __init__(self, group: Group, workers: Workers) -> None:
        self._group, self._workers = group, workers

    def keep(self, labels: Sequence[Label], fds: list[int]) -> None:
        """Into the store."""
        self._workers.store.take(labels, fds)

    def drop(self, labels: Sequence[Label]) -> None:
        """Out of the store, unless a worker that takes this one's place would need them: this one may
        die before it answers the call that made it drop them.
        """
        self._workers.store.drop([label for label in labels if not self._workers.needed(label)])

    def happened(self, news: m.Happened) -> None:
        """To the entry."""
        entry = self._workers.registry.get(news.minor)
        if entry is not None and (entry.group is self._group or entry.minor in self._group.arriving):
            entry.connections = news.connections
            entry.opened |= news.opened
            entry.event = max(entry.event, news.event)
            entry.failed_syncs = news.failed_syncs
            if news.io_errors > entry.io_errors:
                entry.io_errors, entry.last_io_error = news.io_errors, news.last_io_error
            self._workers.changed(entry)

    async def sync_failed(self, news: m.SyncFailed) -> None:
        """To the entry and its state file. A worker of a former supervisor may speak before its devices are entered."""
        if self._workers.registry.get(news.minor) is None:
            await self._workers.complete.wait()
        if entry := self._workers.registry.get(news.minor):
            entry.failed_syncs = news.failed_syncs
            states.save(self._workers.run_dir, entry)
            self._workers.changed(entry)

    def gone(self) -> None:
        """A worker without a channel is of no use; one that lives and closed it is ended."""
        if not self._group.leaving and not self._workers.resting:
            self._group.kill()


class Workers:
    """All groups of a supervisor.

    changed: told that an entry's clients, event number or state changed. deaths: more within
    DEATHS_WITHIN seconds leave a device failed. recovery: seconds that I/O waits for a killed worker to end,
    before which no other takes its place; after them its devices fail.
    """

    def __init__(
        self,
        run_dir: RunDir,
        registry: Registry,
        store: Store,
        *,
        changed: Callable[[Entry], None],
        deaths: int,
        recovery: float,
        client_memory: int,
        zygote: ZygoteProcess | None = None,
    ) -> None:
        self.registry = registry
        self.store = store
        self.changed = changed
        self.groups: dict[str, Group] = {}
        self.resting = False
        """The supervisor ends and its workers stay."""
        self.complete = asyncio.Event()
        """All devices that a former supervisor left are in the registry."""
        self.ending = False
        """Everything is on its way out: no worker that dies is replaced."""
        self.hello = m.Hello(pid=os.getpid())
        self.run_dir = run_dir
        self._deaths = deaths
        self._recovery = recovery
        self._looking: asyncio.Task[None] | None = None
        self._awaited: set[asyncio.Task[None]] = set()
        self._forker = Forker(run_dir, self._exited, client_memory, zygote)

    # groups

    def new_group(self, identifier: str = "") -> Group:
        """One without a worker yet."""
        group = Group(identifier or os.urandom(6).hex())
        self.groups[group.id] = group
        return group

    async def start(self, group: Group) -> None:
        """Forks its worker. Raises ResourceError."""
        pid, pidfd, connected = await self._forker.fork(group.id, group.targets)
        group.forked = True
        await self._attach(group, pid, pidfd, connected)

    async def _attach(self, group: Group, pid: int, pidfd: int, connected: socket.socket) -> None:
        group.pid, group.pidfd, group.leaving = pid, pidfd, False
        group.watch(self._died)
        if self._looking is None:
            self._looking = asyncio.create_task(self._look(), name="look at workers")
        group.link = Link(group.id, AsyncChannel(connected, m.FromWorker), _Ears(group, self))
        await group.link.greet(self.hello)

    async def hold(self, group: Group, states: Sequence[DeviceState], *, opener: Opener | None = None) -> None:
        """Gives the worker these devices with all that is stored of them. Raises what it raises."""
        labels, fds = self.store.of([state.minor for state in states])
        group.arriving = {state.minor for state in states}
        try:
            for at in range(0, max(1, len(labels)), m.MOST_DESCRIPTORS):
                end = at + m.MOST_DESCRIPTORS
                call = m.Hold(devices=list(states), labels=labels[at:end], more=end < len(labels))
                await group.call(call, *fds[at:end], opener=opener)
        finally:
            group.arriving = set()
        for state in states:
            self.store.drop(self.store.passing(state.minor))

    async def end(self, group: Group, *, flush: bool = True) -> None:
        """Ends a group that has no devices any more, or is not needed."""
        group.leaving = True
        self.groups.pop(group.id, None)
        await group.leave(flush=flush)
        self._unlink(str(self.run_dir.worker(group.id)))  # a worker that was killed left it

    @asynccontextmanager
    async def locked(self, *entries: Entry) -> AsyncIterator[None]:
        """Holds the locks of these devices' groups, also when they are merged meanwhile."""
        while True:
            groups = sorted({entry.group.id: entry.group for entry in entries}.items())
            async with AsyncExitStack() as stack:
                for _, group in groups:
                    await stack.enter_async_context(group.lock)
                if {entry.group.id for entry in entries} <= {identifier for identifier, _ in groups}:
                    yield
                    return

    @asynccontextmanager
    async def all_locked(self) -> AsyncIterator[None]:
        """Holds the locks of all groups that have devices."""
        while True:
            entries = list(self.registry)
            async with self.locked(*entries):
                if {entry.group.id for entry in self.registry} <= {entry.group.id for entry in entries}:
                    yield
                    return

    def needed(self, label: Label) -> bool:
        """Whether the registry has the load that the descriptor belongs to in one of the device's slots."""
        entry = self.registry.get(label.device)
        return entry is not None and label.load in entry.loads

    # death

    def _exited(self, worker: str, pid: int, status: int) -> None:
        if (group := self.groups.get(worker)) is not None and group.pid in (pid, 0):
            group.status = status
            group.status_told.set()

    async def _look(self) -> None:
        """For workers that were killed and cannot end: a look takes some ten microseconds of each."""
        while True:
            await asyncio.sleep(max(_LOOK_SECONDS, len(self.groups) / 1000))
            for group in self.groups.values():
                if group.look():
                    task = asyncio.create_task(self._await_end(group, group.pid), name=f"end of worker {group.id}")
                    self._awaited.add(task)
                    task.add_done_callback(self._awaited.discard)

    async def _await_end(self, group: Group, pid: int) -> None:
        """Most end within a moment. Of one that does not, a thread waits for storage in the kernel."""
        if await group.wait_for_end(_END_SECONDS) or group.pid != pid or self.resting:
            return
        if group.link:  # nobody answers there any more
            await group.link.close()
            group.link = None
        group.waiting = f"waits for its former worker, process {pid}, which was killed and has not ended"
        for entry in self.registry.lower_first(group.minors):
            _log.warning("device %r %s: storage holds it; at most %g s", entry.name, group.waiting, self._recovery)
            self.changed(entry)
        ended = await group.wait_for_end(self._recovery)
        if not ended and group.pid == pid and not group.leaving and not self.resting:
            group.waiting = ""
            self.fail(group, f"{_unended(group)}, for {self._recovery:g} s")

    def _died(self, group: Group) -> None:
        group.waiting = ""
        failed = False
        for minor in group.minors:
            if entry := self.registry.get(minor):
                failed |= bool(entry.failed)
                self.registry.lost_clients(entry)
                self.changed(entry)
        if not group.leaving and not self.resting and group.id in self.groups and not failed:
            group.restarting = asyncio.create_task(self._replace(group), name=f"restart {group.id}")

    async def _replace(self, group: Group) -> None:
        async with group.lock:
            if group.leaving or group.pid or self.ending or group.id not in self.groups:
                return
            try:
                await self.restart(group, await self._reason(group))
            except Exception as error:
                _log.exception("worker %s", group.id)
                self.fail(group, f"worker cannot be replaced: {error}")

    async def _reason(self, group: Group) -> str:
        if group.forked:  # the zygote's word comes just behind the end, unless it has ended too
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
        """A new worker with the group's devices; after too many deaths they are failed instead. died:
        False where none has ended just now.
        """
        loop = asyncio.get_running_loop()
        while True:
            for former in (group, group.after):  # it lives and does not answer
                if former is not None and former.pidfd >= 0 and not await former.leave(flush=False):
                    self.fail(group, _unended(former))
                    return
            group.after = None
            if group.link:
                await group.link.close()
                group.link = None
            for minor in group.minors:  # clients of a hand-over that did not come about
                self.store.drop(self.store.passing(minor))
            now = loop.time()
            if died:
                group.deaths.append(now)
            while group.deaths and group.deaths[0] < now - DEATHS_WITHIN:
                group.deaths.popleft()
            if len(group.deaths) > self._deaths:
                self.fail(group, f"{reason}, {len(group.deaths)} times within {DEATHS_WITHIN:g} s")
                return
            if len(group.deaths) > 1:
                await asyncio.sleep(min(_FIRST_PAUSE * 2 ** min(len(group.deaths) - 2, 16), _LONGEST_PAUSE))
            entries = self.registry.lower_first(group.minors)
            if not entries or self.ending:
                return
            for entry in entries:
                entry.event += 1
                entry.restarts += 1
            try:
                await self.start(group)
                await self.hold(group, [entry.state() for entry in entries], opener=opener)
            except (OSError, ValueError) as error:
                again = (
                    "died while it came up" if isinstance(error, WorkerGone) else f"could not take it up again: {error}"
                )
                reason = f"its worker {again}"
                died = isinstance(error, WorkerGone) or not group.pid
                await group.leave(flush=False)
                if died:
                    continue
                self.fail(group, reason)
                return
            _log.warning("%s: %s; started again", ", ".join(entry.name for entry in entries), reason)
            for entry in entries:
                entry.failed = ""
                states.save(self.run_dir, entry)
                self.changed(entry)
            return

    def fail(self, group: Group, reason: str) -> None:
        """Its devices stay, without a worker, and say why. Their sockets go: a client shall be refused,
        not wait.
        """
        for minor in group.minors:
            entry = self.registry.get(minor)
            if entry is None:
                continue
            entry.failed = reason
            self.registry.lost_clients(entry)
            entry.event += 1
            _log.error("device %r has failed: %s", entry.name, reason)
            for export in entry.exports:
                self.store.drop([Label(device=minor, load=0, role="listen", key=export.id)])
                if export.unix:
                    self._unlink(export.unix)
            states.save(self.run_dir, entry)
            self.changed(entry)

    def _unlink(self, path: str) -> None:
        try:
            os.unlink(path)
        except FileNotFoundError:
            return
        except OSError as error:
            _log.error("%s cannot be removed: %s", path, error)

    # hand-over

    async def merge(self, groups: Sequence[Group]) -> Group:
        """One group of several, whose locks are held: all go to the largest. Clients notice nothing."""
        target = max(groups, key=lambda group: len(group.minors))
        for group in groups:
            if group is not target:
                await self._move(group, target)
        return target

    async def _move(self, group: Group, target: Group) -> None:
        await self._hand_over(group, target)
        await self.end(group, flush=False)

    async def _hand_over(self, group: Group, target: Group) -> None:
        """The target's worker serves what the group's did, which has nothing left. Raises what went wrong; the
        group's goes on then.
        """
        frozen = await self._freeze(group)
        try:
            self._check_whole(frozen)
            await self.hold(target, frozen)
        except BaseException as error:
            answered = isinstance(error, OSError | ValueError) and not isinstance(error, WorkerStuck | WorkerGone)
            if not answered:  # it may take them up yet, and nobody may be served by two
                target.kill()
                if not await target.wait_for_end(self._recovery):
                    self.give_up(group, target)
                    raise
            await group.call(m.Thaw())
            raise
        self._belong(group, target)

    def give_up(self, group: Group, other: Group) -> None:
        """A frozen group, whose devices may be in the worker of another one that was killed and does not end."""
        group.after, group.leaving = other, True
        group.kill()
        self.fail(group, _unended(other))

    def _check_whole(self, frozen: Sequence[DeviceState]) -> None:
        """Raises ResourceError where a client's socket has not come, for want of free descriptors here."""
        for state in frozen:
            sockets = sum(label.role == "connection" for label in self.store.passing(state.minor))
            if sockets < len(state.connections):
                what = f"of {len(state.connections)} clients of device {state.name!r} {sockets} could be taken over"
                raise ResourceError(what, cure=open_files.advice(), errno=errno.EMFILE)

    def _belong(self, former: Group, group: Group) -> None:
        """What `former` had is the group's from now on."""
        minors, former.minors = former.minors, set()
        group.minors |= minors
        for minor in minors:
            if entry := self.registry.get(minor):
                entry.group = group
                states.save(self.run_dir, entry)
                self.changed(entry)

    async def _freeze(self, group: Group) -> list[DeviceState]:
        try:
            result = await group.call(m.Freeze(timeout=FREEZE_SECONDS), wait=3 * FREEZE_SECONDS)
        except WorkerStuck:
            group.kill()  # it may freeze yet, and nobody would thaw it
            raise
        frozen = msgspec.convert(result["devices"], list[DeviceState])
        order = {entry.minor: at for at, entry in enumerate(self.registry.lower_first(group.minors))}
        return sorted(frozen, key=lambda state: order[state.minor])

    async def replace(self, group: Group) -> None:
        """A new worker takes everything over from the group's; clients notice nothing. Raises what went
        wrong; the old one goes on then.
        """
        new = self.new_group()
        new.targets = group.targets
        async with new.lock:
            await self.start(new)
            try:
                await self._hand_over(group, new)
            except BaseException:
                await self.end(new, flush=False)
                raise
        await self.end(group, flush=False)

    async def check_reachable(self) -> None:
        """Raises ResourceError, which names the devices, where a worker takes no connection of a supervisor: the
        program after this one could not take it up.
        """
        at_once = asyncio.Semaphore(_ASKED_AT_ONCE)

        async def ask(group: Group) -> str:
            async with at_once:
                why = await self._unreachable(group)
            names = ", ".join(entry.name for entry in self.registry.lower_first(group.minors))
            return f"{names} (process {group.pid}): {why}" if why else ""

        asked = [group for group in self.groups.values() if group.minors and group.link is not None]
        if unreachable := [line for line in await asyncio.gather(*map(ask, asked)) if line]:
            what = f"nothing was upgraded, for the workers of these devices could not be: {'; '.join(unreachable)}"
            raise ResourceError(what, cure="disconnect some of their clients, or see the log", errno=errno.EBUSY)

    async def _unreachable(self, group: Group) -> str:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        channel = AsyncChannel(connected, m.FromWorker)
        try:
            async with asyncio.timeout(DESCRIBE_SECONDS):
                await asyncio.get_running_loop().sock_connect(connected, str(self.run_dir.worker(group.id)))
                await channel.receive()  # its greeting
        except TimeoutError:
            return f"it accepts no connection within {DESCRIBE_SECONDS:g} s, perhaps for want of descriptors"
        except OSError as error:
            return f"it cannot be connected to: {error.strerror or error}"
        finally:
            await channel.close()
        return ""

    # coming back

    async def adopt(self, identifier: str, connected: socket.socket, pid: int) -> tuple[Group, dict[str, Any]]:
        """A worker that a former supervisor left: its group, and what it describes. Raises ResourceError."""
        group = self.new_group(identifier)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            connected.close()
            del self.groups[identifier]
            raise ResourceError(f"worker {identifier} has ended: {error.strerror}", errno=error.errno) from error
        await self._attach(group, pid, pidfd, connected)
        async with asyncio.timeout(DESCRIBE_SECONDS):
            return group, dict(await group.call(m.Describe()))

    def look_after(self, group: Group) -> None:
        """Of a group that was given its devices just now: its worker may have ended before."""
        if not group.pid and group.minors:
            self._died(group)

    async def rest(self) -> None:
        """Lets go of everything: workers serve on until another supervisor comes."""
        self.resting = True
        self._look_no_more()
        for group in self.groups.values():
            if group.link:
                await group.link.close()
        await self._forker.close()

    def _look_no_more(self) -> None:
        for task in (self._looking, *self._awaited):
            if task is not None:
                task.cancel()

    async def close(self) -> None:
        """Ends the zygote, and workers that are left: all devices have gone."""
        self.resting = True
        self._look_no_more()
        for group in list(self.groups.values()):
            if group.restarting:
                group.restarting.cancel()
                await asyncio.gather(group.restarting, return_exceptions=True)
            await self.end(group)
        await self._forker.close()


def _unended(group: Group) -> str:
    return (
        f"its former worker, process {group.pid}, was killed and has not ended: storage holds it, and it may write yet"
    )
