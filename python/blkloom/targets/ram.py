"""`ram`: memory, all zeros at first, gone when the device closes.

The memory is a memfd that is sealed against a change of its size: no access can hit a missing page (SIGBUS), and the
memfd can be passed to another process. Pages that were never written take no memory, and discarded pages are freed.
Source: the dm-ram patch of Mauelshagen (2018), which has no arguments and is the only line of its table. The options
are additions of blkloom.
"""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from blkloom._engine import Extent
from blkloom.table.syntax import Syntax, flag, options
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget
from blkloom.targets.spec import TargetSpec
from blkloom.units import Bytes


class Ram(TargetSpec):
    """A segment in memory. huge_pages: 2 MiB pages from the system's pool. preallocate: allocate all memory at load."""

    huge_pages: bool = False
    preallocate: bool = False

    name: ClassVar[str] = "ram"
    arguments: ClassVar[Syntax] = (options(flag("huge_pages"), flag("preallocate")),)
    summary: ClassVar[str] = "memory, zeros at first, gone when the device closes"
    singleton: ClassVar[bool] = True

    @override
    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        if context.read_only:
            return LoadedTarget(self, [(Bytes(0), length, Extent.zero())])  # a read-only device: its zeros never change
        region = context.region(length, huge_pages=self.huge_pages, preallocate=self.preallocate)
        return LoadedTarget(self, [(Bytes(0), length, Extent.memory(region, 0))])
