"""`zero`: reads as zeros, discards writes. The smallest target, and a template for others.

Source: Linux Documentation/admin-guide/device-mapper/zero.rst.
"""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from blkloom._engine import Extent
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget
from blkloom.targets.spec import TargetSpec
from blkloom.units import Bytes


class Zero(TargetSpec):
    """A segment of zeros. Writes are discarded."""

    name: ClassVar[str] = "zero"
    raw: ClassVar[bool] = True
    summary: ClassVar[str] = "reads as zeros, discards writes"

    @override
    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        return LoadedTarget(self, [(Bytes(0), length, Extent.zero(discard_writes=not context.read_only))])
