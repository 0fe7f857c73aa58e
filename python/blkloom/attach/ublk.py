"""A block device of the kernel's ublk driver as a node: for root. All of it is done by the export."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from blkloom.attach.block_export import BlockExportWay
from blkloom.errors import AttachError
from blkloom.export.ublk.driver import Driver, open_control
from blkloom.export.ublk.structures import Feature
from blkloom.units import SECTOR

if TYPE_CHECKING:
    from blkloom.attach.way import NodeSpec
    from blkloom.control.rundir import RunDir
    from blkloom.control.states import ExportState, NodeState


class UblkWay(BlockExportWay):
    """See `way.Way`."""

    name: ClassVar[str] = "ublk"
    summary: ClassVar[str] = "a block device of the kernel's ublk driver"
    export: ClassVar[str] = "ublk"

    def lacks(self) -> str:
        """Root, and the driver."""
        if os.geteuid() != 0:
            return "only root may use the ublk driver"
        try:
            os.close(open_control())
        except AttachError as error:
            return f"{error.what} ({error.cure})"
        return ""

    async def attach(self, run_dir: RunDir, node: NodeState, export: ExportState, spec: NodeSpec) -> None:
        """The block device is there already, without partitions. Raises AttachError."""
        await super().attach(run_dir, node, export, spec)
        if not await asyncio.to_thread(_can_grow):
            node.fixed_size = await asyncio.to_thread(_size_of, node)

    def is_there(self, node: NodeState) -> bool:
        """Until the driver has removed it."""
        return Path("/sys/block", os.path.basename(node.path)).exists()


def _can_grow() -> bool:
    control = open_control()
    try:
        return Feature.UPDATE_SIZE in Driver(control).features()
    finally:
        os.close(control)


def _size_of(node: NodeState) -> int:
    """Bytes."""
    return int(Path("/sys/block", os.path.basename(node.path), "size").read_text("ascii")) * SECTOR
