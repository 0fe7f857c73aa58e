"""A block device of the kernel's NBD client as a node: for root. Its worker serves it, without a network.

A device that was disconnected keeps its directory in sysfs, so the tag of its server tells whether it is there.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar

from blkloom.attach.block_export import BlockExportWay
from blkloom.errors import AttachError
from blkloom.export.kernel_nbd.driver import check, tag_of
from blkloom.export.kernel_nbd.state import KernelNbdDetails

if TYPE_CHECKING:
    from blkloom.attach.way import NodeSpec
    from blkloom.control.rundir import RunDir
    from blkloom.control.states import ExportState, NodeState


class NbdWay(BlockExportWay):
    """See `way.Way`. `NodeState.details`: number and tag."""

    name: ClassVar[str] = "nbd"
    summary: ClassVar[str] = "a block device of the kernel's NBD client"
    export: ClassVar[str] = "kernel-nbd"

    def lacks(self) -> str:
        """Root, and the driver."""
        if os.geteuid() != 0:
            return "only root may use the kernel's NBD client"
        try:
            check()
        except AttachError as error:
            return f"{error.what} ({error.cure})"
        return ""

    async def attach(self, run_dir: RunDir, node: NodeState, export: ExportState, spec: NodeSpec) -> None:
        """The block device is there already. Raises AttachError."""
        details = KernelNbdDetails.of(export)
        node.details = {"number": details.number, "tag": details.tag}
        await super().attach(run_dir, node, export, spec)

    def is_there(self, node: NodeState) -> bool:
        """Until it was disconnected and its last user has closed it."""
        return bool(node.details) and tag_of(node.details["number"]) == node.details["tag"]
