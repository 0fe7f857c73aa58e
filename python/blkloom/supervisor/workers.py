"""The worker processes of a supervisor, in groups: starts them, gives them their devices, ends them.

`restarts.py` replaces workers that die, `handover.py` those that live. The caller of a method that takes a group holds
the lock of that group. Descriptors that a worker sends are in the store
before the answer to the call that sent them is handled. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import msgspec

from blkloom import open_files
from blkloom.control import messages as m
from blkloom.control.async_channel import AsyncChannel
from blkloom.control.descriptor_store import DescriptorStore
from blkloom.control.endpoint import Opener
from blkloom.control.replies import Description
from blkloom.control.rundir import RunDir
from blkloom.control.states import DeviceState, Label
from blkloom.errors import ResourceError, WorkerStuck
from blkloom.printing import described
from blkloom.supervisor import exporting, states
from blkloom.supervisor.forking import Forker
from blkloom.supervisor.group import Group
from blkloom.supervisor.link import Link
from blkloom.supervisor.registry import Entry, Registry
from blkloom.supervisor.restarts import Restarts
from blkloom.supervisor.zygote_process import ZygoteProcess

_log = logging.getLogger(__name__)

_ASKED_AT_ONCE: Final = 64
DESCRIBE_SECONDS: Final = 10.0
"""Seconds for a worker to describe itself to a new supervisor, whose start waits for this."""


class _Notifications:
    """Handles the notifications of one group's worker."""

    def __init__(self, group: Group, workers: Workers) -> None:
        self._group, self._workers = group, workers

    def keep(self, labels: Sequence[Label], fds: list[int]) -> None:
        """Stores the descriptors. The log says what is lost if the worker ends: this process had no free descriptor."""
        for label in self._workers.store.receive(labels, fds):
            what = f"{label.role} {label.key} of device {label.device}"
            _log.error("%s could not be stored and is lost if its worker ends: %s", what, open_files.advice())

    def drop(self, labels: Sequence[Label]) -> None:
        """Removes descriptors from the store, unless a replacement of this worker would need them: the worker may die
        before it answers the call that made it drop them.
        """
        self._workers.store.drop([label for label in labels if not self._workers.needed(label)])

    def device_changed(self, message: m.DeviceChanged) -> None:
        """Updates the entry."""
        if message.gone:
            self._workers.gone(message.minor, message.gone)
        entry = self._workers.registry.get(message.minor)
        if entry is not None and (entry.group is self._group or entry.minor in self._group.arriving):
            entry.connections = message.connections
            entry.opened |= message.opened
            entry.event = max(entry.event, message.event)
            entry.failed_syncs = message.failed_syncs
            if message.io_errors > entry.io_errors:
                entry.io_errors, entry.last_io_error = message.io_errors, message.last_io_error
            self._workers.changed(entry)

    async def sync_failed(self, message: m.SyncFailed) -> None:
        """Updates the entry and its state file. A worker of a former supervisor may send this before its devices have
        entries.
        """
        if self._workers.registry.get(message.minor) is None:
            await self._workers.complete.wait()
        if entry := self._workers.registry.get(message.minor):
            entry.failed_syncs = message.failed_syncs
            states.save(self._workers.run_dir, entry)
            self._workers.changed(entry)

    def gone(self) -> None:
        """The channel has closed: ends the worker, which is of no use without a channel."""
        if not self._group.leaving and not self._workers.resting:
            self._group.kill()


