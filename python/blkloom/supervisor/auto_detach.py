"""Autoclear of nodes: detaches a block device after its last user has left; then its device is removed.

The kernel has LO_FLAGS_AUTOCLEAR for that, which counts each close. Here the close of a program that only looks at the
device does not count if a mount follows: mount(8) first reads the type of the file system and closes the device.
Mounts, swap and stacked devices count as use as soon as they are seen, other processes if they have the device open, or
have read from it or written to it. Where udev runs, reads do not count, because udev reads every new device.

Users of a node leave without an event, except for mounts. So each node is looked at when the mount table changes, and
every second. Runs on the event loop; looks run on threads.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from blkloom.attach import registry as ways
from blkloom.control.states import ExportState, NodeState
from blkloom.errors import BlkloomError, DeviceBusy
from blkloom.printing import described
from blkloom.supervisor.devices import Devices
from blkloom.supervisor.registry import Entry, Registry

_log = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 1.0
_AFTER_PROCESS_SECONDS: Final = 3.0
"""How long a device stays after the close of the last process: a mount may follow."""
_UDEV: Final = Path("/run/udev/control")
_READS, _WRITES, _DISCARDS = 0, 4, 11
"""Fields of /sys/block/*/stat. Source: Documentation/block/stat.rst."""


class _Use(NamedTuple):
    """What was seen of the users of a node. held: it is mounted, or another device or swap is on it. used: also if a
    process has it open. requests: number of requests that count as use.
    """

    held: bool
    used: bool
    requests: int


class AutoDetach:
    """Watches the nodes of autoclear devices. detach: detaches a device, if this is still its node; raises DeviceBusy
    if it is in use.
    """

    def __init__(
        self, registry: Registry, devices: Devices, detach: Callable[[Entry, NodeState], Awaitable[None]]
    ) -> None:
        self._registry = registry
        self._devices = devices
        self._detach = detach
        self._watches: dict[int, asyncio.Task[None]] = {}

    def watch(self, entry: Entry) -> None:
        """Begins to watch the node of the device, if the device has autoclear."""
        node = entry.node
        if not entry.autoclear or node is None or not node.path or not ways.way(node.via).is_block_device:
            return
        if (former := self._watches.pop(entry.minor, None)) is not None:
            former.cancel()
        requests = _requests(node)  # before the first user can come
        task = asyncio.create_task(self._watch(entry, node, requests), name=f"autoclear {entry.name}")
        self._watches[entry.minor] = task
        task.add_done_callback(lambda done: self._done(entry.minor, done))

    def _done(self, minor: int, task: asyncio.Task[None]) -> None:
        if self._watches.get(minor) is task:
            del self._watches[minor]

    async def _watch(self, entry: Entry, node: NodeState, requests: int) -> None:
        """Looks until the node is detached. requests: that it has had before its first user."""
        loop = asyncio.get_running_loop()
        mounts = _MountTable()
        try:
            last, held = loop.time(), False
            while entry.node is node and entry.autoclear:
                use = await self._look(entry, node)
                if use.used or use.requests != requests:
                    requests, last, held = use.requests, loop.time(), use.held
                    if not node.used:
                        node.used = True
                        self._devices.save(entry)
                over = node.used and not use.used and (held or loop.time() >= last + _AFTER_PROCESS_SECONDS)
                if over and not self._clients(entry) and await self._ended(entry, node):
                    return
                await mounts.changed(_LOOK_SECONDS)
        finally:
            mounts.close()

    def _clients(self, entry: Entry) -> int:
        return self._registry.family_count(self._registry.whole(entry))

    async def _ended(self, entry: Entry, node: NodeState) -> bool:
        try:
            entry.opened = True  # also if its only user was the node's, and no client of an export
            await self._detach(entry, node)
        except DeviceBusy:
            return False
        except (BlkloomError, OSError) as error:
            _log.error("device '%s': autoclear: %s", entry.name, described(error))
        return True

    async def _look(self, entry: Entry, node: NodeState) -> _Use:
        export = next((export for export in entry.exports if export.id == node.export), None)
        if export is None:
            return _Use(held=False, used=False, requests=0)
        return await asyncio.to_thread(_use_of, node, export)


def _use_of(node: NodeState, export: ExportState) -> _Use:
    users = [user for user in ways.way(node.via).users(node, export) if "udev" not in user]
    held = any(user.startswith(("mounted ", "swap ", "device ")) for user in users)
    return _Use(held, bool(users), _requests(node))


def _requests(node: NodeState) -> int:
    """Number of requests to the block device and its partitions that count as use. 0 if it has gone."""
    fields = (_WRITES, _DISCARDS) if _UDEV.exists() else (_READS, _WRITES, _DISCARDS)
    with suppress(OSError):
        counted = Path("/sys/block", os.path.basename(node.path), "stat").read_text().split()
        return sum(int(counted[field]) for field in fields if field < len(counted))
    return 0


class _MountTable:
    """Changes of the mount table of this mount namespace. Source: proc(5), mountinfo and poll."""

    def __init__(self) -> None:
        self._file = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._file, select.EPOLLPRI)
        self._changed = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._look)

    def _look(self) -> None:
        self._epoll.poll(0)
        self._changed.set()

    async def changed(self, seconds: float) -> None:
        """Waits for a change since the last call, for this time at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        self._changed.clear()

    def close(self) -> None:
        """Ends it."""
        asyncio.get_running_loop().remove_reader(self._epoll.fileno())
        self._epoll.close()
        os.close(self._file)
