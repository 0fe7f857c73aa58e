"""Private directories of programs that serve nodes without a supervisor (`blkloom serve --attach`).

A program holds a lock in its directory. If it was killed, the lock is free, and another program may remove what it has
left: loop devices, mounts, and the directory.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

from blkloom.attach import registry as ways
from blkloom.control.rundir import RunDir
from blkloom.control.trusted_path import open_private
from blkloom.errors import UsageError
from blkloom.export.registry import endpoints

_PREFIX: Final = "blkloom-"
_LOCK: Final = "serving.lock"


class PrivateDirectory:
    """A new directory below `parent`, laid out as a run directory. Close it."""

    def __init__(self, parent: Path) -> None:
        """Raises OSError."""
        self.run_dir = RunDir.at(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self.run_dir.make()
        directory = os.open(self.run_dir.path, os.O_PATH | os.O_CLOEXEC)
        try:
            # The lock gets its name when it is held: no other program finds it free before.
            self._lock = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            os.link(f"/proc/self/fd/{self._lock}", _LOCK, dst_dir_fd=directory, follow_symlinks=True)
        finally:
            os.close(directory)

    def close(self) -> None:
        """Removes the directory. A second call does nothing."""
        if self._lock >= 0:
            shutil.rmtree(self.run_dir.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    @classmethod
    def make(cls, parent: Path | None) -> Self:
        """parent: None for the directory of temporary files. Raises OSError."""
        return cls(_parent(parent))


def _parent(parent: Path | None) -> Path:
    return parent or Path(tempfile.gettempdir())


async def remove_abandoned(parent: Path | None) -> list[str]:
    """Removes what killed programs of this user have left in their directories below `parent`. Returns a line for each
    thing. Raises AttachError, OSError.
    """
    removed: list[str] = []
    for path in await asyncio.to_thread(lambda: sorted(_parent(parent).glob(f"{_PREFIX}*/{_LOCK}"))):
        lock = _free_lock(path)
        if lock is None:
            continue
        try:
            removed += await _remove(RunDir(path.parent))
        finally:
            os.close(lock)
    return removed


def _free_lock(path: Path) -> int | None:
    """The lock, taken; None if its program runs, or if it is another user's."""
    with suppress(OSError, UsageError):
        directory = open_private(path.parent)
        try:
            lock = os.open(_LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        finally:
            os.close(directory)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise
        return lock
    return None


async def _remove(run_dir: RunDir) -> list[str]:
    removed: list[str] = []
    for name in ways.names():
        removed += await ways.way(name).reap(run_dir, ())
    removed += await asyncio.to_thread(lambda: list(endpoints("fuse").reap(run_dir, (), alone=True)))
    await asyncio.to_thread(shutil.rmtree, run_dir.path)
    return [*removed, f"directory {run_dir.path}"]
