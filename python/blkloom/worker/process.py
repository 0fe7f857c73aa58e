"""What makes a forked process a worker: its session, its name, its mount namespace.

Called once, in the new process, before it has threads. What the system does not allow is left out:
a worker in the supervisor's mount namespace works as well, it only sees what is mounted later.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from typing import Final

_log = logging.getLogger(__name__)

_PR_SET_NAME: Final = 15
_CLONE_NEWNS: Final = 0x00020000
_MS_REC: Final = 0x4000
_MS_SLAVE: Final = 0x80000


def become_worker(name: str) -> None:
    """Makes this process the worker `name`."""
    os.setsid()
    os.chdir("/")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NAME, f"blkloom {name}"[:15].encode(), 0, 0, 0)
    _leave_mounts(libc)


def _leave_mounts(libc: ctypes.CDLL) -> None:
    """Into a mount namespace of its own, from which unmounts outside still take away. Where mounts are private
    (in containers) they would not, and the worker would keep file systems mounted: it stays where it is.
    """
    if not _root_is_shared():
        return
    if libc.unshare(_CLONE_NEWNS) == 0 and libc.mount(None, b"/", None, _MS_REC | _MS_SLAVE, None) == 0:
        return
    number = ctypes.get_errno()
    level = logging.DEBUG if number in (errno.EPERM, errno.ENOSYS) else logging.WARNING
    _log.log(level, "no mount namespace of its own: %s", os.strerror(number))


def _root_is_shared() -> bool:
    """Whether what happens to mounts is told to namespaces made from this one. Source: proc_pid_mountinfo(5)."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        mounts = [line.partition(" - ")[0].split() for line in lines]
    return any(fields[4] == "/" and any(word.startswith("shared:") for word in fields[6:]) for fields in mounts)
