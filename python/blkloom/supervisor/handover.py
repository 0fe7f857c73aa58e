"""Hand-over of devices from one worker to another: merges groups, and replaces workers in an upgrade.

The old worker freezes its devices; the new one gets their states and all stored descriptors. Clients do not notice. If
the new worker fails, the old one continues. Exports that cannot be handed over are closed before and opened again
after. The worker's side is in `worker/handover.py`. The caller of a method that takes a group holds its lock. Runs on
the event loop.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import msgspec

from blkloom import open_files
from blkloom.control import messages as m
from blkloom.control.replies import Frozen
from blkloom.control.states import DeviceState, ExportState
from blkloom.errors import MountError, ResourceError, WorkerGone, WorkerStuck
from blkloom.supervisor import exporting, states
from blkloom.supervisor.group import Group
from blkloom.supervisor.registry import Entry
from blkloom.supervisor.workers import Workers

_log = logging.getLogger(__name__)

FREEZE_SECONDS: Final = 30.0
"""Seconds for each step of freezing a worker."""

Change: TypeAlias = Callable[[Sequence[DeviceState]], list[DeviceState]]
"""From the states of frozen devices to those that the next worker gets, lower ones first."""


class HandOver:
    """Hands devices over between `workers`."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    async def merge(self, groups: Sequence[Group]) -> Group:
        """Merges groups whose locks the caller holds: all devices move to the largest. Clients do not notice."""
        target = max(groups, key=lambda group: len(group.minors))
        for group in groups:
            if group is not target:
                await self._move(group, target)
        return target

    async def _move(self, group: Group, target: Group) -> None:
        await self._hand_over(group, target)
        await self._workers.end(group, flush=False)

    async def _hand_over(
        self, group: Group, target: Group, change: Change = list, then: Callable[[], None] = lambda: None
    ) -> None:
        """Hands all devices of the group's worker over to the target's worker. If this fails, raises the error, and the
        group's worker continues. change, then: see `replace`.
        """
        closed: list[tuple[Entry, ExportState]] = []
        for worker in (group, target):
            await worker.check_running()
        try:
            await self._close_unmovable(group, closed)
            await self._pass_on(group, target, change, then)
        finally:
            for entry, export in closed:
                await self._open_again(entry, export)

    async def _close_unmovable(self, group: Group, closed: list[tuple[Entry, ExportState]]) -> None:
        """Closes the exports that no other worker can go on with, and adds them to `closed`. Raises MountError (EBUSY)
        where one is in use.
        """
        for entry, export in exporting.unmovable(self._workers.registry.lower_first(group.minors)):
            try:
                await exporting.close_unused(export, force=False)
            except MountError as error:
                if error.errno != errno.EBUSY:
                    raise
                what = f"{error.what}, and no other worker can go on with it (io_uring)"
                raise MountError(what, path=error.path, errno=errno.EBUSY, cure="close it first") from error
            closed.append((entry, export))
            self._workers.store.drop(exporting.labels(self._workers.store, entry, export))
            await group.call(m.Unserve(minor=entry.minor, id=export.id))

    async def _open_again(self, entry: Entry, export: ExportState) -> None:
        if exporting.labels(self._workers.store, entry, export) or entry.failed:  # its worker was restarted meanwhile
            return
        try:
            opened = await exporting.open_endpoint(self._workers.store, entry, export, allow_remote=True)
            await entry.group.call(m.Serve(minor=entry.minor, export=export, keys=tuple(opened)), *opened.values())
        except (OSError, ValueError) as error:
            _log.error("%s is not exported any more: %s", export.address, error)
            entry.exports.remove(export)
            await exporting.remove(export)
            self._workers.store.drop(exporting.labels(self._workers.store, entry, export))
        states.save(self._workers.run_dir, entry)

    async def _pass_on(self, group: Group, target: Group, change: Change, then: Callable[[], None]) -> None:
        frozen = await self._freeze(group)
        try:
            self._check_whole(frozen)
            await self._workers.hold(target, change(frozen))
        except BaseException as error:
            answered = isinstance(error, OSError | ValueError) and not isinstance(error, WorkerStuck | WorkerGone)
            if not answered:  # it may still take the clients: only one worker may serve a client
                target.kill()
                if not await target.wait_for_end(self._workers.restarts.recovery):
                    self._workers.give_up(group, target)
                    raise
            await group.call(m.Thaw())
            raise
        then()
        self._belong(group, target)

    def _check_whole(self, frozen: Sequence[DeviceState]) -> None:
        """Raises ResourceError if the socket of a client was lost because this process had no free descriptor."""
        for state in frozen:
            sockets = sum(label.role == "connection" for label in self._workers.store.passing(state.minor))
            if sockets < len(state.connections):
                what = f"of {len(state.connections)} clients of device '{state.name}' {sockets} could be taken over"
                raise ResourceError(what, cure=open_files.advice(), errno=errno.EMFILE)

    def _belong(self, former: Group, group: Group) -> None:
        """Moves all devices of `former` to the group."""
        minors, former.minors = former.minors, set()
        group.minors |= minors
        for minor in minors:
            if entry := self._workers.registry.get(minor):
                entry.group = group
                states.save(self._workers.run_dir, entry)
                self._workers.changed(entry)

    async def _freeze(self, group: Group) -> list[DeviceState]:
        try:
            reply = await group.call(m.Freeze(timeout=FREEZE_SECONDS), wait=3 * FREEZE_SECONDS)
        except WorkerStuck:
            group.kill()  # it may freeze later, and would then stay frozen
            raise
        frozen = msgspec.convert(reply, Frozen).devices
        order = {entry.minor: at for at, entry in enumerate(self._workers.registry.lower_first(group.minors))}
        return sorted(frozen, key=lambda state: order[state.minor])

    async def replace(self, group: Group, *, change: Change = list, then: Callable[[], None] = lambda: None) -> None:
        """Replaces the worker of a group by a new one. Clients do not notice. If this fails, raises the error, and the
        old worker continues. change: of the states that the new worker gets. then: called as soon as it has them.
        """
        new = self._workers.new_group()
        new.targets = group.targets
        async with new.lock:
            await self._workers.start(new)
            try:
                await self._hand_over(group, new, change, then)
            except BaseException:
                await self._workers.end(new, flush=False)
                raise
        await self._workers.end(group, flush=False)
