"""A power failure at any time, with any part of the unsynced writes lost, leaves a consistent image.

A device works on an image while all changes of its files are recorded. Then the files are rebuilt as a crash may leave
them, at many points of the record. For each: there is no corruption (leaks are allowed; refcounts may be too low only
with the dirty bit); every sector has the data of the last completed flush or of a later write; and a bitmap without
in_use includes every change. The slow model checks this; `qemu-img check` checks the slow model on some of the images.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from blkloom.image.qcow2.write.writer import Writer
from blkloom.image.storage import FileStorage
from blkloom.image.types import HostOffset

from . import qemu
from .attached import attached, first_difference, read_all
from .recording import SECTOR, Recorder, Watch
from .shapes import Made, Shape, make, shapes
from .slow_image import SlowImage
from .workload import Promise, Workload

pytestmark = pytest.mark.usefixtures("qemu_tools")

CUTS = int(os.environ.get("BLKLOOM_FUZZ_CASES", "0")) or 240
"""Crashes a workload."""
EVERY = 40
"""One in so many is shown to QEMU, and to ourselves."""
AUTO, IN_USE = 2, 1
ZERO_RANGE = 16
"""fallocate(2): FALLOC_FL_ZERO_RANGE."""

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
    "bitmap, snapshot, lazy": Shape(cluster_bits=10, bitmap=True, snapshots=1, lazy=True),
    "data file, extended, backed, lazy": Shape(
        cluster_bits=14, data_file="cooked", extended=True, backing="raw", lazy=True
    ),
    "extended, compressed, lazy": Shape(
        cluster_bits=14, extended=True, compressed=True, compression="zstd", lazy=True, snapshots=1
    ),
    "v2, backed, snapshot": Shape(version=2, cluster_bits=10, backing="raw", snapshots=1),
}
OPTIONS = ["preallocate=0", "compact_zeroes", "discard=ignore"]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", SHAPES)
def test_no_crash_corrupts_the_image_or_loses_what_was_flushed(tmp_path: Path, kind: str, seed: int) -> None:
    shape = SHAPES[kind]
    size = 96 * shape.cluster if shape.cluster < 4096 else 192 << 10
    options = (random.Random(kind).choice(OPTIONS),) if seed else ()
    _crash(tmp_path, shape, *options, seed=seed, steps=50, cuts=CUTS, size=size)


def _crash(
    folder: Path, shape: Shape, *options: str, seed: int, steps: int, cuts: int, size: int = 192 << 10, longest: int = 0
) -> Recorder:
    """Runs a workload and crashes it. options, longest: see `Workload`."""
    made = make(folder, shape, size=size, seed=seed, steps=4)
    below, before = _below(made), [made.content[at : at + SECTOR] for at in range(0, size, SECTOR)]
    workload = Workload(made, seed, longest=longest, options=options)
    workload.run(steps)
    recorder, dice = workload.watch.recorder, random.Random(seed)
    last = len(recorder.log)
    for number in range(cuts):
        point = dice.randrange(last + 1)
        files = recorder.after_crash(point, dice if number % 8 else None)
        where = f"crash {number}, before event {point} of {last}"
        image = _check(files, below, before, workload.promised(point), where)
        if number % EVERY == 0:
            _show_others(made, files, image, where)
    return recorder


def _check(
    files: dict[str, bytes],
    below: bytes,
    before: list[bytes],
    promise: Promise,
    where: str,
) -> SlowImage:
    image = SlowImage(files["image"], data_file=files.get("data"), backing=below)
    found = image.check()
    assert not found.corruptions, f"{where}: {found.corruptions[:3]}"
    assert not found.shared, f"{where}: {found.shared[:3]}"
    content = image.content()
    for number, values in enumerate(promise.allowed):
        piece = content[number * SECTOR : (number + 1) * SECTOR]
        assert piece in values, (
            f"{where}: sector {number:#x} is {piece[:8].hex()}, and may be {sorted(v[:8].hex() for v in values)}"
        )
    assert {snapshot.name for snapshot in image.snapshots()} == promise.snapshots.keys(), where
    for snapshot in image.snapshots():
        difference = first_difference(image.content(snapshot), promise.snapshots[snapshot.name])
        assert not difference, f"{where}: snapshot {snapshot.name!r}: {difference}"
    for bitmap in image.bitmaps():
        if bitmap.flags & AUTO and not bitmap.flags & IN_USE and image.autoclear & 1:
            dirty = image.dirty_ranges(bitmap)
            per = (1 << bitmap.granularity) // SECTOR
            missed = [n for n in promise.changed if before[n] not in promise.allowed[n] and not dirty[n // per]]
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
# A cluster that held several compressed ones is used again for one, and its count on disk is behind.
@example(shape=Shape(cluster_bits=13, refcount_bits=32, compressed=True, lazy=True, bitmap=True), seed=25996)
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


@pytest.mark.parametrize("kind", ["v2, backed, snapshot", "bitmap", "raw data file", "extended, backed, snapshot"])
def test_no_sector_is_written_from_two_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The kernel may stop between them, for instance at zeros never touched, and then half a sector may reach the disk
    alone: what the crashes above leave out.
    """
    pwrite, fallocate, torn = os.pwrite, FileStorage._fallocate, list[str]()
    zeroed = 0

    def watched(fd: int, data: bytes, offset: int) -> int:
        address = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
        if (address - offset) % mmap.PAGESIZE:
            torn.append(f"{len(data)} bytes at {offset:#x} of {os.readlink(f'/proc/self/fd/{fd}')}")
        return pwrite(fd, data, offset)

    def without_zero_range(storage: FileStorage, mode: int, offset: int, length: int) -> None:
        nonlocal zeroed
        if mode == ZERO_RANGE:
            zeroed += 1
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        fallocate(storage, mode, offset, length)

    monkeypatch.setattr(os, "pwrite", watched)
    monkeypatch.setattr(FileStorage, "_fallocate", without_zero_range)
    made = make(tmp_path, SHAPES[kind], size=192 << 10, seed=0, steps=4)
    Workload(made, 0).run(50)
    assert not torn
    assert zeroed or kind != "v2, backed, snapshot", "zeros are written there"


