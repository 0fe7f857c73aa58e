"""Simulation of a kernel that stops serving io_uring: every ring descriptor of a process is replaced by another
file.
"""

from __future__ import annotations

import os


def lose_rings() -> int:
    """Takes all rings of this process away. How many there were."""
    null = os.open(os.devnull, os.O_RDONLY)
    lost = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            is_ring = "io_uring" in os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the listing's own
            continue
        if is_ring:
            os.dup2(null, int(name), inheritable=False)
            lost += 1
    os.close(null)
    return lost
