"""The node as a kernel loop device on a FUSE file. Needs root, and a kernel with both.

The FUSE file is mounted in the run directory, and only the loop device uses it. While no worker serves it, its requests
wait in the kernel, so a file system on the loop device continues afterwards. If the FUSE connection is lost (supervisor
and worker killed together), the file is mounted again and gets another loop device.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar

import msgspec

from blkloom.attach import loop_device
from blkloom.attach.fuse import lacks_fuse
from blkloom.attach.process import in_process
from blkloom.attach.records import records, remove_record, write_record
from blkloom.attach.users import holders_of_block_device, users_of_block_device
from blkloom.errors import AttachError
from blkloom.export.fuse.state import FuseDetails

if TYPE_CHECKING:
    from blkloom.attach.way import NodeSpec
    from blkloom.control.rundir import RunDir
    from blkloom.control.states import ExportState, NodeState


class _LoopDetails(msgspec.Struct, frozen=True):
    """`NodeState.details`. sequence: see `loop_device.LoopState`."""

    number: int
    sequence: int
    direct_io: bool = False


class LoopWay:
    """Implements `way.Way` for loop devices."""

    name: ClassVar[str] = "loop"
    summary: ClassVar[str] = "a kernel loop device on a FUSE file"
    export: ClassVar[str] = "fuse"
    is_block_device: ClassVar[bool] = True
    holds_open: ClassVar[bool] = True

    def lacks(self) -> str:
        """Checks for root, FUSE and loop devices."""
        if os.geteuid() != 0:
            return "only root may attach loop devices"
        if why := lacks_fuse():
            return why
        try:
            os.close(os.open(loop_device.CONTROL, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            cure = "modprobe loop" if error.errno == errno.ENOENT else "a container needs loop devices passed in"
            return f"{loop_device.CONTROL}: {error.strerror} ({cure})"
        return ""

    def path_of_export(self, run_dir: RunDir) -> str:
        """A random path. The loop device has the file open, so the file cannot be renamed with the device."""
        return str(run_dir.mounts / os.urandom(6).hex())

    async def attach(self, run_dir: RunDir, node: NodeState, export: ExportState, spec: NodeSpec) -> None:
        """Attaches a loop device (LOOP_CONFIGURE). Raises AttachError."""
        found = await in_process(
            "attach",
            file=FuseDetails.of(export).mounted,
            records=str(run_dir.kernel_nodes),
            name=run_dir.link(spec.name).name,
            read_only=spec.read_only,
            block_size=spec.block_size,
            partitions=spec.partitions,
            supervisor=os.getpid(),
        )
        details = msgspec.convert(found, _LoopDetails)
        node.path, node.details = loop_device.path_of(details.number), msgspec.to_builtins(details)

    async def detach(self, run_dir: RunDir, node: NodeState, *, lazy: bool) -> None:
        """Detaches the loop device (LOOP_CLR_FD). Raises DeviceBusy, AttachError."""
        if not node.path:
            return
        details = _of(node)
        if self.is_there(node):
            await in_process(
                "detach",
                number=details.number,
                sequence=details.sequence,
                lazy=lazy,
                link=node.link,
                records=str(run_dir.kernel_nodes),
            )
        elif loop_device.state_of(details.number) is None:
            remove_record(str(run_dir.kernel_nodes), f"loop{details.number}")

    def renamed(self, run_dir: RunDir, node: NodeState, name: str) -> None:
        """Updates the record; udev then renames the link. The loop device keeps its number."""
        details = _of(node)
        write_record(str(run_dir.kernel_nodes), f"loop{details.number}", run_dir.link(name).name, details.sequence)
        loop_device.announce(details.number)

    def is_there(self, node: NodeState) -> bool:
        """Whether the loop device is still attached, to any file."""
        found = loop_device.state_of(_of(node).number)
        return found is not None and found.sequence == _of(node).sequence

    def uses_export(self, node: NodeState, export: ExportState) -> bool:
        """Whether the backing file of the loop device is the present mount."""
        found = loop_device.state_of(_of(node).number)
        return found is not None and found == (FuseDetails.of(export).mounted, _of(node).sequence)

    def users(self, node: NodeState, export: ExportState) -> list[str]:
        """Mounts, stacked devices and processes that use the loop device."""
        return users_of_block_device(node.path, node.link)

    def block_devices(self, node: NodeState, export: ExportState) -> list[str]:
        """The loop device."""
        return [node.path]

    def holders(self, node: NodeState) -> list[str]:
        """Mounts and stacked devices."""
        return holders_of_block_device(node.path, node.link)

    async def refresh(self, node: NodeState, export: ExportState, *, read_only: bool, block_size: int) -> None:
        """Updates size, block size and read-only flag (LOOP_SET_CAPACITY, LOOP_SET_BLOCK_SIZE, BLKROSET). Raises
        DeviceBusy, AttachError.
        """
        await in_process(
            "refresh",
            number=_of(node).number,
            file=FuseDetails.of(export).mounted,
            read_only=read_only,
            block_size=block_size,
            link=node.link,
        )

    async def reap(self, run_dir: RunDir, nodes: Collection[NodeState]) -> list[str]:
        """Detaches loop devices that have a record but no node; one in use after its last close. Raises AttachError."""
        folder = str(run_dir.kernel_nodes)
        if any(not node.path for node in nodes):  # one is being attached, and may be any of them
            return []
        used = {_of(node).number for node in nodes if node.path and node.via == self.name}
        removed = []
        for name, sequence in list(records(folder, "loop")):
            number = int(name.removeprefix("loop")) if name.removeprefix("loop").isdecimal() else -1
            if number < 0 or number in used:
                continue
            found = loop_device.state_of(number)
            ours = found is not None and (found.sequence == sequence or found.backing.startswith(f"{run_dir.mounts}/"))
            if found is not None and ours:
                await in_process("detach", number=number, sequence=found.sequence, lazy=True, link="", records=folder)
                removed.append(f"loop device {loop_device.path_of(number)}")
            remove_record(folder, name)
        return removed


def _of(node: NodeState) -> _LoopDetails:
    try:
        return msgspec.convert(node.details, _LoopDetails)
    except msgspec.ValidationError as error:
        raise AttachError(f"state of a node: {error}", path=node.path, errno=errno.EINVAL) from error
