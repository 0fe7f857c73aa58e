"""Backing storage of the contenders: files on tmpfs and on the disk, a private disk of the run, and a scratch
directory.

Each is made on first use, filled with random bytes (no holes, not compressible), and removed at the end, also after
errors. One thread.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from own_disk import OwnDisk, own_disk

_PIECE: Final = 16 << 20


class GroundError(Exception):
    """A directory that cannot be used; the text names it, the reason and the remedy."""


class Ground:
    """Backing storage of a run. size: bytes of every device and backing file. tmpfs, disk: directories for them."""

    def __init__(self, *, size: int, tmpfs: Path, disk: Path) -> None:
        self.size = size
        self._most = size
        """Of the files that all share, whatever size a copy of this is given. Copies share files and folders too."""
        self._tmpfs, self._disk = tmpfs, disk
        self._files: dict[str, Path] = {}
        self._own_disk: OwnDisk | None = None
        self._folders: dict[str, Path] = {}
        self._undo = ExitStack()
        self.scratch = Path(tempfile.mkdtemp(prefix="blkloom-bench-"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._undo:
            for path in self._files.values():
                path.unlink(missing_ok=True)
            shutil.rmtree(self.scratch)

    def tmpfs_file(self) -> Path:
        """File of `size` bytes on tmpfs. Raises GroundError."""
        if _file_system(self._tmpfs) != "tmpfs":
            raise GroundError(f"{self._tmpfs} is not on tmpfs; name a folder that is with --tmpfs-dir")
        return self._file("tmpfs", self._tmpfs)

    def quick_folder(self) -> Path:
        """Directory with the fastest writes: a private tmpfs with huge pages, if the run may mount one. Raises
        GroundError, OSError.
        """
        if os.geteuid() != 0:
            return self._tmpfs
        if "quick" not in self._folders:
            folder = self._undo.enter_context(tempfile.TemporaryDirectory(prefix="blkloom-bench-"))
            subprocess.run(["mount", "-t", "tmpfs", "-o", "huge=always", "blkloom-bench", folder], check=True)
            self._undo.callback(subprocess.run, ["umount", folder], check=True)
            self._folders["quick"] = Path(folder)
        return self._folders["quick"]

    def disk_folder(self) -> Path:
        """Directory on the machine's disk. Raises GroundError."""
        self._check_disk()
        _check_space(self._disk, self._most)
        return self._disk

    def disk_file(self) -> Path:
        """File of `size` bytes on the machine's disk, written and synced. Raises GroundError."""
        self._check_disk()
        return self._file("disk", self._disk)

    def own_disk(self) -> OwnDisk:
        """Private disk of the run, on the machine's disk. Raises GroundError, OSError."""
        if self._own_disk is None:
            self._check_disk()
            _check_space(self._disk, 3 * self.size)
            with ExitStack() as undo:
                folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="blkloom-bench-", dir=self._disk)))
                self._own_disk = undo.enter_context(own_disk(folder, size=self.size))
                self._undo.enter_context(undo.pop_all())
        return self._own_disk

    def _check_disk(self) -> None:
        if _file_system(self._disk) in ("tmpfs", "ramfs"):
            raise GroundError(f"{self._disk} is in memory; name a folder on a disk with --disk-dir")

    def _file(self, kind: str, folder: Path) -> Path:
        if kind not in self._files:
            _check_space(folder, self._most)
            handle, name = tempfile.mkstemp(prefix="blkloom-bench-", suffix=".img", dir=folder)
            self._files[kind] = Path(name)
            with os.fdopen(handle, "wb", buffering=0) as file:
                piece = os.urandom(_PIECE)
                for position in range(0, self._most, _PIECE):
                    file.write(piece[: self._most - position])
                os.fsync(file.fileno())
        return self._files[kind]


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size * 1.1:
        raise GroundError(f"{folder} has {free >> 20} MiB free, {size >> 20} MiB are needed")


def _file_system(folder: Path) -> str:
    """Type of the file system of a path, from the mount with the longest matching path (proc_pid_mounts(5))."""
    real = folder.resolve()
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    fitting = [(point, kind) for point, kind in mounts if real == Path(point) or Path(point) in real.parents]
    return max(fitting, key=lambda mount: len(mount[0]))[1]
