"""Names of the devices that use a file, for the error about a file in use, instead of process numbers.

Called in the client, because relative paths begin at its working directory. Never fails: a file that cannot be accessed
is compared by its name.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Sequence

from blkloom.control.states import DeviceInfo
from blkloom.errors import BusyError


def name_holders(error: BusyError, devices: Sequence[DeviceInfo], supervisor: int) -> BusyError:
    """The same error, or one that names those of `devices` that use its file, and the command that ends each.
    supervisor: its process, which has copies of all descriptors and does not use them.
    """
    workers = {info.worker for info in devices if info.worker}
    strangers = [pid for pid in error.holders if pid not in workers and pid != supervisor]
    users = [info for info in devices if any(_is_same(error.path, path) for path in info.deps)]
    # A group of devices shares a worker; the holder is the device that has the file. A backing file is in no table.
    named = [info for info in users if info.worker in error.holders]
    named = named or [info for info in devices if info.worker in error.holders]
    named = named or [info for info in users if not strangers and (error.holders or not info.read_only)]
    if not named:
        return error
    names = ", ".join(f"'{info.name}'" for info in named)
    by = f"device{'s' * (len(named) > 1)} {names}"
    if strangers:
        by += f" and process {', '.join(map(str, strangers))}"
    cure = " and ".join(_command_that_ends(info) for info in named)
    return BusyError(
        f"already in use by {by}",
        path=error.path,
        errno=error.errno or errno.EBUSY,
        cure=f"{cure} ends that; or pass shared=True (--shared) if you know it is safe",
    )


def _command_that_ends(info: DeviceInfo) -> str:
    verb = "remove" if info.loop is None else "loop -d"
    return f"blkloom {verb} {shlex.quote(info.name)}"


def _is_same(path: str, other: str) -> bool:
    """Whether both paths refer to the same file or block device."""
    if path == other:
        return True
    try:
        one, two = os.stat(path), os.stat(other)
    except (OSError, ValueError):
        return False
    if stat.S_ISBLK(one.st_mode) and stat.S_ISBLK(two.st_mode):
        return one.st_rdev == two.st_rdev
    return os.path.samestat(one, two)
