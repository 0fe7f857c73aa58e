"""Which files processes have mapped into their memory to write to them: nothing tells when they do.

One look at /proc, as far as we may look. Pure but for that. Workers of blkloom's, of which there may be
thousands, map no files, and their long maps are not read. Source: proc_pid_maps(5), proc_pid_comm(5).
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
        if _is_worker(f"{proc}/{pid}"):
            continue
        try:
            maps = (proc / str(pid) / "maps").read_bytes()
        except OSError:  # it has ended, or is not ours
            continue
        for major, minor, inode in _SHARED_TO_WRITE.findall(maps):
            found.setdefault((os.makedev(int(major, 16), int(minor, 16)), int(inode)), pid)
    return found


def _is_worker(process: str) -> bool:
    """By its name, which `worker.process` gives it: this is a courtesy to users, and nobody gains by pretending."""
    try:
        with open(f"{process}/comm", "rb", buffering=0) as name:
            return name.read(8) == b"blkloom "
    except OSError:
        return False
