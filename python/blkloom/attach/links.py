"""Stable names of nodes: symbolic links in /dev/blkloom, or in `nodes` of a run directory other than root's.

The supervisor makes and removes the links. Where udev runs, its rule makes the same links, so that mounts at boot can
wait for them. Either may come first; the other leaves a correct link unchanged.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from blkloom.errors import AttachError

if TYPE_CHECKING:
    from blkloom.control.rundir import RunDir


_PARTITION: Final = re.compile(r"-part[0-9]+$")


def make_link(path: str, to: str) -> None:
    """Makes the link `path` to `to`, or changes it. Raises AttachError if `path` is no link, OSError."""
    folder = os.path.dirname(path)
    os.makedirs(folder, mode=0o755, exist_ok=True)
    with suppress(OSError):
        if os.readlink(path) == to:
            return
    if os.path.lexists(path) and not os.path.islink(path):
        raise AttachError("exists and is no link", path=path, errno=errno.EEXIST, cure="move it away")
    aside = f"{path}~new"
    with suppress(FileNotFoundError):
        os.unlink(aside)
    os.symlink(to, aside)
    os.replace(aside, path)


def remove_link(path: str, to: str) -> None:
    """Removes the link `path` if it leads to `to` (links of udev are relative), or anywhere if `to` is "". Raises
    OSError.
    """
    if not os.path.islink(path):
        return
    with suppress(FileNotFoundError):
        if not to or os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path))) == to:
            os.unlink(path)


def stale_links(run_dir: RunDir, known: Collection[str]) -> Iterator[str]:
    """Links in the directory that are not in `known`; links of partitions (by udev) only if that of the node is not."""
    with suppress(FileNotFoundError):
        for name in sorted(os.listdir(run_dir.links)):
            path = str(run_dir.links / name)
            if path not in known and _PARTITION.sub("", path) not in known and os.path.islink(path):
                yield path
