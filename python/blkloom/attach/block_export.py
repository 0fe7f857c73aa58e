"""Base of the ways to attach whose node is the block device that the export itself makes."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from blkloom.attach.loop_device import logical_block_size
from blkloom.attach.process import in_process
from blkloom.attach.users import holders_of_block_device, users_of_block_device
from blkloom.errors import AttachError, DeviceBusy

if TYPE_CHECKING:
    from blkloom.attach.way import NodeSpec
    from blkloom.control.rundir import RunDir
    from blkloom.control.states import ExportState, NodeState

_log = logging.getLogger(__name__)

_BUSY_SECONDS: Final = 3.0
"""How long a detach waits for udev, which opens new and changed devices for a moment."""
_PAUSE: Final = 0.02


class BlockExportWay:
    """The methods of `way.Way` that are the same for all of them."""

    is_block_device: ClassVar[bool] = True
    holds_open: ClassVar[bool] = False

    def path_of_export(self, run_dir: RunDir) -> str:
        """The driver chooses it."""
        return ""

    async def attach(self, run_dir: RunDir, node: NodeState, export: ExportState, spec: NodeSpec) -> None:
        """The block device is there already. It gets no I/O scheduler, as loop devices do not: Linux gives one to a
        device with a single queue, and requests would reach the driver through a thread of the kernel. Raises
        AttachError.
        """
        node.path = export.path
        if (schedulers := _schedulers(node.path)).exists() and "[none]" not in schedulers.read_text("ascii"):
            try:
                await in_process("use_no_scheduler", file=node.path)
            except AttachError as error:
                _log.warning("%s is slower, because it keeps an I/O scheduler: %s", node.path, error)
        if spec.read_only and not export.read_only:  # because of the table
            await in_process("set_read_only", file=node.path, read_only=True)

    async def detach(self, run_dir: RunDir, node: NodeState, *, lazy: bool) -> None:
        """The block device goes with the export. Raises DeviceBusy."""
        deadline = asyncio.get_running_loop().time() + _BUSY_SECONDS
        while not lazy and (users := await asyncio.to_thread(users_of_block_device, node.path, node.link)):
            if asyncio.get_running_loop().time() >= deadline or any("udev" not in user for user in users):
                cure = "end that first, or use --lazy or --force"
                raise DeviceBusy(f"{node.path} is in use: {', '.join(users)}", cure=cure)
            await asyncio.sleep(_PAUSE)

    def uses_export(self, node: NodeState, export: ExportState) -> bool:
        """The driver may have chosen another number when the device was made again."""
        return node.path == export.path

    def renamed(self, run_dir: RunDir, node: NodeState, name: str) -> None:
        """The block device keeps its path."""

    def block_devices(self, node: NodeState, export: ExportState) -> list[str]:
        """The block device."""
        return [node.path]

    def users(self, node: NodeState, export: ExportState) -> list[str]:
        """Mounts, devices on it, processes."""
        return users_of_block_device(node.path, node.link)

    def holders(self, node: NodeState) -> list[str]:
        """Mounts, and devices on it."""
        return holders_of_block_device(node.path, node.link)

    async def refresh(self, node: NodeState, export: ExportState, *, read_only: bool, block_size: int) -> None:
        """BLKROSET; the worker has told the driver the size. Raises AttachError if the block size has changed: the
        driver takes that only when a block device is started.
        """
        if (now := logical_block_size(node.path)) != block_size:
            what = f"the node keeps its blocks of {now} bytes, and the device has blocks of {block_size}"
            cure = "blkloom detach, then attach again"
            raise AttachError(what, path=node.path, errno=errno.EINVAL, cure=cure)
        await in_process("set_read_only", file=node.path, read_only=read_only)

    async def reap(self, run_dir: RunDir, nodes: Collection[NodeState]) -> list[str]:
        """The exports' `reap` does it."""
        return []


def use_no_scheduler(file: str) -> None:
    """Waits for the requests in flight. Raises OSError."""
    _schedulers(file).write_text("none")


def _schedulers(file: str) -> Path:
    """All of a block device, with the chosen one in brackets. Source: Linux Documentation/block/switching-sched.rst."""
    return Path("/sys/block", os.path.basename(file), "queue/scheduler")
