"""Kernel file systems on loop devices, for tests of the loop target's modes.

Each is made when first asked for and unmounted and detached in the end, whatever happened to the tests.
What cannot be made here is skipped, and the skip names what is missing.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

MiB = 1 << 20
TIMEOUT = 60.0
"""Seconds, for programs that end by themselves."""

Program = Callable[[str, str], str]


@dataclass(frozen=True)
class FileSystem:
    """How one is made. size: bytes, the least that mkfs takes, or a little more; check: what finds nothing
    wrong with it when it is not mounted, and then ends with status 0.
    """

    name: str
    package: str
    size: int
    make: tuple[str, ...]
    check: tuple[str, ...]
    mount_options: str = "rw"


# Without allocsize xfs would give a growing file room ahead, and no file here would have more than one extent.
EXT4 = FileSystem("ext4", "e2fsprogs", 64 * MiB, ("mkfs.ext4", "-q"), ("e2fsck", "-f", "-n"))
XFS = FileSystem(
    "xfs",
    "xfsprogs",
    320 * MiB,
    ("mkfs.xfs", "-q", "-f", "-m", "reflink=1"),
    ("xfs_repair", "-n"),
    "rw,allocsize=4k",
)
BTRFS = FileSystem("btrfs", "btrfs-progs", 128 * MiB, ("mkfs.btrfs", "-q", "-f"), ("btrfs", "check", "--readonly"))

ON_A_DEVICE = {
    "ext4": (EXT4, 512),
    "ext4_4k": (EXT4, 4096),
    "xfs": (XFS, 512),
    "xfs_4k": (XFS, 4096),
    "btrfs": (BTRFS, 512),
}
"""By the name tables give them: which, and on sectors of how many bytes."""
OVERLAY = "overlay"
NAMES = frozenset({*ON_A_DEVICE, OVERLAY})


def run(*command: str | Path) -> str:
    """What it printed; it must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}"
    return done.stdout


def needs_root(what: str) -> None:
    """Skips where devices cannot be made and mounted."""
    if os.geteuid() != 0:
        pytest.skip(f"{what} needs root, to mount")
    if not os.path.exists("/dev/loop-control"):
        pytest.skip(f"{what} needs loop devices: /dev/loop-control is missing")


@contextmanager
def loop_device(program: Program, file: Path, *, sector: int = 512, read_only: bool = False) -> Iterator[Path]:
    """`file` as a block device of the kernel's with sectors of that many bytes."""
    needs_root("a loop device")
    losetup = program("losetup", "mount")
    options = ["--read-only"] if read_only else []
    device = run(losetup, "--find", "--show", "--sector-size", str(sector), *options, file).strip()
    try:
        yield Path(device)
    finally:
        run(losetup, "--detach", device)


@contextmanager
def mounted(program: Program, kind: str, device: Path | str, folder: Path, options: str) -> Iterator[Path]:
    """A file system in `folder`. If it is busy in the end it goes as soon as it can, and that is an error."""
    folder.mkdir(exist_ok=True)
    mount, umount = program("mount", "mount"), program("umount", "mount")
    command = [mount, "-t", kind, "-o", options, str(device), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    if done.returncode != 0 and "unknown filesystem type" in done.stderr:
        pytest.skip(f"this kernel has no {kind}")
    assert done.returncode == 0, done.stderr
    try:
        yield folder
    finally:
        try:
            run(umount, folder)
        except BaseException:
            run(umount, "--lazy", folder)
            raise


def wait_until_free(device: Path) -> None:
    """Until no mount namespace that was made in the meantime (a sandbox's) has it mounted either. open(2): with
    O_EXCL a block device in use by the system fails with EBUSY; nothing tells when it no longer is.
    """
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


@contextmanager
def made_on_a_device(program: Program, kind: FileSystem, sector: int, folder: Path) -> Iterator[tuple[Path, Path]]:
    """(where it is mounted, its block device). Afterwards nothing may be wrong with it."""
    needs_root(f"{kind.name} on a loop device")
    (make, *options), (check, *check_options) = kind.make, kind.check
    make, check = program(make, kind.package), program(check, kind.package)
    image = folder / "image"
    image.touch()
    os.truncate(image, kind.size)
    with loop_device(program, image, sector=sector) as device:
        run(make, *options, device)
        with mounted(program, kind.name, device, folder / "mounted", kind.mount_options) as place:
            yield place, device
        wait_until_free(device)
        run(check, *check_options, device)
    image.unlink()


class FileSystems:
    """Those that were asked for, until `close`."""

    def __init__(self, program: Program, folder: Path) -> None:
        self._program = program
        self._folder = folder
        self._stack = ExitStack()
        self._places: dict[str, Path] = {}

    def place(self, name: str) -> Path:
        """A directory of the file system (a key of ON_A_DEVICE, or OVERLAY), or a skip that says what is missing."""
        if name not in self._places:
            folder = self._folder / name
            shutil.rmtree(folder, ignore_errors=True)  # an attempt that was skipped half-way
            folder.mkdir()
            self._places[name] = self._overlay(folder) if name == OVERLAY else self._on_a_device(name, folder)
        return self._places[name]

    def _on_a_device(self, name: str, folder: Path) -> Path:
        kind, sector = ON_A_DEVICE[name]
        return self._stack.enter_context(made_on_a_device(self._program, kind, sector, folder))[0]

    def _overlay(self, folder: Path) -> Path:
        """Over directories of ext4, as some overlay file systems cannot be beneath another."""
        below = self.place("ext4")
        parts = {name: below / name for name in ("lowerdir", "upperdir", "workdir")}
        for part in parts.values():
            part.mkdir()
        options = ",".join(f"{name}={part}" for name, part in parts.items())
        return self._stack.enter_context(mounted(self._program, OVERLAY, OVERLAY, folder, options))

    def close(self) -> None:
        """Unmounts and detaches all, and checks them."""
        self._stack.close()
