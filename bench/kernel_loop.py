"""Attaches kernel loop devices for a run, checks their I/O mode, and detaches them.

It detaches only the devices that it has attached, by name, and ignores all others. Needs root. Source: losetup(8),
loop(4).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def lack() -> str:
    """The reason why loop devices cannot be set up here; "" if they can."""
    if not shutil.which("losetup"):
        return "losetup is not installed (Debian: apt install mount)"
    if os.geteuid() != 0:
        return "setting up a loop device takes root"
    return "" if Path("/dev/loop-control").exists() else "this kernel has no /dev/loop-control"


@contextmanager
def attached(path: Path, *, direct: bool, offset: int = 0, size: int = 0) -> Iterator[Path]:
    """Loop device on `size` bytes (0: all to the end) of the file from `offset` on. direct: the driver uses direct I/O.
    Raises OSError if it is impossible, or only with another I/O mode.
    """
    setting = f"--direct-io={'on' if direct else 'off'}"
    piece = ["--offset", str(offset), *(["--sizelimit", str(size)] if size else [])]
    done = subprocess.run(
        ["losetup", "--find", "--show", setting, *piece, str(path)], capture_output=True, text=True, check=False
    )
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
