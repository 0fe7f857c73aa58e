"""Kernel loop devices of a run: attached, checked for the I/O they were asked for, detached.

Only what was attached here is detached, by its name; other people's loop devices are not looked at.
Takes root. Source: losetup(8), loop(4).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def lack() -> str:
    """What keeps loop devices from being set up here; "" if nothing does."""
    if not shutil.which("losetup"):
        return "losetup is not installed (Debian: apt install mount)"
    if os.geteuid() != 0:
        return "setting up a loop device takes root"
    return "" if Path("/dev/loop-control").exists() else "this kernel has no /dev/loop-control"


@contextmanager
def attached(path: Path, *, direct: bool, offset: int = 0, size: int = 0) -> Iterator[Path]:
    """A loop device over `size` bytes (0: the rest) of the file from `offset` on. direct: the driver
    uses direct I/O. Raises OSError if it cannot be had, or not this way.
    """
    setting = f"--direct-io={'on' if direct else 'off'}"
    piece = ["--offset", str(offset), *(["--sizelimit", str(size)] if size else [])]
    done = subprocess.run(["losetup", "--find", "--show", setting, *piece, str(path)], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"losetup: {done.stderr.strip()}")
    device = Path(done.stdout.strip())
    try:
        used = Path(f"/sys/block/{device.name}/loop/dio").read_text().strip()
        if used != str(int(direct)):
            raise OSError(f"{device}: asked for {setting}, the kernel says dio={used}")
        yield device
    finally:
        subprocess.run(["losetup", "--detach", str(device)], check=True)
