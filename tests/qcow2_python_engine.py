"""The engine's part of a QCOW2 image in Python, for tests of a `Writer` step by step without an engine.

`Disk` is a storage in memory that logs and fails on command. `Guest` looks requests up in the entries that it got, as
the engine does, and asks the writer on a fault.
"""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blkloom.image import cluster_entries
from blkloom.image.chain import Chain
from blkloom.image.format import WriteContext
from blkloom.image.layer import Layer
from blkloom.image.qcow2.state.image import Image
from blkloom.image.qcow2.state.layer import ImageLayer
from blkloom.image.qcow2.write.writer import Options, Writer
from blkloom.image.raw import RawLayer
from blkloom.image.types import Words

MOST_LOOKS = 8


@dataclass(eq=False)
class Disk:
    """log: (what, offset, length) of all that changed it. full_at: bytes it may have. fails: how many changes still
    succeed, None for all. holes: whether it can punch.
    """

    data: bytearray = field(default_factory=bytearray)
    path: str = "disk"
    log: list[tuple[str, int, int]] = field(default_factory=list)
    full_at: int = 1 << 62
    fails: int | None = None
    holes: bool = True

    def _change(self, what: str, offset: int = 0, length: int = 0) -> None:
        if self.fails is not None:
            if self.fails == 0:
                raise OSError(errno.EIO, "told to fail")
            self.fails -= 1
        self.log.append((what, offset, length))

    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length]).ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        self._change("write", offset, len(data))
        self.data.extend(bytes(max(offset + len(data) - len(self.data), 0)))
        self.data[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int) -> None:
        self._change("zero", offset, length)
        self.data.extend(bytes(max(offset + length - len(self.data), 0)))
        self.data[offset : offset + length] = bytes(length)

    def punch(self, offset: int, length: int) -> bool:
        if not self.holes:
            return False
        self._change("punch", offset, length)
        end = min(offset + length, len(self.data))
        self.data[offset:end] = bytes(max(end - offset, 0))
        return True

    def sync(self) -> None:
        self._change("sync")

    def truncate(self, size: int) -> None:
        if size > max(self.full_at, len(self.data)):
            raise OSError(errno.ENOSPC, "full")
        self._change("truncate", size)
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))

    def lay_out(self, offset: int, length: int) -> None:
        self._change("lay out", offset, length)

    def data_runs(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        for at in range(offset, offset + length, 512):
            if any(self.data[at : at + 512]):
                yield at, at + 512


def create(folder: Path, size: int, *options: str, name: str = "disk") -> Path:
    """An image by qemu-img; options as for its -o."""
    path = folder / f"{name}.qcow2"
    words = ["-o", ",".join(options)] if options else []
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *words, str(path), str(size)], check=True)
    return path


@dataclass(eq=False)
class QuickCopy:
    """How the engine copies a cluster that it would not write to. fails: whether storage does."""

    guest: Guest
    fails: bool = False

    def only_read(self, cluster: int) -> bool:
        return self._kind(cluster * self.guest.image.geometry.units_a_cluster) == 2

    def relocate(self, cluster: int, host: int, patch: bytes, patch_at: int) -> bool:
        size, per = self.guest.image.geometry.cluster, self.guest.image.geometry.units_a_cluster
        if any(self._kind(unit) not in (2, 3) for unit in range(cluster * per, (cluster + 1) * per)):
            return False
        if self.fails:
            raise OSError(errno.EIO, "told to fail")
        data = bytearray(self.guest.read(cluster * size, size))
        data[patch_at : patch_at + len(patch)] = patch
        self.guest.disk.write(host, bytes(data))
        return True

    def _kind(self, unit: int) -> int:
        return self.guest.entry(unit) >> 61


