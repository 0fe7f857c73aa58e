"""Which files processes have mapped into their memory to write to them: nothing tells when they do.

One look at /proc, as far as we may look. Pure but for that. Source: proc_pid_maps(5).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

_SHARED_TO_WRITE: Final = re.compile(
    rb"^[0-9a-f]+-[0-9a-f]+ .w.s [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) ([1-9][0-9]*) ", re.MULTILINE
)


def mapped_to_write(proc: Path = Path("/proc")) -> dict[tuple[int, int], int]:
    """A process (its pid) for each file, by (st_dev, st_ino), that others have mapped shared and writable. Processes
    that are not ours to look at are left out. proc: where procfs is mounted; where it is not there are none.
    """
    found: dict[tuple[int, int], int] = {}
    try:
        pids = [int(name) for name in os.listdir(proc) if name.isdecimal()]
    except OSError:
        return found
    for pid in pids:
        try:
            maps = (proc / str(pid) / "maps").read_bytes()
        except OSError:  # it has ended, or is not ours
            continue
        for major, minor, inode in _SHARED_TO_WRITE.findall(maps):
            found.setdefault((os.makedev(int(major, 16), int(minor, 16)), int(inode)), pid)
    return found
