"""The power goes: at any instant, with any part of what was not synced lost, the image stays whole.

A device works on an image while everything that reaches its files is recorded. Then the files are
rebuilt as a crash at many points of that record may leave them, and each must satisfy: no corruption
(leaks are allowed; counts may be behind only under the dirty bit), every sector reads as the last
completed flush left it or as something written since, and a bitmap that does not say in_use knows
of every change. The judge is the slow model, whose own judge is `qemu-img check` on some of them.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import blkloom
from blkloom.qcow2.writer import Writer

from . import qemu
from .attached import attached, read_all, table_of
from .recording import SECTOR, Recorder, Watch
from .shapes import Made, Shape, make, shapes
from .slow_image import SlowImage

CUTS = int(os.environ.get("BLKLOOM_FUZZ_CASES", "0")) or 240
"""Crashes a workload."""
EVERY = 40
"""One in so many is shown to QEMU, and to ourselves."""
AUTO, IN_USE = 2, 1

SHAPES = {
    "plain": Shape(cluster_bits=12),
    "tiny clusters, wide counts": Shape(cluster_bits=9, refcount_bits=64),
    "tiny clusters, one bit": Shape(cluster_bits=9, refcount_bits=1),
    "v2": Shape(version=2, cluster_bits=10),
    "snapshots": Shape(cluster_bits=10, snapshots=2),
    "snapshots, tiny": Shape(cluster_bits=9, snapshots=1, refcount_bits=8),
    "compressed": Shape(cluster_bits=12, compressed=True, snapshots=1),
    "extended": Shape(cluster_bits=14, extended=True),
    "extended, backed, snapshot": Shape(cluster_bits=14, extended=True, backing="raw", snapshots=1),
    "backed": Shape(cluster_bits=12, backing="qcow2", backing_fit="shorter"),
    "data file": Shape(cluster_bits=12, data_file="cooked"),
    "raw data file": Shape(cluster_bits=12, data_file="raw"),
    "lazy": Shape(cluster_bits=12, lazy=True),
    "lazy, tiny, snapshot": Shape(cluster_bits=9, lazy=True, snapshots=1),
    "bitmap": Shape(cluster_bits=12, bitmap=True),
}


@pytest.fixture(scope="module", autouse=True)
def _tools(program: Callable[[str, str], str]) -> None:
    for name in ("qemu-img", "qemu-io"):
        program(name, "qemu-utils")


class Sectors:
    """For each sector what a crash may leave: what the last flush covered, and all that was written since."""

    def __init__(self, content: bytes) -> None:
        self.allowed = [{content[at : at + SECTOR]} for at in range(0, len(content), SECTOR)]
        self.now = [next(iter(values)) for values in self.allowed]
        self.changed: set[int] = set()

    def write(self, offset: int, data: bytes) -> None:
        for at in range(0, len(data), SECTOR):
            number = (offset + at) // SECTOR
            self.now[number] = data[at : at + SECTOR]
            self.allowed[number].add(self.now[number])
            self.changed.add(number)

    def flushed(self) -> None:
        self.allowed = [{value} for value in self.now]

    def frozen(self) -> list[frozenset[bytes]]:
        return [frozenset(values) for values in self.allowed]


class Workload:
    """A guest's requests and what they promise. promises: from that point of the record on, what each sector
    may hold, and which sectors had been changed since the beginning.
    """

    def __init__(self, made: Made, seed: int, *, longest: int = 0) -> None:
        self.made = made
        cluster = max(made.shape.cluster // SECTOR, 1)
        self._lengths = [range(1, longest)] if longest else [[1, cluster, 2 * cluster], range(1, 3 * cluster + 1)]
        self._dice = random.Random(seed)
        self._sectors = Sectors(made.content)
        paths = {"image": made.path} | ({"data": made.data_file} if made.shape.data_file else {})
        self.watch = Watch(paths)
        self.promises: list[tuple[int, list[frozenset[bytes]], frozenset[int]]] = []
        self._promise()

    def run(self, steps: int) -> None:
        with self.watch:
            device = blkloom.open(table_of(self.made.path, self.made.size))
            for number in range(steps):
                self._step(device, number)
                if self._dice.random() < 0.04:
                    self.watch.engine_syncs()
                    device.suspend()
                    self._settled()
                    device.resume()
            self.watch.engine_syncs()
            device.close()
            self._settled()

    def _step(self, device: blkloom.Device, number: int) -> None:
        kind = self._dice.choice(["write"] * 6 + ["zeroes", "unmap", "discard", "discard", "flush"])
        if kind == "flush":
            self.watch.engine_syncs()
            device.flush()
            self._settled()
            return
        count = self.made.size // SECTOR
        cluster = max(self.made.shape.cluster // SECTOR, 1)
        first = self._dice.choice([self._dice.randrange(count), self._dice.randrange(count) // cluster * cluster])
        length = min(self._dice.choice(self._dice.choice(self._lengths)), count - first)
        at, size = first * SECTOR, length * SECTOR
        # A request under way may have happened in part when the power goes.
        if kind == "write":
            data = b"".join(_sector(number, first + n) for n in range(length))
            self._sectors.write(at, data)
            self._promise()
            device.pwrite(data, at)
        elif kind in ("zeroes", "unmap"):
            self._sectors.write(at, bytes(size))
            self._promise()
            device.write_zeroes(at, size, unmap=kind == "unmap")
        else:
            before = list(self._sectors.now)
            self._sectors.write(at, bytes(size))
            self._promise()
            device.discard(at, size)
            found = device.pread(size, at)
            for n in range(length):
                piece = found[n * SECTOR : (n + 1) * SECTOR]
                assert piece in (bytes(SECTOR), before[first + n]), "a discard made something up"
                self._sectors.now[first + n] = piece
        self.watch.look()

    def _settled(self) -> None:
        """A flush has completed."""
        self.watch.look()
        self._sectors.flushed()
        self._promise()

    def _promise(self) -> None:
        at = len(self.watch.recorder.log)
        self.promises.append((at, self._sectors.frozen(), frozenset(self._sectors.changed)))

    def promised(self, point: int) -> tuple[list[frozenset[bytes]], frozenset[int]]:
        """What holds after a crash right before event `point`: what was promised last when it happened."""
        _, allowed, changed = [promise for promise in self.promises if promise[0] <= point][-1]
        return allowed, changed


def _sector(operation: int, number: int) -> bytes:
    """Unlike any other."""
    return (operation.to_bytes(4, "big") + number.to_bytes(4, "big")) * (SECTOR // 8)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", SHAPES)
def test_no_crash_corrupts_the_image_or_loses_what_was_flushed(tmp_path: Path, kind: str, seed: int) -> None:
    shape = SHAPES[kind]
    size = 96 * shape.cluster if shape.cluster < 4096 else 192 << 10
    _crash(tmp_path, shape, seed=seed, steps=50, cuts=CUTS, size=size)


def _crash(
    folder: Path, shape: Shape, *, seed: int, steps: int, cuts: int, size: int = 192 << 10, longest: int = 0
) -> Recorder:
    """Runs a workload and crashes it. longest: sectors a request has at most, three clusters unless given."""
    made = make(folder, shape, size=size, seed=seed, steps=4)
    below, before = _below(made), [made.content[at : at + SECTOR] for at in range(0, size, SECTOR)]
    workload = Workload(made, seed, longest=longest)
    workload.run(steps)
    recorder, dice = workload.watch.recorder, random.Random(seed)
    last = len(recorder.log)
    for number in range(cuts):
        point = dice.randrange(last + 1)
        files = recorder.after_crash(point, dice if number % 8 else None)
        where = f"crash {number}, before event {point} of {last}"
        image = _check(files, below, before, *workload.promised(point), where)
        if number % EVERY == 0:
            _show_others(made, files, image, where)
    return recorder


def _check(
    files: dict[str, bytes],
    below: bytes,
    before: list[bytes],
    allowed: list[frozenset[bytes]],
    changed: frozenset[int],
    where: str,
) -> SlowImage:
    image = SlowImage(files["image"], data_file=files.get("data"), backing=below)
    found = image.check()
    assert not found.corruptions, f"{where}: {found.corruptions[:3]}"
    assert not found.shared, f"{where}: {found.shared[:3]}"
    content = image.content()
    for number, values in enumerate(allowed):
        piece = content[number * SECTOR : (number + 1) * SECTOR]
        assert piece in values, (
            f"{where}: sector {number:#x} is {piece[:8].hex()}, and may be {sorted(v[:8].hex() for v in values)}"
        )
    for bitmap in image.bitmaps():
        if bitmap.flags & AUTO and not bitmap.flags & IN_USE and image.autoclear & 1:
            dirty = image.dirty_ranges(bitmap)
            per = (1 << bitmap.granularity) // SECTOR
            missed = [n for n in changed if before[n] not in allowed[n] and not dirty[n // per]]
            assert not missed, f"{where}: bitmap {bitmap.name!r} does not know of sectors {missed[:5]}"
    return image


def _below(made: Made) -> bytes:
    """What a guest reads of the backing image."""
    for path in made.path.parent.glob("disk-base.*"):
        return path.read_bytes() if path.suffix == ".raw" else qemu.content(path)
    return b""


def _show_others(made: Made, files: dict[str, bytes], image: SlowImage, where: str) -> None:
    """QEMU and we ourselves must find the same in the crashed image as the slow model."""
    kept = {path: path.read_bytes() for path in [made.path, made.data_file] if path.exists()}
    made.path.write_bytes(files["image"])
    if "data" in files:
        made.data_file.write_bytes(files["data"])
    try:
        content = image.content()
        if image.dirty:
            found = qemu.check(made.path, repair="all")
        else:
            found = qemu.check(made.path)
            assert not found.corruptions, f"{where}: {found.said}"
        assert not found.errors, f"{where}: {found.said}"
        assert qemu.content(made.path) == content, where
        made.path.write_bytes(files["image"])
        with attached(made.path, made.size) as device:
            assert read_all(device) == content, f"{where}: we read something else"
            device.pwrite(b"\xee" * 4096, made.size // 2 // SECTOR * SECTOR)
        after = qemu.check(made.path)
        assert not after.corruptions, f"{where}, written to after it: {after.said}"
        assert not after.errors, f"{where}, written to after it: {after.said}"
        if image.dirty:
            assert not after.leaks, f"{where}: a dirty image was not put right: {after.said}"
    finally:
        for path, data in kept.items():
            path.write_bytes(data)


@settings(
    max_examples=max(settings().max_examples // 10, 1), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(shape=shapes(largest_cluster_bits=14), seed=st.integers(0, 1 << 30))
def test_no_crash_corrupts_any_other_kind_of_image(shape: Shape, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _crash(Path(folder), shape, seed=seed, steps=40, cuts=60, size=min(96 * shape.cluster, 256 << 10))


def test_neither_does_a_crash_while_tables_are_written_back_without_being_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writer, "_limit", Writer.flush)
    for kind in ("plain", "snapshots, tiny", "lazy", "backed"):
        folder = tmp_path / kind.replace(", ", "-")
        folder.mkdir()
        _crash(folder, SHAPES[kind], seed=7, steps=30, cuts=CUTS // 2)


def test_neither_does_a_crash_while_the_refcount_table_moves(tmp_path: Path) -> None:
    shape = Shape(cluster_bits=9, refcount_bits=64, snapshots=1)
    recorder = _crash(tmp_path, shape, seed=3, steps=24, cuts=CUTS // 4, size=3 << 20, longest=2000)
    first, last = SlowImage(recorder.initial["image"]), SlowImage(bytes(recorder.files["image"]))
    assert last.table_offset != first.table_offset, "the workload is too small"


def test_the_recorder_rebuilds_what_was_there_when_nothing_is_lost(tmp_path: Path) -> None:
    made = make(tmp_path, SHAPES["plain"], size=192 << 10)
    workload = Workload(made, 1)
    workload.run(20)
    recorder = workload.watch.recorder
    assert recorder.after_crash(len(recorder.log), None)["image"] == made.path.read_bytes()
