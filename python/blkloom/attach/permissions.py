"""Owner and permissions of nodes, and the files of properties that udev's rule reads.

The kernel's nodes of loop devices stay when the device is detached, so their former owner and permissions are restored
then. Where udev runs, its rule sets the same from the file `<run-dir>/kernel/properties/<name>`: udev would otherwise
set its own at the next event.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from blkloom.control.rundir import RunDir
    from blkloom.control.states import NodeOptions, NodeState

_FOLDER: Final = "properties"


def set_permissions(node: NodeState, options: NodeOptions, paths: list[str]) -> None:
    """Sets owner and permissions of block devices; the first path is the node, whose former ones are kept in `node`.
    Raises OSError.
    """
    if not options.has_permissions:
        return
    if node.former is None:
        status = os.stat(paths[0])
        node.former = (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode))
    for path in paths:
        os.chown(path, -1 if options.uid is None else options.uid, -1 if options.gid is None else options.gid)
        if options.mode is not None:
            os.chmod(path, options.mode)


def restore_permissions(node: NodeState) -> None:
    """Restores those of a node that has been detached, if the block device is still there. Raises OSError."""
    if node.former is not None and node.path:
        uid, gid, mode = node.former
        with suppress(FileNotFoundError):
            os.chmod(node.path, mode)
            os.chown(node.path, uid, gid)
        node.former = None


def write_properties(run_dir: RunDir, link: str, options: NodeOptions) -> None:
    """Writes the file of properties, before the kernel announces the node. link: the stable name. Raises OSError."""
    lines = [
        *([f"BLKLOOM_MODE={options.mode:04o}"] if options.mode is not None else []),
        *([f"BLKLOOM_UID={options.uid}"] if options.uid is not None else []),
        *([f"BLKLOOM_GID={options.gid}"] if options.gid is not None else []),
        *([] if options.scan else ["BLKLOOM_NO_SCAN=1"]),
    ]
    if lines:
        path = _path(run_dir, link)
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with open(path, "w", encoding="ascii") as file:
            file.write("\n".join([*lines, ""]))


def remove_properties(run_dir: RunDir, link: str) -> None:
    """Removes the file of properties if it exists. Raises OSError."""
    with suppress(FileNotFoundError):
        os.unlink(_path(run_dir, link))


def reap_properties(run_dir: RunDir, links: Collection[str]) -> None:
    """Removes the files of all nodes but those with these stable names. Raises OSError."""
    known = {os.path.basename(link) for link in links}
    with suppress(FileNotFoundError):
        for name in os.listdir(run_dir.kernel_nodes / _FOLDER):
            if name not in known:
                remove_properties(run_dir, name)


def _path(run_dir: RunDir, link: str) -> str:
    return str(run_dir.kernel_nodes / _FOLDER / os.path.basename(link))
