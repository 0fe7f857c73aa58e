"""Private directories of programs that serve nodes without a supervisor (`blkloom serve --attach`).

A program holds a lock in its directory. If it was killed, the lock is free, and another program may remove what it has
left: loop devices, mounts, and the directory.
"""

from __future__ import annotations

import asyncio
import errno
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

_PREFIX: Final = "blkloom-serve-"
_LOCK: Final = "serving.lock"


class PrivateDirectory:
    """A new directory below `parent`, laid out as a run directory. Close it."""

    def __init__(self, parent: Path) -> None:
        """Raises OSError."""
        found = None
        while found is None:
            path = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
            found = _hold(path)
        self._lock = found
        self.run_dir = RunDir.at(path)
        self.run_dir.make()

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


def _hold(path: str) -> int | None:
    """Takes the lock of a directory that was just made; None if it has been removed: until it has a lock, it is empty
    and looks abandoned. Raises OSError.
    """
    try:
        directory = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    lock = -1
    try:
        # The lock gets its name when it is held: no other program finds it free before.
        lock = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.link(f"/proc/self/fd/{lock}", _LOCK, dst_dir_fd=directory, follow_symlinks=True)
    except OSError as error:
        if lock >= 0:
            os.close(lock)
        if error.errno == errno.ENOENT:
            return None
        raise
    finally:
        os.close(directory)
    return lock


def _parent(parent: Path | None) -> Path:
    return parent or Path(tempfile.gettempdir())


async def remove_abandoned(parent: Path | None) -> list[str]:
    """Removes what killed programs of this user have left in their directories below `parent`. Returns a line for each
    thing. Raises AttachError, OSError.
    """
    removed: list[str] = []
    for path in await asyncio.to_thread(lambda: sorted(_parent(parent).glob(f"{_PREFIX}*"))):
        with suppress(OSError):
            os.rmdir(path)  # succeeds if its program was killed before it had a lock
            removed.append(f"directory {path}")
            continue
        lock = _free_lock(path)
        if lock is None:
            continue
        try:
            removed += await _remove(RunDir(path))
        finally:
            os.close(lock)
    return removed


def _free_lock(path: Path) -> int | None:
    """The lock of a directory, taken; None if its program runs, or if it is another user's."""
    with suppress(OSError, UsageError):
        directory = open_private(path)
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
    run_dir.make()  # its program may have been killed before it did
    removed: list[str] = []
    for name in ways.names():
        removed += await ways.way(name).reap(run_dir, ())
    removed += await asyncio.to_thread(lambda: list(endpoints("fuse").reap(run_dir, (), alone=True)))
    await asyncio.to_thread(shutil.rmtree, run_dir.path)
    return [*removed, f"directory {run_dir.path}"]