def test_the_recorder_rebuilds_what_was_there_when_nothing_is_lost(tmp_path: Path) -> None:
    made = make(tmp_path, SHAPES["plain"], size=192 << 10)
    workload = Workload(made, 1)
    workload.run(20)
    recorder = workload.watch.recorder
    assert recorder.after_crash(len(recorder.log), None)["image"] == made.path.read_bytes()


def test_the_recorder_never_takes_what_the_device_has_replaced_meanwhile_for_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device writes by itself while the test reads the record: it has exactly these writes, in their order."""
    path = tmp_path / "image"
    path.write_bytes(bytes(SECTOR))
    watch = Watch({"image": path})
    read, values = Path.read_bytes, [bytes([number]) * SECTOR for number in range(1, 4)]
    with path.open("r+b") as file, watch:
        storage = FileStorage(file.fileno(), str(path))
        device = threading.Thread(target=lambda: [storage.write(HostOffset(0), value) for value in values])

        looks = 0

        def meanwhile(read_path: Path) -> bytes:
            nonlocal looks
            found = read(read_path)
            if threading.current_thread() is not device:
                looks += 1
                if looks == 2:  # it has seen that the file is what it is
                    device.start()
                    device.join(0.2)  # until it is done, or waits for the reader of the record
            return found

        monkeypatch.setattr(Path, "read_bytes", meanwhile)
        os.pwrite(file.fileno(), b"\xee" * SECTOR, 0)  # as the engine does
        watch.look()
        device.join()
    assert [event.data for event in watch.recorder.log] == [b"\xee" * SECTOR, *values]