class Workers:
    """All groups of a supervisor, with their workers.

    changed: called when the clients, the event number or the state of an entry have changed. gone: called with the
    minor number of a device and the ids of exports that were unmounted, as its worker reports. deaths, recovery: see
    `Restarts`.
    """

    def __init__(
        self,
        run_dir: RunDir,
        registry: Registry,
        store: DescriptorStore,
        *,
        changed: Callable[[Entry], None],
        gone: Callable[[int, Sequence[str]], None],
        deaths: int,
        recovery: float,
        client_memory: int,
        zygote: ZygoteProcess | None = None,
    ) -> None:
        self.registry = registry
        self.store = store
        self.changed = changed
        self.gone = gone
        self.groups: dict[str, Group] = {}
        self.resting = False
        """The supervisor is ending, but its workers stay."""
        self.complete = asyncio.Event()
        """Set when all devices of a former supervisor are in the registry."""
        self.ending = False
        """The supervisor removes all devices: workers that die are not replaced."""
        self.hello = m.Hello(pid=os.getpid())
        self.run_dir = run_dir
        self.restarts = Restarts(self, deaths, recovery)
        self._forker = Forker(run_dir, self._exited, client_memory, zygote)

    # groups

    def new_group(self, identifier: str = "") -> Group:
        """Makes a group without a worker."""
        group = Group(identifier or os.urandom(6).hex())
        self.groups[group.id] = group
        return group

    async def start(self, group: Group) -> None:
        """Forks the worker of a group. Raises ResourceError."""
        pid, pidfd, connected = await self._forker.fork(group.id, group.targets)
        group.forked = True
        await self._attach(group, pid, pidfd, connected)

    async def _attach(self, group: Group, pid: int, pidfd: int, connected: socket.socket) -> None:
        group.pid, group.pidfd, group.leaving = pid, pidfd, False
        group.watch(self.restarts.died)
        self.restarts.begin()
        group.link = Link(group.id, AsyncChannel(connected, m.FromWorker), _Notifications(group, self))
        await group.link.greet(self.hello)

    async def hold(self, group: Group, states: Sequence[DeviceState], *, opener: Opener | None = None) -> None:
        """Sends the worker these devices with all their stored descriptors. Raises the errors of the worker."""
        stored = self.store.of(state.minor for state in states)
        group.arriving = {state.minor for state in states}
        try:
            for at in range(0, max(1, len(stored)), m.MOST_DESCRIPTORS):
                sent = stored[at : at + m.MOST_DESCRIPTORS]
                more = at + len(sent) < len(stored)
                call = m.Hold(devices=list(states), labels=[label for label, _ in sent], more=more)
                await group.call(call, *(fd for _, fd in sent), opener=opener)
        finally:
            group.arriving = set()
        for state in states:
            self.store.drop(self.store.passing(state.minor))

    async def end(self, group: Group, *, flush: bool = True) -> None:
        """Ends a group that has no devices left or is not needed."""
        group.leaving = True
        self.groups.pop(group.id, None)
        await group.leave(flush=flush)
        try:
            self._remove_socket(group)
        except OSError as error:
            _log.error("%s cannot be removed: %s", self.run_dir.worker(group.id), error)

    def _remove_socket(self, group: Group) -> None:
        """Removes the socket that a killed worker has left, or what it made before it gave it that name."""
        path = self.run_dir.worker(group.id)
        for left in path.parent.glob(f"{path.name}*"):
            left.unlink(missing_ok=True)

    @asynccontextmanager
    async def locked(self, *entries: Entry) -> AsyncIterator[None]:
        """Holds the locks of these devices' groups, even if the groups are merged meanwhile."""
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
        """Whether the load of this descriptor is in one of the slots of its device."""
        entry = self.registry.get(label.device)
        return entry is not None and label.load in entry.loads

    def _exited(self, worker: str, pid: int, status: int) -> None:
        if (group := self.groups.get(worker)) is not None and group.pid in (pid, 0):
            group.status = status
            group.status_told.set()

    # failure

    def fail(self, group: Group, reason: str) -> None:
        """Sets the devices of a group to FAILED, with the reason. They stay, without a worker. Their sockets are
        removed, so that clients are refused and do not wait.
        """
        for minor in group.minors:
            entry = self.registry.get(minor)
            if entry is None:
                continue
            entry.failed = reason
            self.registry.lost_clients(entry)
            entry.event += 1
            _log.error("device '%s' has failed: %s", entry.name, reason)
            for export in entry.exports:
                exporting.give_up(self.store, entry, export)
            states.save(self.run_dir, entry)
            self.changed(entry)

    def give_up(self, group: Group, other: Group) -> None:
        """Gives up a frozen group: another group's killed worker, which does not end, may also have its devices."""
        group.after, group.leaving = other, True
        group.kill()
        self.fail(group, other.unended)

    # upgrade

    async def check_reachable(self) -> None:
        """Raises ResourceError, which names the devices, if a worker accepts no connection: the supervisor after an
        upgrade could not take it over.
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
        try:
            await group.check_running()
        except WorkerStuck as error:
            return described(error)
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        channel = AsyncChannel(connected, m.FromWorker)
        try:
            async with asyncio.timeout(DESCRIBE_SECONDS):
                await asyncio.get_running_loop().sock_connect(connected, str(self.run_dir.worker(group.id)))
                await channel.receive()  # the greeting
        except TimeoutError:
            return f"it accepts no connection within {DESCRIBE_SECONDS:g} s, perhaps it has no free descriptors"
        except OSError as error:
            return f"it cannot be connected to: {error.strerror or error}"
        finally:
            await channel.close()
        return ""

    # workers of a former supervisor

    async def take_over(self, identifier: str, connected: socket.socket, pid: int) -> tuple[Group, Description]:
        """Connects to a worker of a former supervisor. Returns its group and its description. Raises ResourceError."""
        group = self.new_group(identifier)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            connected.close()
            del self.groups[identifier]
            raise ResourceError(f"worker {identifier} has ended: {error.strerror}", errno=error.errno) from error
        await self._attach(group, pid, pidfd, connected)
        async with asyncio.timeout(DESCRIBE_SECONDS):
            return group, msgspec.convert(await group.call(m.Describe()), Description)

    async def rest(self) -> None:
        """Disconnects from all workers; they continue to serve until another supervisor connects."""
        self.resting = True
        self.restarts.end()
        for group in self.groups.values():
            if group.link:
                await group.link.close()
        await self._forker.close()

    async def close(self) -> None:
        """Ends the zygote and the remaining workers, after all devices are removed."""
        self.resting = True
        self.restarts.end()
        for group in list(self.groups.values()):
            if group.restarting:
                group.restarting.cancel()
                await asyncio.gather(group.restarting, return_exceptions=True)
            await self.end(group)
        await self._forker.close()