class Guest:
    """A disk over the bytes of an image. backing: of a raw file below. together: writes that were prepared with others
    and found their places ready.
    """

    def __init__(
        self, image: bytes, *, backing: bytes | None = None, options: Options | None = None, **arguments: Any
    ) -> None:
        self.disk = Disk(bytearray(image))
        self.image = Image.open(self.disk, writable=True)  # type: ignore[arg-type]
        top = ImageLayer(0, self.image)
        layers: list[Layer] = [top]
        if backing is not None:
            layers.append(RawLayer(1, Disk(bytearray(backing), "backing")))  # type: ignore[arg-type]
        self.chain = Chain(layers, [])
        self.entries: dict[int, int] = {}
        self.faults = 0
        self.synchronized = 0
        self.together = 0
        self.quick_copy = QuickCopy(self)
        context = WriteContext(
            read=self.chain.read,
            install=self._install,
            synchronize=self._synchronize,
            below=self.chain if backing is not None else None,
            relocation=self.quick_copy,
            broke=self.entries.clear,
            **arguments,
        )
        self.writer = Writer(self.image, context, options or Options())
        top.writable, top.guarded = True, self.writer.guarded
        self._bits = self.image.geometry.unit_bits

    @property
    def size(self) -> int:
        return self.image.size

    def write(self, offset: int, data: bytes) -> None:
        for _ in range(MOST_LOOKS):
            at = 0
            while at < len(data):
                unit, within = divmod(offset + at, 1 << self._bits)
                length = min((1 << self._bits) - within, len(data) - at)
                entry = self.entry(unit)
                if entry >> 61 != 1:
                    break
                host = ((entry & (1 << 49) - 1) << 9) + within
                assert host + length <= self.disk.size(), "the engine finds no end of file where it is sent"
                self.disk.write(host, data[at : at + length])
                at += length
            else:
                return
            self.faults += 1
            if self.writer.prepare_write(offset, len(data), lambda: data):
                return
        raise AssertionError("it faults again and again")

    def prepare_together(self, writes: list[tuple[int, int]]) -> list[int]:
        """Those of the writes that the engine would ask about, prepared with one call; which of them are ready."""
        asked = [number for number, write in enumerate(writes) if not self._leads_to_data(*write)]
        found = [asked[ready] for ready in self.writer.prepare_writes([writes[number] for number in asked])]
        self.together += len(found)
        assert len(found) == len(set(found))
        assert all(self._leads_to_data(*writes[number]) for number in found), "they are ready"
        return found

    def write_together(self, writes: list[tuple[int, bytes]]) -> None:
        """They come at the same time, and are written in their order."""
        self.prepare_together([(offset, len(data)) for offset, data in writes])
        for offset, data in writes:
            self.write(offset, data)

    def _leads_to_data(self, offset: int, length: int) -> bool:
        units = range(offset >> self._bits, -(-(offset + length) >> self._bits))
        return all(self.entry(unit) >> 61 == 1 for unit in units)

    def read(self, offset: int, length: int) -> bytes:
        return self.chain.read(offset, length)

    def check_all(self) -> None:
        """The background check, to its end."""
        while self.writer.work():
            pass

    def flush(self) -> None:
        self.disk.sync()
        self.writer.flush()

    def crash(self) -> bytes:
        """The image as it is without anybody having closed it."""
        return bytes(self.disk.data)

    def close(self) -> bytes:
        self.writer.close()
        return bytes(self.disk.data)

    def entry(self, unit: int) -> int:
        if unit not in self.entries:
            self.entries[unit] = int(self.chain.entries(unit, 1)[0])
        return self.entries[unit]

    def _install(self, first: int, entries: Words) -> None:
        limit = -(-self.size >> self._bits)
        self.entries.update((unit, entry) for unit, entry in enumerate(entries.tolist(), first) if unit < limit)
        for unit in range(first, min(first + entries.size, limit)):
            if self.entries[unit] == int(cluster_entries.SHOWS_THROUGH):
                del self.entries[unit]

    def _synchronize(self) -> None:
        self.synchronized += 1


def check(image: bytes, folder: Path) -> str:
    """What `qemu-img check` says against it, "" for nothing at all."""
    path = folder / "checked.qcow2"
    path.write_bytes(image)
    done = subprocess.run(["qemu-img", "check", "-f", "qcow2", str(path)], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def allocated(guest: Guest) -> int:
    """Guest clusters that have a place."""
    units = guest.image.units(0, -(-guest.size >> guest.image.geometry.unit_bits))
    per = guest.image.geometry.units_a_cluster
    return int(np.count_nonzero((units.offsets != 0)[::per]))
