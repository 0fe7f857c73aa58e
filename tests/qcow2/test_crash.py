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

from .crashed import SHAPES, below_of, check, show_others
from .recording import SECTOR, Recorder, Watch
from .shapes import Shape, make, shapes
from .slow_image import SlowImage
from .workload import Workload

pytestmark = pytest.mark.usefixtures("qemu_tools")

CUTS = int(os.environ.get("BLKLOOM_FUZZ_CASES", "0")) or 240
"""Crashes a workload."""
EVERY = 40
"""One in so many is shown to QEMU, and to ourselves."""
ZERO_RANGE = 16
"""fallocate(2): FALLOC_FL_ZERO_RANGE."""

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
    below, before = below_of(made), [made.content[at : at + SECTOR] for at in range(0, size, SECTOR)]
    workload = Workload(made, seed, longest=longest, options=options)
    workload.run(steps)
    recorder, dice = workload.watch.recorder, random.Random(seed)
    last = len(recorder.log)
    for number in range(cuts):
        point = dice.randrange(last + 1)
        files = recorder.after_crash(point, dice if number % 8 else None)
        where = f"crash {number}, before event {point} of {last}"
        promise = workload.promised(point)
        image = check(files, below, before, promise, promise.allowed, where)
        if number % EVERY == 0:
            show_others(made, files, image, where)
    return recorder


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
