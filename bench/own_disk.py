"""Private disk of the run, to compare the I/O modes of a file with the raw blocks of the same disk.

One file on the machine's disk, allocated and written, is the backing of two loop devices with direct I/O: the first has
a file system with one file, the second has none. The file and the second device have the same size and have been
written once, so neither has holes or extents that the file system would have to convert, and both use the same storage
through the same driver. Only the run uses them, so writes destroy nothing. Needs root. Source: losetup(8), mke2fs(8),
posix_fadvise(2).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import kernel_loop

_PIECE: Final = 16 << 20
_ROOM: Final = 128 << 20
"""What the file system takes for itself, at most: its journal, its tables."""
_PROGRAMS: Final = {"mkfs.ext4": "e2fsprogs", "mount": "mount", "umount": "mount"}


@dataclass(frozen=True)
class OwnDisk:
    """The private disk. file: on ext4. raw: a block device of the same size on the same backing file."""

    file: Path
    raw: Path

    @contextmanager
    def file_at_hand(self, *, cached: bool) -> Iterator[Path]:
        """The file, with its writes done and all of it in the page cache or nothing; so everybody
        begins with the same. Afterwards what was written is on the disk, and the cache is empty.
        """
        _settle(self.file, cached=cached)
        try:
            yield self.file
        finally:
            _settle(self.file, cached=False)


def lack() -> str:
    """The reason why a disk cannot be made here; "" if it can."""
    for program, package in _PROGRAMS.items():
        if not shutil.which(program):
            return f"{program} is not installed (Debian: apt install {package})"
    return kernel_loop.lack()


@contextmanager
def own_disk(folder: Path, *, size: int) -> Iterator[OwnDisk]:
    """Make the disk in an empty directory on the machine's disk; the directory is emptied at the end. Raises
    OSError.
    """
    image, mount = folder / "disk.img", folder / "mounted"
    system = size + size // 16 + _ROOM
    with ExitStack() as stack:
        stack.callback(image.unlink, missing_ok=True)
        write(image, system + size)
        first = stack.enter_context(kernel_loop.attached(image, direct=True, size=system))
        raw = stack.enter_context(kernel_loop.attached(image, direct=True, offset=system))
        # Initialise everything now: otherwise the kernel does it later, during a measurement.
        _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(first))
        mount.mkdir()
        stack.callback(mount.rmdir)
        _run("mount", str(first), str(mount))
        stack.callback(_run, "umount", str(mount))
        write(mount / "file.img", size)
        yield OwnDisk(mount / "file.img", raw)


def write(path: Path, size: int) -> None:
    """Write a new file: allocate all its space first, so that it has few extents, then write random bytes, then fsync.
    Raises OSError.
    """
    with path.open("xb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, size)
        piece = os.urandom(_PIECE)
        for position in range(0, size, _PIECE):
            file.write(piece[: size - position])
        os.fsync(file.fileno())


def _settle(path: Path, *, cached: bool) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
        if cached:
            buffer, at = bytearray(_PIECE), 0
            while count := os.preadv(fd, [buffer], at):
                at += count
        else:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
