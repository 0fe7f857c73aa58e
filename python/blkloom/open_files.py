"""The limit of open files of this process (RLIMIT_NOFILE), how much of it is left, and what is kept in reserve.

A worker keeps some descriptors that its clients cannot use up: without them it could not be taken over by the next
supervisor, nor hand over what it has. The supervisor keeps some for the same: each descriptor of its workers passes
through it. The soft limit is 1024 on most systems, for programs that use select(2); none of ours does, and processes
that serve raise it to the hard one. Those are not inherited by other programs: nothing here starts any.
"""

from __future__ import annotations

import errno
import os
import resource
import sys
from typing import Final

WORKER_RESERVE: Final = 64
"""For a supervisor's connection, and what is sent to it at once (`Host.store`)."""
SUPERVISOR_RESERVE: Final = 320
"""For what comes in one message of a worker, while another worker is started."""


def raise_limit() -> None:
    """The soft limit becomes the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def close(fd: int) -> None:
    """A descriptor of a file of data. Storage that breaks says so here, too (FUSE, NFS), in whatever process closes a
    copy: it is closed even so, and a sync will tell. Raises OSError only if it was none.
    """
    try:
        os.close(fd)
    except OSError as error:
        if error.errno == errno.EBADF:
            raise


def limit() -> int:
    """The soft limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def left() -> int:
    """How many more descriptors can be opened; not below 0."""
    # From Linux 6.2 on the folder's size is their number (proc_pid_fd(5)); before, and in sandboxes, it is 0.
    used = os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))
    return max(0, limit() - used)


def are_scarce(reserve: int, *, more: int = 0) -> bool:
    """Whether `more` descriptors cannot be had without touching the reserve. A limit too low for one that large has a
    quarter of it in reserve.
    """
    return left() - more <= min(reserve, limit() // 4)


def advice() -> str:
    """What to do where there are too few."""
    return (
        f"raise the hard limit of open files, which is {limit()} here (ulimit -Hn, or LimitNOFILE= in a systemd unit)"
    )
