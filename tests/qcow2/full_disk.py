"""A small file system that can be full, with an image whose device reports events."""

from __future__ import annotations

import errno
import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from blkloom import Device
from blkloom.table import parse_table
from blkloom.targets.registry import all_targets
from conformance.file_systems import EXT4, made_on_a_device, mounted, needs_root

from . import qemu
from .attached import table_of

KIB = 1 << 10
MIB = 1 << 20
PATIENCE = 60.0
"""Seconds after which something does not happen any more."""


@dataclass
class SmallDisk:
    """folder: of its own file system."""

    folder: Path

    def fill(self) -> None:
        """Not a byte is left."""
        with (self.folder / "filler").open("ab", buffering=0) as file:
            for step in (MIB, 64 * KIB, 4 * KIB, 512):
                while _written(file.fileno(), step):
                    pass
            os.fsync(file.fileno())

    def free(self) -> None:
        """There is space again."""
        (self.folder / "filler").unlink(missing_ok=True)
        os.sync()


def _written(fd: int, length: int) -> bool:
    """Whether there was space for so much, or some of it."""
    try:
        return os.write(fd, b"f" * length) > 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False


@contextmanager
def small_disk(program: Callable[[str, str], str], kind: str, folder: Path) -> Iterator[SmallDisk]:
    """kind: tmpfs, or ext4 on a loop device."""
    needs_root(f"a small {kind}")
    if kind == "tmpfs":
        with mounted(program, "tmpfs", "none", folder / "small", "size=12m") as place:
            yield SmallDisk(place)
    else:
        with made_on_a_device(program, EXT4, 512, folder) as (place, _):
            yield SmallDisk(place)


@dataclass
class Attached:
    """An image as a device. events: what its users were told."""

    device: Device
    events: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    pool: ThreadPoolExecutor = field(default_factory=ThreadPoolExecutor)

    def begin(self, data: bytes, offset: int) -> Future[int]:
        """A write that may take long."""
        return self.pool.submit(self.device.pwrite, data, offset)

    def status(self) -> str:
        return self.device.status()[0][3]

    def say(self, *words: str) -> str | None:
        return self.device.message(0, list(words))  # type: ignore[arg-type]

    def until_parked(self, count: int) -> None:
        """So many requests wait; there is nothing else that tells of the second."""
        while f"parked={count} " not in self.status():
            pass


@contextmanager
def attached(path: Path, size: int, *options: str, fault_timeout: float = 30.0) -> Iterator[Attached]:
    events: queue.SimpleQueue[str] = queue.SimpleQueue()
    with (
        ThreadPoolExecutor(8) as pool,
        Device(
            parse_table(table_of(path, size, *options), targets=all_targets()),
            on_event=events.put,
            fault_timeout=fault_timeout,
        ) as device,
    ):
        yield Attached(device, events, pool)


def image(folder: Path, size: int, *, cluster: int = 64 * KIB, backing: Path | None = None, more: str = "") -> Path:
    """An empty one."""
    path = folder / "disk.qcow2"
    below = ["-b", str(backing), "-F", "raw"] if backing else []
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}{more}", *below, path, str(size))
    return path
