"""blkloom: virtual block devices out of file segments, RAM and images, described by dmsetup's tables.

    import blkloom

    with blkloom.open("disk.img") as device:
        sector = device.pread(512, 0)

The public API: what a program, the author of a target and a test need. docs/python.md and
docs/writing-a-target.md describe it. A name is imported from its module when it is first used: reading
tables or printing help does not load the engine. Names that are not in `__all__` may change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from blkloom.version import VERSION as __version__

if TYPE_CHECKING:
    from blkloom import entries
    from blkloom._engine import (
        BackendQueue,
        BadBlockFilter,
        ClusterTable,
        DelayFilter,
        Engine,
        ErrorFilter,
        Export,
        Extent,
        File,
        FlakeyFilter,
        Region,
        SwitchFilter,
        Tee,
        ThrottleFilter,
    )
    from blkloom.async_device import AsyncDevice
    from blkloom.control.client import Client
    from blkloom.control.faults import Fault
    from blkloom.control.messages import DeviceKey, Selector
    from blkloom.control.states import DeviceInfo, ExportState, OpenedFile
    from blkloom.device.device import Device
    from blkloom.device.open_device import open
    from blkloom.device.raw_io import RawDevice
    from blkloom.errors import (
        BackingError,
        BlkloomError,
        BusyError,
        DeviceBusy,
        DeviceExists,
        DeviceFailed,
        DrainError,
        FaultError,
        ForkedError,
        ListenError,
        LostData,
        MountError,
        NoSuchDevice,
        NoSupervisor,
        PathError,
        Place,
        ResourceError,
        RetryLater,
        TableError,
        UnknownTarget,
        UsageError,
        WorkerGone,
        WorkerStuck,
    )
    from blkloom.export.nbd.access import AccessRules
    from blkloom.export.nbd.server import NbdServer, ServerLimits
    from blkloom.export.nbd.session import NbdExport
    from blkloom.export.nbd.tls import TlsSettings
    from blkloom.stats import Stats
    from blkloom.table import Segment, Table, format_table, parse_table, syntax
    from blkloom.table.arguments import Arguments
    from blkloom.targets.backend import Backend
    from blkloom.targets.coroutines import in_thread
    from blkloom.targets.limits import BlockLimits
    from blkloom.targets.live_segment import LiveSegment
    from blkloom.targets.load_context import LoadContext
    from blkloom.targets.loaded import DATA, HOLE, RETRY, ZERO, Answer, LoadedTarget, Mapped, Retry
    from blkloom.targets.lower import LowerBackend
    from blkloom.targets.registry import all_targets, builtin_targets
    from blkloom.targets.spec import TargetSpec
    from blkloom.units import SECTOR, Bytes, Sectors, format_size, parse_size, to_bytes, to_sectors

__all__ = [
    "DATA",
    "HOLE",
    "RETRY",
    "SECTOR",
    "ZERO",
    "AccessRules",
    "Answer",
    "Arguments",
    "AsyncDevice",
    "Backend",
    "BackendQueue",
    "BackingError",
    "BadBlockFilter",
    "BlkloomError",
    "BlockLimits",
    "BusyError",
    "Bytes",
    "Client",
    "ClusterTable",
    "DelayFilter",
    "Device",
    "DeviceBusy",
    "DeviceExists",
    "DeviceFailed",
    "DeviceInfo",
    "DeviceKey",
    "DrainError",
    "Engine",
    "ErrorFilter",
    "Export",
    "ExportState",
    "Extent",
    "Fault",
    "FaultError",
    "File",
    "FlakeyFilter",
    "ForkedError",
    "ListenError",
    "LiveSegment",
    "LoadContext",
    "LoadedTarget",
    "LostData",
    "LowerBackend",
    "Mapped",
    "MountError",
    "NbdExport",
    "NbdServer",
    "NoSuchDevice",
    "NoSupervisor",
    "OpenedFile",
    "PathError",
    "Place",
    "RawDevice",
    "Region",
    "ResourceError",
    "Retry",
    "RetryLater",
    "Sectors",
    "Segment",
    "Selector",
    "ServerLimits",
    "Stats",
    "SwitchFilter",
    "Table",
    "TableError",
    "TargetSpec",
    "Tee",
    "ThrottleFilter",
    "TlsSettings",
    "UnknownTarget",
    "UsageError",
    "WorkerGone",
    "WorkerStuck",
    "__version__",
    "all_targets",
    "builtin_targets",
    "entries",
    "format_size",
    "format_table",
    "in_thread",
    "open",
    "parse_size",
    "parse_table",
    "syntax",
    "to_bytes",
    "to_sectors",
]

_HOMES: Final = {
    "blkloom.entries": ("entries",),  # a module
    "blkloom._engine": (
        "BackendQueue",
        "BadBlockFilter",
        "ClusterTable",
        "DelayFilter",
        "Engine",
        "ErrorFilter",
        "Export",
        "Extent",
        "File",
        "FlakeyFilter",
        "Region",
        "SwitchFilter",
        "Tee",
        "ThrottleFilter",
    ),
    "blkloom.control.client": ("Client",),
    "blkloom.control.faults": ("Fault",),
    "blkloom.control.messages": (
        "DeviceKey",
        "Selector",
    ),
    "blkloom.control.states": (
        "DeviceInfo",
        "ExportState",
        "OpenedFile",
    ),
    "blkloom.async_device": ("AsyncDevice",),
    "blkloom.device.device": ("Device",),
    "blkloom.device.open_device": ("open",),
    "blkloom.device.raw_io": ("RawDevice",),
    "blkloom.errors": (
        "BackingError",
        "BlkloomError",
        "BusyError",
        "DeviceBusy",
        "DeviceExists",
        "DeviceFailed",
        "DrainError",
        "FaultError",
        "ForkedError",
        "RetryLater",
        "ListenError",
        "LostData",
        "MountError",
        "NoSuchDevice",
        "NoSupervisor",
        "PathError",
        "Place",
        "ResourceError",
        "TableError",
        "UnknownTarget",
        "UsageError",
        "WorkerGone",
        "WorkerStuck",
    ),
    "blkloom.export.nbd.access": ("AccessRules",),
    "blkloom.export.nbd.server": (
        "NbdServer",
        "ServerLimits",
    ),
    "blkloom.export.nbd.session": ("NbdExport",),
    "blkloom.export.nbd.tls": ("TlsSettings",),
    "blkloom.stats": ("Stats",),
    "blkloom.table": (
        "Segment",
        "Table",
        "format_table",
        "parse_table",
    ),
    "blkloom.table.syntax": ("syntax",),  # a module
    "blkloom.table.arguments": ("Arguments",),
    "blkloom.targets.backend": ("Backend",),
    "blkloom.targets.lower": ("LowerBackend",),
    "blkloom.targets.loaded": (
        "DATA",
        "HOLE",
        "RETRY",
        "ZERO",
        "Answer",
        "LoadedTarget",
        "Mapped",
        "Retry",
    ),
    "blkloom.targets.spec": ("TargetSpec",),
    "blkloom.targets.coroutines": ("in_thread",),
    "blkloom.targets.limits": ("BlockLimits",),
    "blkloom.targets.live_segment": ("LiveSegment",),
    "blkloom.targets.load_context": ("LoadContext",),
    "blkloom.targets.registry": (
        "all_targets",
        "builtin_targets",
    ),
    "blkloom.units": (
        "SECTOR",
        "Bytes",
        "Sectors",
        "format_size",
        "parse_size",
        "to_bytes",
        "to_sectors",
    ),
}
"""The names of each module. The imports above tell a type checker the same."""
_HOME_OF: Final = {name: home for home, names in _HOMES.items() for name in names}


def __dir__() -> list[str]:
    return list(__all__)


if not TYPE_CHECKING:  # a type checker is to complain of names that are not there

    def __getattr__(name: str) -> object:
        if name not in _HOME_OF:
            raise AttributeError(f"module 'blkloom' has no attribute '{name}'")
        home = _HOME_OF[name]
        module = __import__(home, fromlist=(name,))
        value = module if home.rpartition(".")[2] == name else getattr(module, name)
        globals()[name] = value
        return value
