"""Interface of the ways to attach a device: `Way` makes a node over an export, finds it again and removes it.

A node is a block device or a file that programs open. One export of the device serves it. The supervisor adds the
export before the attach and removes it after the detach. The export decides whether the node survives the death of a
worker. A new way is one file with a class and one line in `registry.py`.

Ways run in the supervisor, on its event loop. Calls that may wait for the device (opening the node, ioctls that read
it) run in a separate process (`process.py`), because the supervisor must be able to replace the worker meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar, Protocol

import msgspec

if TYPE_CHECKING:
    from blkloom.control.rundir import RunDir
    from blkloom.control.states import ExportState, NodeState


class NodeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The requested properties of a node. name: of the device. block_size: its logical block size in bytes."""

    name: str
    block_size: int = 512
    read_only: bool = False
    partitions: bool = False
    """The kernel reads the partition table and makes nodes of partitions."""


class Way(Protocol):
    """A way to attach. `export` is always the export of the node."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """Description of the node, for output."""
    export: ClassVar[str]
    """Kind of the export that serves the node (`export.registry`)."""
    is_block_device: ClassVar[bool]
    """Whether the node is a block device, which can be mounted; otherwise it is a file."""
    holds_open: ClassVar[bool]
    """Whether the kernel holds the export open while the node exists."""

    def lacks(self) -> str:
        """Why this machine or this user cannot attach in this way; "" if nothing is missing. On any thread."""

    def path_of_export(self, run_dir: RunDir) -> str:
        """The path to add the export with; "" for its automatic place."""

    async def attach(self, run_dir: RunDir, node: NodeState, export: ExportState, spec: NodeSpec) -> None:
        """Makes the node; sets path and details of `node`. After an error, nothing is left. Raises AttachError."""

    async def detach(self, run_dir: RunDir, node: NodeState, *, lazy: bool) -> None:
        """Removes the node. lazy: a node in use is removed after its last use; until then `is_there` is true. Does
        nothing if the node does not exist any more. Raises DeviceBusy, AttachError.
        """

    def renamed(self, run_dir: RunDir, node: NodeState, name: str) -> None:
        """Updates the node after the device was renamed to `name`. Does not block. Raises OSError."""

    def is_there(self, node: NodeState) -> bool:
        """Whether the node is still attached, in any state. Does not block."""

    def uses_export(self, node: NodeState, export: ExportState) -> bool:
        """Whether the node uses this export; otherwise it must be made again. Does not block."""

    def users(self, node: NodeState, export: ExportState) -> list[str]:
        """The users of the node, as text: "mounted at /mnt", "fio (process 42)". On any thread; reads no storage."""

    def block_devices(self, node: NodeState, export: ExportState) -> list[str]:
        """The node if it is a block device, or the loop devices on it: devices that file systems can be on."""

    def holders(self, node: NodeState) -> list[str]:
        """The users that are found quickly: mounts and stacked devices. Does not block."""

    async def refresh(self, node: NodeState, export: ExportState, *, read_only: bool, block_size: int) -> None:
        """Updates size, logical block size (bytes) and read-only flag of the node. Raises DeviceBusy if the block size
        cannot be changed while the node is in use, AttachError.
        """

    async def reap(self, run_dir: RunDir, nodes: Collection[NodeState]) -> list[str]:
        """Removes leftovers of this way that belong to none of `nodes`, which are all nodes of the run directory.
        Returns one line for each. Raises AttachError, OSError.
        """
