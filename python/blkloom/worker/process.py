"""Turns a forked process into a worker: sets its session, its name, its mount namespace and the I/O flusher flag.

Called once in the new process, before it has threads. Steps that the system does not permit are left out: a worker also
works in the mount namespace of the supervisor; it then sees later mounts.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from typing import Final

from blkloom.export.memory_pressure import become_io_flusher

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
    become_io_flusher()  # not permitted: exports that need it report this
    _leave_mounts(libc)


def _leave_mounts(libc: ctypes.CDLL) -> None:
    """Moves the process into its own mount namespace, where unmounts of the parent namespace still take effect. With
    private mounts (in containers) they would not, and the worker would keep file systems mounted: it then stays.
    """
    if not _root_is_shared():
        return
    if libc.unshare(_CLONE_NEWNS) == 0 and libc.mount(None, b"/", None, _MS_REC | _MS_SLAVE, None) == 0:
        return
    number = ctypes.get_errno()
    level = logging.DEBUG if number in (errno.EPERM, errno.ENOSYS) else logging.WARNING
    _log.log(level, "no mount namespace of its own: %s", os.strerror(number))


def _root_is_shared() -> bool:
    """Whether mount changes propagate to namespaces made from this one. Source: proc_pid_mountinfo(5)."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        mounts = [line.partition(" - ")[0].split() for line in lines]
    return any(fields[4] == "/" and any(word.startswith("shared:") for word in fields[6:]) for fields in mounts)
