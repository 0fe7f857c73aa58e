"""The FUSE file as a node: the automatic file of the device in the run directory. No root is needed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar, Final

from blkloom.export.fuse.mount import DEVICE
from blkloom.export.fuse.state import FuseDetails
from blkloom.export.fuse.users import users_of
from blkloom.export.memory_pressure import CAP_SYS_ADMIN, is_capable

if TYPE_CHECKING:
    from blkloom.attach.way import NodeSpec
    from blkloom.control.rundir import RunDir
    from blkloom.control.states import ExportState, NodeState


_NS_GET_USERNS: Final = 0xB701
_FUSE: Final = os.makedev(10, 229)
"""Source: Documentation/admin-guide/devices.txt."""


class FuseWay:
    """Implements `way.Way` for a FUSE file. The export does all the work."""

    name: ClassVar[str] = "fuse"
    summary: ClassVar[str] = "a FUSE file"
    export: ClassVar[str] = "fuse"
    is_block_device: ClassVar[bool] = False
    holds_open: ClassVar[bool] = False

    def lacks(self) -> str:
        """Why this user cannot mount a FUSE file; "" if nothing is missing."""
        return lacks_fuse()

    def path_of_export(self, run_dir: RunDir) -> str:
        """Empty: the automatic path, which changes with the device's name."""
        return ""

    async def attach(self, run_dir: RunDir, node: NodeState, export: ExportState, spec: NodeSpec) -> None:
        """Sets the path of the node. The export has already made the file."""
        node.path = export.path

    async def detach(self, run_dir: RunDir, node: NodeState, *, lazy: bool) -> None:
        """Does nothing: the file is removed with the export, which is refused while the file is open."""

    def renamed(self, run_dir: RunDir, node: NodeState, name: str) -> None:
        """Sets the new path: the file is renamed with the device."""
        node.path = str(run_dir.file(name))

    def is_there(self, node: NodeState) -> bool:
        """True: the file exists as long as its export."""
        return True

    def uses_export(self, node: NodeState, export: ExportState) -> bool:
        """True: a file that is mounted again has the same path."""
        return True

    def users(self, node: NodeState, export: ExportState) -> list[str]:
        """Processes that have the file open, and loop devices on it."""
        return list(users_of(FuseDetails.of(export).mounted))

    def block_devices(self, node: NodeState, export: ExportState) -> list[str]:
        """Loop devices on the file, as `mount -o loop` makes them."""
        return [user for user in users_of(FuseDetails.of(export).mounted) if user.startswith("/dev/")]

    def holders(self, node: NodeState) -> list[str]:
        """Empty: the worker counts users of the file as clients."""
        return []

    async def refresh(self, node: NodeState, export: ExportState, *, read_only: bool, block_size: int) -> None:
        """Does nothing: the worker reports the size to the kernel."""

    async def reap(self, run_dir: RunDir, nodes: Collection[NodeState]) -> list[str]:
        """Does nothing: `reap` of the exports removes stale mounts."""
        return []


def lacks_fuse() -> str:
    """Why this user cannot mount a FUSE file; "" if nothing is missing."""
    try:
        descriptor = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            number = os.fstat(descriptor).st_rdev
        finally:
            os.close(descriptor)
    except OSError as error:
        cure = "modprobe fuse; a container needs the device passed in"
        if error.errno in (errno.EACCES, errno.EPERM):
            cure = "allow this user to read and write it; a container needs the device passed in"
        return f"{DEVICE}: {error.strerror} ({cure})"
    if number != _FUSE:
        return f"{DEVICE} is not the kernel's FUSE device (a container needs that one passed in)"
    if os.geteuid() == 0 and not is_capable(CAP_SYS_ADMIN):
        return "root lacks CAP_SYS_ADMIN, which mounting needs (a container may be given it)"
    if os.geteuid() == 0 and not _owns_mount_namespace():
        what = "root of this user namespace may not mount in its mount namespace"
        return f"{what} (begin both together: unshare --user --map-root-user --mount)"
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        return "fusermount3 is not installed (Debian: apt install fuse3)"
    return ""


def _owns_mount_namespace() -> bool:
    """Whether the mount namespace of this process belongs to its user namespace or one below. Source: ioctl_ns(2)."""
    try:
        namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # no /proc: unknown
        return True
    try:
        os.close(fcntl.ioctl(namespace, _NS_GET_USERNS))
    except OSError as error:
        return error.errno != errno.EPERM
    finally:
        os.close(namespace)
    return True
