"""Snapshots in tables: which devices share an origin, and which of them no file can bring back. Pure, but for
`check_store`.

What a device writes to an origin is copied to the snapshots that are there. So snapshots come before the devices that
write to their origin, and these are not made without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from blkloom.errors import UsageError
from blkloom.table import Table
from blkloom.targets.device_ref import DeviceRef
from blkloom.targets.snapshot import Snapshot
from blkloom.targets.snapshot_merge import SnapshotMerge
from blkloom.targets.snapshot_origin import SnapshotOrigin
from blkloom.targets.snapshot_spec import SnapshotSpec

_MEMORY = "ram"


class Use(NamedTuple):
    """The use of an origin. origin: the name of the device. writes: whether by a device that writes to it; otherwise by
    a snapshot.
    """

    origin: str
    writes: bool


def use_of(table: Table, device_folder: str) -> Use | None:
    """How a table uses an origin that is a device of blkloom; None: it does not."""
    for segment in table.segments:
        target = segment.target
        if isinstance(target, SnapshotOrigin | SnapshotSpec):
            name = target.origin.device_name(device_folder)
            return None if name is None else Use(name, not isinstance(target, Snapshot))
    return None


def snapshots_first(tables: Mapping[str, Table], device_folder: str) -> dict[str, set[str]]:
    """For each device that writes to an origin: the snapshots of that origin."""
    uses = {name: use_of(table, device_folder) for name, table in tables.items()}
    return {
        name: {other for other, used in uses.items() if used is not None and used == Use(use.origin, writes=False)}
        for name, use in uses.items()
        if use is not None and use.writes
    }


def has_memory(table: Table) -> bool:
    """Whether the device is memory, which is empty after a reboot."""
    return any(segment.target.name == _MEMORY for segment in table.segments)


def check_store(name: str, table: Table, lower: Callable[[str], Table], device_folder: str) -> None:
    """Raises UsageError if a part of the snapshot `name`, or of its merge, is only in memory. lower: the table of a
    device.
    """

    def is_memory(ref: DeviceRef) -> bool:
        found = ref.device_name(device_folder)
        if found is None:
            return False
        below = lower(found)
        refs = (one for segment in below.segments for one in segment.target.device_refs())
        return has_memory(below) or any(map(is_memory, refs))

    for segment in table.segments:
        target = segment.target
        if not isinstance(target, SnapshotSpec):
            continue
        merges = isinstance(target, SnapshotMerge)
        what = f"what is merged into device '{name}'" if merges else f"the snapshot '{name}'"
        if target.kind == "N":
            cure = "give it the kind P, in a new file"
            raise UsageError(f"the snapshot '{name}' has the kind N: its exceptions are only in memory", cure=cure)
        if is_memory(target.cow):
            cure = f"wait for it: blkloom snapshot {name} --merge" if merges else "take snapshots with --file"
            raise UsageError(f"{what} is only in memory: {target.cow.path}", cure=cure)
        if is_memory(target.origin):
            what = f"the origin of {what} is only in memory: {target.origin.path}"
            raise UsageError(what, cure="copy what it contains: blkloom save keeps no memory")


def store_of(table: Table, device_folder: str) -> str:
    """The name of the device that is the store of a snapshot or of its merge; "": none."""
    for segment in table.segments:
        if isinstance(segment.target, SnapshotSpec):
            return segment.target.cow.device_name(device_folder) or ""
    return ""
