"""blkloom: virtual block devices out of file segments, RAM and images, described by dmsetup's tables.

    import blkloom

    with blkloom.open("disk.img") as device:
        sector = device.pread(512, 0)

The names here are imported when first used: reading tables or printing help does not load the
engine. Everything else is found in its module; see docs/python.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from blkloom._engine import Engine, Export
    from blkloom.device.async_device import AsyncDevice
    from blkloom.device.device import Device
    from blkloom.device.open_device import open
    from blkloom.device.raw_io import RawDevice
    from blkloom.errors import (
        BackingError,
        BlkloomError,
        BusyError,
        FaultError,
        LostData,
        ResourceError,
        TableError,
        UnknownTarget,
        UsageError,
    )
    from blkloom.stats import Stats
    from blkloom.table import Segment, Table
    from blkloom.target.base import RETRY, Target

__all__ = [
    "RETRY",
    "AsyncDevice",
    "BackingError",
    "BlkloomError",
    "BusyError",
    "Device",
    "Engine",
    "Export",
    "FaultError",
    "LaterError",
    "LostData",
    "RawDevice",
    "ResourceError",
    "Segment",
    "Stats",
    "Table",
    "TableError",
    "Target",
    "UnknownTarget",
    "UsageError",
    "open",
]

_HOMES: Final = {
    "blkloom._engine": ("Engine", "Export"),
    "blkloom.device.async_device": ("AsyncDevice",),
    "blkloom.device.device": ("Device",),
    "blkloom.device.open_device": ("open",),
    "blkloom.device.raw_io": ("RawDevice",),
    "blkloom.errors": (
        "BackingError",
        "BlkloomError",
        "BusyError",
        "FaultError",
        "LaterError",
        "LostData",
        "ResourceError",
        "TableError",
        "UnknownTarget",
        "UsageError",
    ),
    "blkloom.stats": ("Stats",),
    "blkloom.table": ("Segment", "Table"),
    "blkloom.target.base": ("RETRY", "Target"),
}
_HOME_OF: Final = {name: home for home, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # a type checker is to complain of names that are not there

    def __getattr__(name: str) -> object:
        if name not in _HOME_OF:
            raise AttributeError(f"module 'blkloom' has no attribute {name!r}")
        value = getattr(import_module(_HOME_OF[name]), name)
        globals()[name] = value
        return value
