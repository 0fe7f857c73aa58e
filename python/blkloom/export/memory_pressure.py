"""Avoids deadlocks and deaths under memory pressure in a process that serves a block device of its own kernel.

The deadlock: ext4 writes to a loop device over a FUSE file; to serve the write, this process allocates memory; to free
memory, the kernel writes to ext4, which waits for this process. For a thread that is an I/O flusher (PR_SET_IO_FLUSHER)
the kernel frees no memory by I/O, as for its own loop driver; threads that it starts inherit the flag. Memory that is
locked needs no read from swap before a write can continue.

The OOM killer prefers large processes, such as one with locked buffers. Its death would free nothing for long: the next
worker needs the same memory, and dirty data waits for it meanwhile.

Source: prctl(2), mlockall(2), proc_pid_oom_score_adj(5), Linux drivers/block/loop.c (PF_LOCAL_THROTTLE,
PF_MEMALLOC_NOIO).
"""

from __future__ import annotations

import re
import resource
from typing import Final

_PR_SET_IO_FLUSHER: Final = 57
_PR_GET_IO_FLUSHER: Final = 58
_MCL_CURRENT_FUTURE_ONFAULT: Final = 1 | 2 | 4
_OOM_SCORE: Final = -900
"""Of 1000 parts of all memory that are not counted: a process that takes nearly all of it is still killed."""
_OOM_FILE: Final = "/proc/self/oom_score_adj"
CAP_IPC_LOCK: Final = 14
CAP_SYS_ADMIN: Final = 21
CAP_SYS_RESOURCE: Final = 24


def become_io_flusher() -> bool:
    """Makes this thread, and threads that it starts, I/O flushers. Returns False if CAP_SYS_RESOURCE is missing, or if
    the kernel is older than Linux 5.6.
    """
    return _prctl(_PR_SET_IO_FLUSHER, 1) == 0


def lock_memory() -> bool:
    """Locks the present and future memory of the process, when it is touched. Returns False if RLIMIT_MEMLOCK limits
    it and CAP_IPC_LOCK is missing: later allocations would fail.
    """
    import ctypes

    unlimited = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY
    if not (unlimited or is_capable(CAP_IPC_LOCK)):
        return False
    return int(ctypes.CDLL(None, use_errno=True).mlockall(_MCL_CURRENT_FUTURE_ONFAULT)) == 0


def avoid_oom_killer() -> bool:
    """Makes the OOM killer choose other processes first. Returns False if CAP_SYS_RESOURCE is missing."""
    with open(_OOM_FILE, encoding="ascii") as file:
        if int(file.read()) <= _OOM_SCORE:
            return True
    try:
        with open(_OOM_FILE, "w", encoding="ascii") as file:
            file.write(str(_OOM_SCORE))
    except PermissionError:
        return False
    return True


def lacks() -> str:
    """Locks the memory, avoids the OOM killer, and describes what this process is not permitted to do against the
    deadlock; "" for nothing. Call it on a thread that has run since `become_io_flusher`.
    """
    missing = []
    if _prctl(_PR_GET_IO_FLUSHER, 0) != 1:
        missing.append("is no I/O flusher (CAP_SYS_RESOURCE)")
    if not lock_memory():
        missing.append("cannot lock its memory (CAP_IPC_LOCK, or an unlimited RLIMIT_MEMLOCK)")
    if not avoid_oom_killer():
        missing.append("may be killed by the OOM killer (CAP_SYS_RESOURCE)")
    return " and ".join(missing)


def is_capable(capability: int) -> bool:
    """Whether this process has a capability. Source: proc_pid_status(5)."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", lines.read(), re.MULTILINE)
    return effective is not None and bool(int(effective[1], 16) >> capability & 1)


def _prctl(option: int, argument: int) -> int:
    import ctypes

    return int(ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0))
