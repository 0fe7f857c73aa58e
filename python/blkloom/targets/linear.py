"""`linear`: a part of one file, block device or blkloom device.

Source: Linux Documentation/admin-guide/device-mapper/linear.rst.
"""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from blkloom.table.syntax import Syntax
from blkloom.targets.device_ref import OnDevice, device_ref
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget
from blkloom.units import Bytes


class Linear(OnDevice):
    """A segment that maps to `device` from its offset on."""

    name: ClassVar[str] = "linear"
    raw: ClassVar[bool] = True
    arguments: ClassVar[Syntax] = (device_ref("device"),)
    summary: ClassVar[str] = "a piece of a file, block device or blkloom device (offset in sectors)"

    @override
    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        return LoadedTarget(self, [(Bytes(0), length, self.device.extent(context, length))])
