"""Freezing of the file systems on nodes while their devices are suspended. On the event loop."""

from __future__ import annotations

import asyncio
import errno
import logging
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

from blkloom.attach.process import in_process
from blkloom.control.states import NodeState
from blkloom.errors import AttachError, BlkloomError
from blkloom.printing import described
from blkloom.supervisor.devices import Devices
from blkloom.supervisor.registry import Entry

_log = logging.getLogger(__name__)

_WRITE_BACK_SECONDS: Final = 20.0
"""How long mounted file systems may take to write dirty data when the supervisor stops."""


class Freezer:
    """Freezes, thaws and writes back the file systems that are mounted from nodes."""

    def __init__(
        self,
        devices: Devices,
        alone: Callable[[Entry], AbstractAsyncContextManager[None]],
        block_devices: Callable[[Entry], Awaitable[list[str]]],
    ) -> None:
        """alone: locks the node of a device. block_devices: those of its node that file systems can be on."""
        self._devices = devices
        self._alone = alone
        self._block_devices = block_devices
        self._frozen: set[int] = set()
        """Devices whose file systems this supervisor has frozen."""
        self._late: set[asyncio.Task[None]] = set()
        self._freezing: dict[int, asyncio.Task[Any]] = {}
        """Running freezes, by minor number of the device."""

    @asynccontextmanager
    async def frozen(self, entries: Sequence[Entry], *, seconds: float) -> AsyncIterator[None]:
        """Freezes the file systems that are mounted from the nodes of `entries`, until `thaw`. Thaws them if the block
        raises. entries: upper devices before lower ones. Raises AttachError.
        """
        frozen: list[Entry] = []
        try:
            for entry in entries:
                if await self._freeze(entry, seconds=seconds):
                    frozen.append(entry)
            yield
        except BaseException:
            for entry in reversed(frozen):
                await self.thaw(entry)
            raise

    async def _freeze(self, entry: Entry, *, seconds: float) -> bool:
        """Freezes the file systems on one node; returns False if there are none to freeze."""
        if entry.node is None or entry.suspended or entry.suspended_for is not None:
            return False
        async with self._alone(entry):
            node, devices = entry.node, await self._block_devices(entry)
            if node is None or not devices or node.frozen:
                return False
            node.frozen = True
            self._frozen.add(entry.minor)
            self._devices.save(entry)  # a successor of this supervisor thaws them
            try:
                frozen = await self._in_process(entry, node, devices, seconds)
            except BaseException:
                node.frozen = False
                self._frozen.discard(entry.minor)
                raise
            finally:
                self._devices.save(entry)
            _log.info("device '%s': frozen: %s", entry.name, ", ".join(frozen) or "nothing")
            return True

    async def _in_process(self, entry: Entry, node: NodeState, devices: Sequence[str], seconds: float) -> list[str]:
        """Raises AttachError: ETIMEDOUT, or ECANCELED after `cancel`."""
        freeze = in_process("freeze", seconds=seconds, late=self._thaw_late(entry), devices=devices, link=node.link)
        task = self._freezing[entry.minor] = asyncio.create_task(freeze, name=f"freeze {entry.name}")
        entry.waiting = f"waits for the file systems on {node.link}, which write their data before they are frozen"
        try:
            await asyncio.wait({task})
        finally:
            del self._freezing[entry.minor]
            entry.waiting = ""
            task.cancel()
        if task.cancelled():
            what = "the freeze of its file systems was cancelled, the device is not suspended"
            raise AttachError(what, path=node.link, errno=errno.ECANCELED)
        try:
            return list(task.result())
        except AttachError as error:
            if error.errno != errno.ETIMEDOUT:
                raise
            what = f"the file systems on it are not frozen after {seconds:g} s: they write their data first"
            cure = "wait longer with --timeout, or suspend with --nolockfs"
            raise AttachError(what, path=node.link, errno=errno.ETIMEDOUT, cure=cure) from error

    def cancel(self, entries: Iterable[Entry]) -> None:
        """Makes suspends fail that wait for the file systems on the nodes of these devices."""
        for entry in entries:
            if (task := self._freezing.get(entry.minor)) is not None:
                task.cancel()

    def _thaw_late(self, entry: Entry) -> Callable[[Process], None]:
        """Returns a callback that thaws after a freeze that was cancelled or too slow, because it may still succeed."""

        async def thaw(process: Process) -> None:
            await process.wait()
            if (node := entry.node) is not None and not node.frozen:
                await in_process("thaw", devices=await self._block_devices(entry), link=node.link)

        def begin(process: Process) -> None:
            task = asyncio.create_task(thaw(process), name=f"thaw {entry.name}")
            self._late.add(task)
            task.add_done_callback(self._late.discard)

        return begin

    async def thaw(self, entry: Entry) -> None:
        """Thaws file systems frozen by `frozen`, after a resume or a failed suspend. Raises AttachError."""
        if entry.node is None or not entry.node.frozen or entry.suspended or entry.suspended_for is not None:
            return
        async with self._alone(entry):
            if (node := entry.node) is not None and node.frozen:
                await self.thaw_alone(entry, node)

    async def thaw_alone(self, entry: Entry, node: NodeState) -> None:
        """The caller changes the node alone. Raises AttachError."""
        await in_process("thaw", devices=await self._block_devices(entry), link=node.link)
        node.frozen = False
        self._frozen.discard(entry.minor)
        self._devices.save(entry)

    async def write_back(self, entry: Entry, link: str) -> None:
        """Writes the dirty data of mounted file systems before their node is removed by force. Logs errors."""
        try:
            devices = await self._block_devices(entry)
            await in_process("write_back", seconds=_WRITE_BACK_SECONDS, devices=devices, link=link)
        except (BlkloomError, OSError) as error:
            _log.error("device '%s': mounted, and not all of it was written: %s", entry.name, described(error))

    def is_left_frozen(self, entry: Entry) -> bool:
        """Whether a supervisor was killed between freeze and suspend, or between resume and thaw."""
        stopped = entry.suspended or entry.suspended_for is not None or entry.failed
        return entry.node is not None and entry.node.frozen and not stopped and entry.minor not in self._frozen

    def forget(self, entry: Entry) -> None:
        """The device has no node any more."""
        self._frozen.discard(entry.minor)
