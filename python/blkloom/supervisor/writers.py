"""The rule of one writer: while a device is attached for writing as a block device, its other exports are read-only.

A disk and its partition devices count as one: a write to one of them changes the other. Runs on the event loop.
"""

from __future__ import annotations

from collections.abc import Iterable

from blkloom.control.states import ExportState, NodeState
from blkloom.errors import DeviceBusy
from blkloom.export.registry import DEFAULT
from blkloom.supervisor.devices import Devices
from blkloom.supervisor.export_verbs import ExportVerbs
from blkloom.supervisor.registry import Entry, Registry


class Writers:
    """Keeps the rule for the devices of a registry."""

    def __init__(self, registry: Registry, devices: Devices, exports: ExportVerbs) -> None:
        self._registry = registry
        self._devices = devices
        self._exports = exports

    async def restrict(self, entry: Entry, node: NodeState) -> None:
        """Makes other exports read-only, because `entry` is being attached. Raises DeviceBusy if one of them is used
        for writing, or a disk or partition is attached.
        """
        cure = "end that first, or attach with --shared if you know better"
        async with self._devices.held(entry, *self._registry.same_data(entry)):
            family = [entry, *self._registry.same_data(entry)]
            for other in family[1:]:
                if other.node is not None and other.node.exclusive:
                    what = f"device '{other.name}', which has the same data, is attached at {other.node.path}"
                    raise DeviceBusy(what, cure=f"blkloom detach {other.name}, or attach with --shared")
            others = [
                (device, export)
                for device in family
                for export in device.exports
                if not export.read_only and not (device is entry and export.id == node.export)
            ]
            for device, export in others:
                if not (export.automatic and export.kind == DEFAULT):
                    what = f"device '{device.name}' is exported for writing at {export.address}"
                    cure = f"blkloom unexport {device.name} {export.id}, or attach with --shared"
                    raise DeviceBusy(what, cure=cure)
            for device in family:
                if clients := device.connections:  # the kernel does not hold the node's file open yet
                    raise DeviceBusy(f"device '{device.name}' has {clients} clients, which may write to it", cure=cure)
            for device, export in others:
                self._note(entry, node, device, export)
            node.exclusive = True
            self._save([entry])  # the next supervisor lifts it if this one is killed meanwhile
            for device, export in others:
                await self._exports.restrict(device, export, read_only=True)
            self._save([entry, *(device for device, _ in others)])

    def begin(self, entry: Entry, below: list[Entry]) -> None:
        """Makes the exports of a new partition device read-only if its disk is attached. below: the devices of its
        table. Call it before a worker serves the device.
        """
        if not entry.is_partition or len(below) != 1:
            return
        whole = below[0]
        if whole.node is not None and whole.node.exclusive:
            for export in entry.exports:
                export.read_only = True
                self._note(whole, whole.node, entry, export)
            self._save([whole])

    def _note(self, entry: Entry, node: NodeState, device: Entry, export: ExportState) -> None:
        if device is entry:
            node.restricted.append(export.id)
        else:
            node.restricted_others.append((device.minor, export.id))

    async def lift(self, entry: Entry, node: NodeState) -> None:
        """Ends `restrict`. An export stays read-only while another node needs that."""
        async with self._devices.held(entry, *self._registry.same_data(entry)):
            await self._lift(entry, node)

    async def lift_others(self, entry: Entry, node: NodeState) -> None:
        """Ends `restrict` for the other devices, because `entry` is being removed. The caller holds the lock."""
        node.restricted = []
        await self._lift(entry, node)

    async def _lift(self, entry: Entry, node: NodeState) -> None:
        changed = [entry]
        restricted = [(entry.minor, export) for export in node.restricted] + node.restricted_others
        for minor, id in restricted:
            device = self._registry.get(minor)  # also a disk that `entry` is not a part of any more
            exports = [] if device is None else device.exports
            for export in [one for one in exports if one.id == id and one.automatic and one.read_only]:
                assert device is not None
                changed.append(device)
                if (other := self._other_claim(entry, device)) is not None and other.node is not None:
                    self._note(other, other.node, device, export)
                else:
                    await self._exports.restrict(device, export, read_only=False)
        node.exclusive, node.restricted, node.restricted_others = False, [], []
        self._save(changed)

    def _other_claim(self, entry: Entry, device: Entry) -> Entry | None:
        """Another device than `entry` whose node needs the exports of `device` to be read-only."""
        for other in [device, *self._registry.same_data(device)]:
            if other is not entry and other.node is not None and other.node.exclusive:
                return other
        return None

    def _save(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._devices.save(entry)
