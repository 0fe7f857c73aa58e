"""Nodes of devices in the supervisor: attach, detach, refresh, recovery after a crash, reap.

One task at a time changes the node of a device (`_alone`). It does not hold the lock of a device group while a way
works: the way may wait for the device's worker, which must be replaced if it dies meanwhile. On the event loop.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, nullcontext
from typing import Any, Final, NamedTuple

import msgspec

from blkloom.attach import registry as ways
from blkloom.attach.kernel_partitions import kernel_partitions
from blkloom.attach.links import make_link, remove_link, stale_links
from blkloom.attach.permissions import (
    reap_properties,
    remove_properties,
    restore_permissions,
    set_permissions,
    write_properties,
)
from blkloom.attach.process import in_process
from blkloom.attach.way import NodeSpec, Way
from blkloom.control import messages as m
from blkloom.control.replies import Attached
from blkloom.control.rundir import RunDir
from blkloom.control.states import ExportState, NodeOptions, NodeState
from blkloom.errors import AttachError, BlkloomError, DeviceBusy, DeviceExists, MountError, NoSuchDevice, UsageError
from blkloom.export.registry import endpoints
from blkloom.printing import described
from blkloom.supervisor.auto_detach import AutoDetach
from blkloom.supervisor.devices import Devices
from blkloom.supervisor.export_verbs import ExportVerbs
from blkloom.supervisor.freezer import Freezer
from blkloom.supervisor.registry import Entry, Registry
from blkloom.supervisor.workers import Workers
from blkloom.supervisor.writers import Writers

_log = logging.getLogger(__name__)

_CLOSE_SECONDS: Final = 20.0
"""How long the kernel may take to close the file of a node that was detached."""
_CLOSE_SECONDS_LOCKED: Final = 3.0
"""The same, if the worker cannot be replaced meanwhile."""
_SETTLE_SECONDS: Final = 5.0
"""How long changes of nodes may go on when the supervisor stops."""
_PAUSE: Final = 0.02
_LOOK_SECONDS: Final = 1.0
"""Between looks at the users of a node that is detached lazily."""


class _Shape(NamedTuple):
    """What a node takes over from the live table. size, block_size: in bytes."""

    size: int
    block_size: int
    read_only: bool


class Nodes:
    """The nodes of the devices of a registry."""

    def __init__(
        self,
        run_dir: RunDir,
        registry: Registry,
        workers: Workers,
        devices: Devices,
        exports: ExportVerbs,
        writers: Writers,
    ) -> None:
        self._run_dir = run_dir
        self._registry = registry
        self._workers = workers
        self._devices = devices
        self._exports = exports
        self._writers = writers
        self._locks: dict[int, asyncio.Lock] = {}
        self._shown: dict[int, _Shape] = {}
        """The shape of a device that its node has now."""
        self._settling: dict[int, asyncio.Task[None]] = {}
        self.freezer = Freezer(devices, self._alone, self._block_devices)
        self._auto_detach = AutoDetach(registry, devices, self._detach_unused)

    # verbs

    async def attach(self, call: m.Attach) -> Attached:
        """Adds the export, then makes the node over it."""
        entry = self._devices.live(call.device)
        way, passed_over = await asyncio.to_thread(ways.choose, call.via, block_device=call.block_device)
        async with self._alone(entry):
            if (there := entry.node) is not None:
                raise DeviceExists(
                    f"device '{entry.name}' is attached already, at {there.path or there.link}",
                    cure=f"use that, or first: blkloom detach {entry.name}",
                )
            if entry.active is None:
                what = f"device '{entry.name}' has no table, and a node needs a size"
                raise UsageError(what, cure=f"blkloom load {entry.name}, then resume; --addnodeonresume attaches then")
            if way.is_block_device and (entry.suspended or entry.suspended_for is not None):
                what = f"device '{entry.name}' is suspended, and the kernel flushes what it attaches"
                raise UsageError(what, cure=f"blkloom resume {entry.name}")
            if call.scan is not None:
                entry.node_options = msgspec.structs.replace(entry.node_options, scan=call.scan)
            if call.partitions and not entry.node_options.scan:
                raise UsageError("--partscan is a scan of the node", cure="leave --no-scan out")
            entry.node_options = msgspec.structs.replace(entry.node_options, at_resume=False)
            export, own = await self._export_for(entry, way, call)
            node = NodeState(
                via=way.name,
                export=export.id,
                link=str(self._run_dir.link(entry.name)),
                read_only=call.read_only or export.read_only,
                partitions=call.partitions and way.is_block_device,
                own_export=own,
                holds_open=way.holds_open,
            )
            entry.node = node
            self._devices.save(entry)
            try:
                if way.is_block_device and not (node.read_only or call.shared):  # a later table may be writable
                    await self._writers.restrict(entry, node)
                await self._make(entry, way, node, export)
            except BaseException:
                await asyncio.shield(self._give_up(entry))
                raise
            survives = endpoints(export.kind).survives(export)
            return Attached(node=node, survives=survives, passed_over=passed_over)

    async def _export_for(self, entry: Entry, way: Way, call: m.Attach) -> tuple[ExportState, bool]:
        """The export that serves the node, and whether it was added for it."""
        path = way.path_of_export(self._run_dir)
        for export in entry.exports:
            if not path and not call.options and export.automatic and export.kind == way.export:
                if export.read_only != call.read_only:
                    how = "read-only" if export.read_only else "for writing"
                    what = f"{export.address} is exported {how} already"
                    raise UsageError(what, cure=f"first: blkloom unexport {entry.name} {export.id}")
                return export, False
        key = entry.key
        options = {**({} if way.is_block_device else _file_options(entry.node_options)), **call.options}
        add = m.AddExport(device=key, kind=way.export, path=path, read_only=call.read_only, options=options)
        return await self._exports.add(add, of_node=True), True

    async def _make(self, entry: Entry, way: Way, node: NodeState, export: ExportState) -> None:
        spec = NodeSpec(
            name=entry.name, block_size=entry.block_size, read_only=node.read_only, partitions=node.partitions
        )
        shown = self._shape(entry)
        if way.is_block_device:
            write_properties(self._run_dir, node.link, entry.node_options)
        await way.attach(self._run_dir, node, export, spec)
        if shown.read_only and not node.read_only:  # only as long as this table is live
            await way.refresh(node, export, read_only=True, block_size=shown.block_size)
        if self._registry.get(entry.minor) is not entry:
            await way.detach(self._run_dir, node, lazy=True)
            raise NoSuchDevice(f"Device {entry.name} not found: it was removed meanwhile")
        self._shown[entry.minor] = shown
        node.link = str(self._run_dir.link(entry.name))  # it may have been renamed
        if way.is_block_device:
            set_permissions(node, entry.node_options, [node.path])
        make_link(node.link, node.path)
        if node.partitions:
            await self._add_partitions(entry, node)
        self._devices.save(entry)
        self._workers.changed(entry)
        self._auto_detach.watch(entry)

    async def _add_partitions(self, entry: Entry, node: NodeState) -> None:
        """Adds the partitions that the kernel has not found by itself. Logs errors: the node is of use without them."""
        try:
            for warning in await self._update_partitions(entry, node):
                _log.warning("device '%s': %s", entry.name, warning)
        except (BlkloomError, OSError) as error:
            _log.error("device '%s': its partitions: %s", entry.name, described(error))

    async def _update_partitions(self, entry: Entry, node: NodeState) -> list[str]:
        block = entry.block_size
        found = await in_process("update_partitions", file=node.path, block_size=block, link=node.link)
        nodes = [partition.path for partition in kernel_partitions(node.path).values()]
        set_permissions(node, entry.node_options, [node.path, *nodes])
        return msgspec.convert(found, list[str])

    async def scan_partitions(self, call: m.ScanPartitions) -> list[str]:
        """Updates the kernel's partitions of a node. Returns warnings. Raises UsageError, DeviceBusy, AttachError."""
        entry = self._devices.live(call.device)
        async with self._alone(entry):
            node = entry.node
            if node is None or not node.path or not ways.way(node.via).is_block_device:
                what = f"device '{entry.name}' is not attached as a block device"
                raise UsageError(what, cure="without one, `blkloom partitions --add` makes devices of the partitions")
            if entry.suspended or entry.suspended_for is not None:
                what = f"device '{entry.name}' is suspended: its partition table cannot be read"
                raise UsageError(what, cure=f"blkloom resume {entry.name}")
            if call.remove:
                await in_process("remove_partitions", file=node.path, link=node.link)
                warnings = []
            else:
                warnings = await self._update_partitions(entry, node)
            node.partitions = not call.remove
            self._devices.save(entry)
            return warnings

    async def _give_up(self, entry: Entry) -> None:
        """Cleans up after a failed attach. Logs errors."""
        try:
            await self._take_down(entry, force=True)
        except (BlkloomError, OSError) as error:
            _log.error("device '%s': what is left of its node cannot be removed: %s", entry.name, described(error))

    async def detach(self, call: m.Detach) -> None:
        """Removes the node, then its export."""
        entry = self._registry.find(call.device)
        if call.force:
            self.freezer.cancel([entry])
        async with self._alone(entry):
            if entry.node is None:
                raise UsageError(f"device '{entry.name}' is not attached", errno=errno.EINVAL)
            await self._take_down(entry, lazy=call.lazy, force=call.force)

    async def _detach_unused(self, entry: Entry, node: NodeState) -> None:
        async with self._alone(entry):
            if entry.node is node:
                await self._take_down(entry)

    async def leave(self, entry: Entry, *, lazy: bool = False) -> None:
        """Detaches the device, if it is attached, before it is removed. Raises DeviceBusy."""
        if entry.node is not None:
            async with self._alone(entry):
                if entry.node is not None:
                    await self._take_down(entry, lazy=lazy)

    async def drop(self, entry: Entry, *, force: bool) -> None:
        """Removes the node of a device that ends. The caller holds the lock of its group and removes its exports.
        Raises DeviceBusy unless `force` is set; with `force`, users of the node get I/O errors.
        """
        if entry.node is None:
            return
        export = self._export(entry)
        if export is not None and entry.node.path:
            way = ways.way(entry.node.via)
            if force and not (entry.failed or entry.group.is_stopped()) and way.holders(entry.node):
                await self.freezer.write_back(entry, entry.node.link)
            await way.detach(self._run_dir, entry.node, lazy=force)
            if entry.node.holds_open:
                await self._end_export(entry, entry.node, export, force=force, locked=True)
        await self._writers.lift_others(entry, entry.node)
        self._forget(entry)

    async def refresh(self, entry: Entry) -> None:
        """Updates size, block size and read-only flag of the node after a resume. Raises AttachError, DeviceBusy."""
        if entry.node is None or self._shown.get(entry.minor) == self._shape(entry):
            return
        async with self._alone(entry):
            node, export = entry.node, self._export(entry)
            if node is None or export is None or not node.path or node.lazy:
                return
            shape = self._shape(entry)
            await ways.way(node.via).refresh(node, export, read_only=shape.read_only, block_size=shape.block_size)
            self._shown[entry.minor] = shape
            if node.fixed_size not in (0, shape.size):
                what = f"keeps its {node.fixed_size} bytes, the device has {shape.size}: this kernel cannot change them"
                cure = "detach it and attach it again, with --via loop for later changes (ublk: Linux 6.16)"
                raise AttachError(what, path=node.path, errno=errno.EOPNOTSUPP, cure=cure)

    async def _block_devices(self, entry: Entry) -> list[str]:
        node, export = entry.node, self._export(entry)
        if node is None or export is None or not node.path:
            return []
        return await asyncio.to_thread(ways.way(node.via).block_devices, node, export)

    def _shape(self, entry: Entry) -> _Shape:
        read_only = entry.active is not None and entry.active.read_only
        return _Shape(entry.size, entry.block_size, read_only or (entry.node is not None and entry.node.read_only))

    def renamed(self, entry: Entry) -> None:
        """Renames the links of the node after the device was renamed. Raises AttachError, OSError."""
        if (node := entry.node) is None or not node.path:
            return
        remove_link(node.link, node.path)
        remove_properties(self._run_dir, node.link)
        node.link = str(self._run_dir.link(entry.name))
        write_properties(self._run_dir, node.link, entry.node_options)
        ways.way(node.via).renamed(self._run_dir, node, entry.name)
        make_link(node.link, node.path)

    # in step with what happens elsewhere

    def look_at(self, entry: Entry) -> None:
        """Checks the node after a change of the device: finishes a lazy detach, forgets a node that a user detached,
        makes a node again whose file was lost, removes exports of nodes that do not exist. Does not block.
        """
        if entry.making or entry.minor in self._settling:
            return
        lock = self._locks.get(entry.minor)
        if lock is not None and lock.locked():  # the task that changes the node checks it afterwards
            return
        if self._is_due(entry):
            task = asyncio.create_task(self._settle(entry), name=f"node of {entry.name}")
            self._settling[entry.minor] = task
            task.add_done_callback(lambda _done: self._settling.pop(entry.minor, None))

    def _is_due(self, entry: Entry) -> bool:
        node, export = entry.node, self._export(entry)
        if self._exports_without_node(entry):
            return True
        if node is None:
            return False
        if export is None or not node.path:
            return True
        if self.freezer.is_left_frozen(entry):
            return True
        way = ways.way(node.via)
        if not way.is_there(node) or (node.lazy and not entry.connections):
            return True
        return not (node.lazy or entry.failed or way.uses_export(node, export))

    def _exports_without_node(self, entry: Entry) -> list[ExportState]:
        """Exports that a supervisor added for a node, before it was killed."""
        used = "" if entry.node is None else entry.node.export
        return [export for export in entry.exports if export.of_node and export.id != used]

    async def _settle(self, entry: Entry) -> None:
        await self._workers.complete.wait()
        try:
            while True:
                try:
                    async with self._alone(entry):
                        return await self._settle_alone(entry)
                except DeviceBusy:
                    if entry.node is None or not entry.node.lazy:
                        raise
                # A ublk device: the kernel does not tell when its last user has left.
                await asyncio.sleep(_LOOK_SECONDS)
        except NoSuchDevice:
            pass
        except (BlkloomError, OSError) as error:
            _log.error("device '%s': its node cannot be looked after: %s", entry.name, described(error))

    async def _settle_alone(self, entry: Entry) -> None:
        """The caller is alone. Raises DeviceBusy where it is still in use."""
        if not self._is_due(entry):
            return
        for left in self._exports_without_node(entry):
            async with self._devices.held(entry):
                await self._exports.end(entry, left, force=True)
        node, export = entry.node, self._export(entry)
        if node is None:
            return
        if self.freezer.is_left_frozen(entry):
            await self.freezer.thaw_alone(entry, node)
            return
        if export is None or not node.path or node.lazy or not ways.way(node.via).is_there(node):
            if node.path and not node.lazy:
                _log.warning("device '%s': %s was detached", entry.name, node.path)
            await self._take_down(entry)
        else:
            await self._make_again(entry, node, export)

    async def _make_again(self, entry: Entry, node: NodeState, export: ExportState) -> None:
        """Makes a new node under the same stable name, because the file of the former one was lost."""
        way = ways.way(node.via)
        former = node.path
        await way.detach(self._run_dir, node, lazy=True)
        restore_permissions(node)
        node.path = ""
        self._devices.save(entry)
        try:
            await self._make(entry, way, node, export)
        except BaseException:
            await asyncio.shield(self._give_up(entry))
            raise
        _log.warning("device '%s': %s has lost its device, %s is the new node", entry.name, former, node.path)

    def recover(self, entries: Iterable[Entry]) -> None:
        """Restores the links of the devices of a former supervisor, and checks their nodes."""
        for entry in entries:
            try:
                self.make_links([entry])
            except (BlkloomError, OSError) as error:
                _log.error("device '%s': %s", entry.name, described(error))
            self.look_at(entry)
            self._auto_detach.watch(entry)

    def correct_links(self, device: m.DeviceKey) -> None:
        """Makes missing or wrong stable names, and removes those of devices that are not attached: of one device, or of
        all ("" as device). A name without a device has no stable name either. Raises UsageError, AttachError, OSError.
        """
        try:
            entries = [self._registry.find(device)] if device else list(self._registry)
        except NoSuchDevice:
            entries = []
        self.make_links(entries)
        names = [entry.name for entry in entries] or ([device] if isinstance(device, str) else [])
        mine = [str(self._run_dir.link(name)) for name in names]
        nodes = [other.node for other in self._registry if other.node is not None]
        for path in list(stale_links(self._run_dir, {node.link for node in nodes if not node.lazy})):
            if not device or path in mine:
                os.unlink(path)

    def make_links(self, entries: Iterable[Entry]) -> None:
        """Makes missing or wrong stable names of nodes. Raises AttachError, OSError."""
        for entry in entries:
            if (node := entry.node) is not None and node.path and not node.lazy:
                make_link(node.link, node.path)

    async def reap(self) -> list[str]:
        """Removes nodes, records and links that belong to no device; a line for each. Raises AttachError, OSError."""
        nodes = self._all()
        removed: list[str] = []
        for name in ways.names():
            removed += await ways.way(name).reap(self._run_dir, nodes)
        for path in list(stale_links(self._run_dir, {node.link for node in nodes})):
            os.unlink(path)
            removed.append(f"link {path}")
        reap_properties(self._run_dir, [node.link for node in nodes])
        return removed

    def _all(self) -> list[NodeState]:
        return [entry.node for entry in self._registry if entry.node is not None]

    async def stop_settling(self) -> None:
        """Ends the tasks that look after nodes: all devices are removed."""
        if tasks := list(self._settling.values()):
            _, late = await asyncio.wait(tasks, timeout=_SETTLE_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def settled(self) -> None:
        """Waits until no node is being changed."""
        for lock in list(self._locks.values()):
            async with lock:
                pass

    async def check_unused(self) -> None:
        """Raises DeviceBusy if nodes are in use; it names them and their users."""
        used = [f"'{entry.name}' ({', '.join(by)})" for entry in self._registry if (by := await self.users(entry))]
        if used:
            raise DeviceBusy(
                f"attached and in use: {', '.join(used)}", cure="unmount first, or cut all users off with --force"
            )

    async def users(self, entry: Entry) -> list[str]:
        """The users of the node of a device, as text."""
        node, export = entry.node, self._export(entry)
        if node is None or export is None or not node.path:
            return []
        return await asyncio.to_thread(ways.way(node.via).users, node, export)

    # shared

    async def _take_down(self, entry: Entry, *, lazy: bool = False, force: bool = False) -> None:
        """Removes node and export; the caller has entered `_alone`. Raises DeviceBusy, WorkerStuck; then the node
        stays.
        """
        node, export = entry.node, self._export(entry)
        if node is None:
            return
        if not (lazy or force or entry.failed):
            await entry.group.check_running()  # or only half of it could be removed
        way = ways.way(node.via)
        stuck = False
        try:
            if node.path:
                await way.detach(self._run_dir, node, lazy=lazy or force)
        except AttachError as error:
            if not force or isinstance(error, DeviceBusy) or error.errno != errno.ETIMEDOUT:
                raise
            stuck = True  # it waits for I/O, which fails with the export
        if lazy and not force and node.path and node.holds_open and way.is_there(node):
            self._linger(entry, node)
            return
        begun = not node.path
        if node.own_export and export is not None:
            try:
                await self._end_export(entry, node, export, force=force or begun)
            except (AttachError, MountError) as error:
                if error.errno != errno.EBUSY:
                    raise
                if not lazy:
                    raise DeviceBusy(f"{error.path}: {error.what}", cure=error.cure) from error
                self._linger(entry, node)
                return
        if stuck:
            await way.detach(self._run_dir, node, lazy=True)
        if node.exclusive:
            await self._writers.lift(entry, node)
        self._forget(entry)
        self._devices.save(entry)
        self._workers.changed(entry)
        if begun:  # its process was perhaps killed before it could say what it had made
            for line in await way.reap(self._run_dir, self._all()):
                _log.warning("device '%s': removed: %s", entry.name, line)

    def _linger(self, entry: Entry, node: NodeState) -> None:
        """Marks the node for removal after its last use, and removes its stable name."""
        node.lazy = True
        remove_link(node.link, node.path)
        self._devices.save(entry)
        self._workers.changed(entry)

    async def _end_export(
        self, entry: Entry, node: NodeState, export: ExportState, *, force: bool, locked: bool = False
    ) -> None:
        """Removes the export of a node. Raises MountError or AttachError (EBUSY) if it is in use. Retries after a
        detach, because the kernel closes the file of the node a little later, without an event. It may need the worker
        for that, so the lock of the group is free in between: the worker may have to be replaced. locked: the caller
        holds the lock.
        """
        closing = bool(node.path) and node.holds_open and not force
        seconds = _CLOSE_SECONDS_LOCKED if locked else _CLOSE_SECONDS
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            try:
                async with nullcontext() if locked else self._devices.held(entry):
                    if export in entry.exports:
                        await self._exports.end(entry, export, force=force)
                    return
            except (AttachError, MountError) as error:
                late = asyncio.get_running_loop().time() >= deadline
                if error.errno != errno.EBUSY or not closing or late:
                    raise
            await asyncio.sleep(_PAUSE)

    def _forget(self, entry: Entry) -> None:
        if entry.node is not None:
            try:
                remove_link(entry.node.link, entry.node.path)
                restore_permissions(entry.node)
                remove_properties(self._run_dir, entry.node.link)
            except OSError as error:
                _log.error("%s cannot be removed: %s", entry.node.link, error)
        entry.node = None
        self._shown.pop(entry.minor, None)
        self.freezer.forget(entry)

    def _export(self, entry: Entry) -> ExportState | None:
        if entry.node is None:
            return None
        return next((export for export in entry.exports if export.id == entry.node.export), None)

    @asynccontextmanager
    async def _alone(self, entry: Entry) -> AsyncIterator[None]:
        """Locks the node of a device, and checks the node afterwards: it may have changed meanwhile, and what was begun
        may have failed in the middle. Raises NoSuchDevice if the device was removed meanwhile.
        """
        try:
            async with self._locks.setdefault(entry.minor, asyncio.Lock()):
                self._devices.check_there(entry)
                yield
        finally:
            self.look_at(entry)


def _file_options(options: NodeOptions) -> dict[str, Any]:
    """Options of a FUSE export (`FuseOptions`) whose file is the node. Other users cannot reach the run directory."""
    given = {"user": options.uid, "group": options.gid, "mode": options.mode}
    return {key: value for key, value in given.items() if value is not None}
