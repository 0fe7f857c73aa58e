"""A workload on an image whose writes and syncs are recorded, and the data that must be there after a crash."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

import blkloom
from blkloom.targets.descriptors import OwnDescriptors
from blkloom.units import Bytes

from . import qemu
from .attached import table_of
from .recording import REDO_LOG, SECTOR, Watch
from .shapes import Made

_KINDS = [
    *["write"] * 6,
    *["together"] * 2,
    *("fua", "zeroes", "unmap", "fua zeroes", "discard", "discard", "flush"),
]
_MAINTAINED = 0.05
"""How often the device is suspended."""


class Sectors:
    """For each sector what a crash may leave: what the last flush covered, and all that was written since."""

    def __init__(self, content: bytes) -> None:
        self.allowed = [{content[at : at + SECTOR]} for at in range(0, len(content), SECTOR)]
        self.now = [next(iter(values)) for values in self.allowed]
        self.changed: set[int] = set()

    def write(self, offset: int, data: bytes) -> None:
        """It is about to be, and may happen in part."""
        for at in range(0, len(data), SECTOR):
            number = (offset + at) // SECTOR
            self.now[number] = data[at : at + SECTOR]
            self.allowed[number].add(self.now[number])
            self.changed.add(number)

    def durable(self, first: int = 0, end: int | None = None) -> None:
        """What was written to sectors [first, end) stays."""
        self.allowed[first:end] = [{value} for value in self.now[first:end]]

    def frozen(self) -> list[frozenset[bytes]]:
        """What each may hold as things are."""
        return [frozenset(values) for values in self.allowed]


@dataclass(frozen=True)
class Promise:
    """What holds from event `since` of the record on. allowed: what each sector may hold after a power failure.
    completed: the same after the process was killed. changed: sectors that may have changed since the beginning.
    snapshots: what they show.
    """

    since: int
    allowed: list[frozenset[bytes]]
    completed: list[frozenset[bytes]]
    changed: frozenset[int]
    snapshots: dict[str, bytes]


@contextmanager
def redo_log_of(content: bytes) -> Iterator[None]:
    """Gives images that are opened in the block a redo log with this content, as a worker does."""
    memory = os.memfd_create("redo-log")
    try:
        os.write(memory, content)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OwnDescriptors, "changes", lambda _: os.dup(memory))
            yield
    finally:
        os.close(memory)


class Workload:
    """A guest's requests and its keeper's snapshots, and what they promise. longest: sectors a request has at most,
    three clusters unless given. options: of the table. redo_log: what a former process has left there.
    """

    def __init__(
        self, made: Made, seed: int, *, longest: int = 0, options: tuple[str, ...] = (), redo_log: bytes = b""
    ) -> None:
        self.made = made
        cluster = max(made.shape.cluster // SECTOR, 1)
        self._lengths = [range(1, longest)] if longest else [[1, cluster, 2 * cluster], range(1, 3 * cluster + 1)]
        self._dice = random.Random(seed)
        self._sectors = Sectors(made.content)
        self._completed = Sectors(made.content)
        self._snapshots = dict(made.snapshots)
        self._options = options
        paths = {"image": made.path} | ({"data": made.data_file} if made.shape.data_file else {})
        self.watch = Watch(paths, redo_log)
        self.promises: list[Promise] = []
        self._promise()

    def run(self, steps: int) -> None:
        """That many requests on a device that is closed at the end."""
        with self.watch, self._memory():
            device = blkloom.open(table_of(self.made.path, self.made.size, *self._options))
            for number in range(steps):
                self._step(device, number)
                if self._dice.random() < _MAINTAINED:
                    self.watch.engine_syncs()
                    device.suspend()
                    self._settled()
                    self._keep(number)
                    device.resume()
            self.watch.engine_syncs()
            device.close()
            self._settled()

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """Gives the image a redo log, as in a worker."""
        with redo_log_of(bytes(self.watch.recorder.files[REDO_LOG])):
            yield

    def promised(self, point: int) -> Promise:
        """What holds after a crash right before event `point`: what was promised last when it happened."""
        return next(promise for promise in reversed(self.promises) if promise.since <= point)

    def _step(self, device: blkloom.Device, number: int) -> None:
        kind = self._dice.choice(_KINDS)
        if kind == "flush":
            device.flush()
            self._settled()
            return
        count = self.made.size // SECTOR
        cluster = max(self.made.shape.cluster // SECTOR, 1)
        first = self._dice.choice([self._dice.randrange(count), self._dice.randrange(count) // cluster * cluster])
        length = min(self._dice.choice(self._dice.choice(self._lengths)), count - first)
        at, size = first * SECTOR, length * SECTOR
        if kind == "together":
            self._write_together(device, number, length)
            return
        fua = kind.startswith("fua")
        # A request under way may have happened in part when the power goes.
        if kind in ("write", "fua"):
            data = b"".join(_sector(number, first + n) for n in range(length))
            self._begin(at, data)
            device.pwrite(data, at, fua=fua)
        elif kind in ("zeroes", "unmap", "fua zeroes"):
            self._begin(at, bytes(size))
            device.write_zeroes(at, size, unmap=kind == "unmap", fua=fua)
        else:
            self._discard(device, first, length)
        self.watch.look()
        if fua:
            self._sectors.durable(first, first + length)
        self._completed.durable(first, first + length)
        self._promise()

    def _begin(self, offset: int, data: bytes) -> None:
        """A write begins."""
        for sectors in (self._sectors, self._completed):
            sectors.write(offset, data)
        self._promise()

    def _write_together(self, device: blkloom.Device, number: int, length: int) -> None:
        """Several writes whose faults the mapper thread finds together; they are made one after the other, which is an
        order that they may have, and the only one that can be recorded.
        """
        count = self.made.size // SECTOR
        places = [self._dice.randrange(count) for _ in range(self._dice.choice([2, 12]))]
        writes = [(first, min(length, count - first)) for first in places]
        asked = [(first * SECTOR, size * SECTOR) for first, size in writes]
        mapper = device._mapper
        target = next(iter(mapper._owners.values())).target
        mapper.ask(lambda: target.prepare_writes([(Bytes(at), Bytes(size)) for at, size in asked]))
        self.watch.look()
        for (first, size), (at, _) in zip(writes, asked, strict=True):
            data = b"".join(_sector(number, first + n) for n in range(size))
            self._begin(at, data)
            device.pwrite(data, at)
            self.watch.look()
            self._completed.durable(first, first + size)
            self._promise()

    def _discard(self, device: blkloom.Device, first: int, length: int) -> None:
        at, size = first * SECTOR, length * SECTOR
        before = list(self._sectors.now)
        self._begin(at, bytes(size))
        device.discard(at, size)
        found = device.pread(size, at)
        for n in range(length):
            piece = found[n * SECTOR : (n + 1) * SECTOR]
            assert piece in (bytes(SECTOR), before[first + n]), "a discard made something up"
            self._sectors.now[first + n] = self._completed.now[first + n] = piece

    def _keep(self, number: int) -> None:
        """QEMU has the image: takes or deletes a snapshot, where it can have one."""
        path, shape = self.made.path, self.made.shape
        most = 0 if shape.data_file else 1 if shape.refcount_bits == 2 and not shape.compressed else 2
        if shape.refcount_bits == 1 or (shape.refcount_bits < 8 and shape.compressed):
            most = 0
        if len(self._snapshots) < most:
            qemu.qemu_img("snapshot", "-c", f"k{number}", path)
            self._snapshots[f"k{number}"] = b"".join(self._sectors.now)
        elif self._snapshots and most:
            name = self._dice.choice(sorted(self._snapshots))
            qemu.qemu_img("snapshot", "-d", name, path)
            del self._snapshots[name]
        self.watch.maintained()
        self._promise()

    def _settled(self) -> None:
        """A flush has completed."""
        self.watch.look()
        self._sectors.durable()
        self._promise()

    def _promise(self) -> None:
        at = len(self.watch.recorder.log)
        changed = frozenset(self._sectors.changed)
        self.promises.append(
            Promise(at, self._sectors.frozen(), self._completed.frozen(), changed, dict(self._snapshots))
        )


def _sector(operation: int, number: int) -> bytes:
    """Unlike any other."""
    return (operation.to_bytes(4, "big") + number.to_bytes(4, "big")) * (SECTOR // 8)
