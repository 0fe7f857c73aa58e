"""Files that processes have mapped shared and writable (mmap): their writes through memory cannot be observed.

Reads /proc once, as far as permissions allow. Workers of blkloom map no files; there may be
thousands of them, so their long maps are not read. Source: proc_pid_maps(5), proc_pid_comm(5).
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
    """Files that other processes have mapped shared and writable: (st_dev, st_ino) → one pid. Processes that this
    process may not read are left out. proc: mount point of procfs; without procfs the result is empty.
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
        except OSError:  # it has ended, or may not be read
            continue
        for major, minor, inode in _SHARED_TO_WRITE.findall(maps):
            found.setdefault((os.makedev(int(major, 16), int(minor, 16)), int(inode)), pid)
    return found


def _is_worker(process: str) -> bool:
    """Whether it has the name of a worker (set in `worker.process`). A process with a false name gains nothing."""
    try:
        with open(f"{process}/comm", "rb", buffering=0) as name:
            return name.read(8) == b"blkloom "
    except OSError:
        return False
