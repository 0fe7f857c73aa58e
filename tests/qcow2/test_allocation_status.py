"""base:allocation of an image: the same as from qemu-nbd, and the same before and after data was read."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blkloom import Device
from blkloom.image import allocation_status
from blkloom.image.qcow2.format.tables import Units
from blkloom.image.qcow2.state.image import Image
from blkloom.image.storage import FileStorage
from blkloom.image.types import HostOffset

from . import qemu
from .attached import attached, read_all
from .test_block_status import Runs, by_qemu, make_chain

ALLOCATION = "base:allocation"
MIB = 1 << 20
KIB = 1 << 10
SIZE = 64 * MIB
DATA, ZERO = 0, 2


@pytest.fixture(scope="module", autouse=True)
def _tools(program: Callable[[str, str], str]) -> None:
    for name in ("qemu-img", "qemu-io", "qemu-nbd"):
        program(name, "qemu-utils")
    program("nbdinfo", "libnbd-bin")


def zeros(runs: Runs) -> Runs:
    """Of each byte only whether it reads as zeros: QEMU keeps holes apart that have a place in the file."""
    found: Runs = []
    for offset, length, flags in runs:
        if found and found[-1][2] == flags & ZERO:
            start, before, _ = found.pop()
            found.append((start, before + length, flags & ZERO))
        else:
            found.append((offset, length, flags & ZERO))
    return found


def create(path: Path, *options: str, size: int = SIZE) -> Path:
    qemu.qemu_img("create", "-q", "-f", "qcow2", *options, path, str(size))
    return path


def preallocated(folder: Path, how: str) -> Path:
    path = create(folder / f"{how}.qcow2", "-o", f"preallocation={how}")
    qemu.qemu_io(path, "write -P 1 1M 200k", "write -P 2 40M 124k")
    return path


def over_a_sparse_raw_file(folder: Path) -> Path:
    with (folder / "base.raw").open("wb") as base:
        base.truncate(SIZE - 3 * MIB)
        for at in (0, 5 * MIB, 20 * MIB + 8192):
            os.pwrite(base.fileno(), b"x" * 70000, at)
    path = create(folder / "top.qcow2", "-b", str(folder / "base.raw"), "-F", "raw")
    qemu.qemu_io(path, "write -P 1 6M 100k", "write -z 20M 1M")
    return path


def over_a_preallocated_image(folder: Path) -> Path:
    path = create(folder / "top.qcow2", "-b", str(preallocated(folder, "metadata")), "-F", "qcow2")
    qemu.qemu_io(path, "write -P 3 39M 64k")
    return path


def with_a_data_file(folder: Path) -> Path:
    path = create(folder / "disk.qcow2", "-o", f"data_file={folder / 'disk.data'},preallocation=metadata")
    qemu.qemu_io(path, "write -P 1 1M 200k")
    return path


def scattered(folder: Path) -> Path:
    """Neighbours on the disk lie anywhere in the file, and the file has holes in some of them."""
    path, dice = create(folder / "disk.qcow2", size=SIZE), random.Random(24)
    order = dice.sample(range(SIZE // (64 * KIB)), 300)
    qemu.qemu_io(path, *(f"write -P {number % 255 + 1} {number * 64}k 64k" for number in order))
    with path.open("r+b", buffering=0) as file:
        storage = FileStorage(file.fileno(), str(path))
        mapped = json.loads(qemu.qemu_img("map", "--output=json", path))
        places = [run["offset"] + at for run in mapped if run["data"] for at in range(0, run["length"], 64 * KIB)]
        for place in dice.sample(places, 60):
            assert storage.punch(HostOffset(place + dice.choice([0, 8192])), dice.choice([4096, 56 * KIB]))
    return path


IMAGES: dict[str, Callable[[Path], Path]] = {
    "preallocated metadata": lambda folder: preallocated(folder, "metadata"),
    "preallocated in full": lambda folder: preallocated(folder, "full"),
    "over a sparse raw file": over_a_sparse_raw_file,
    "over a preallocated image": over_a_preallocated_image,
    "with a data file": with_a_data_file,
    "scattered": scattered,
}
SAME_AS_QEMU = ["preallocated metadata", "over a sparse raw file", "over a preallocated image"]
"""QEMU asks the file about raw files, and about images that look like preallocated ones."""


@pytest.fixture
def stingy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions are answered in small parts."""
    for name in ("_MOST_LOOKS", "_A_LOOK"):
        monkeypatch.setattr(allocation_status, name, 1)


def same_after_reads(device: Device) -> Runs:
    fresh = device.extents()
    assert sum(length for _, length, _ in fresh) == device.size
    dice = random.Random(device.size)
    for _ in range(8):
        at = dice.randrange(device.size // 512) * 512
        device.pread(min(70 * KIB, device.size - at), at)
        assert device.extents() == fresh
    read_all(device)
    assert device.extents() == fresh
    return fresh


@pytest.mark.parametrize("kind", IMAGES)
def test_a_read_changes_nothing(tmp_path: Path, kind: str) -> None:
    path = IMAGES[kind](tmp_path)
    with attached(path, SIZE, read_only=True) as device:
        fresh = same_after_reads(device)
        content = read_all(device)
    for offset, length, flags in fresh:
        assert flags == DATA or not any(content[offset : offset + length])
    if kind in SAME_AS_QEMU:
        assert zeros(fresh) == zeros(by_qemu(path, ALLOCATION))


def test_space_laid_out_and_never_written_is_a_hole(tmp_path: Path) -> None:
    """What is read of it may be data from then on: Linux says so of what is in its cache."""
    path = preallocated(tmp_path, "falloc")
    with attached(path, SIZE, read_only=True) as device:
        assert [run for run in device.extents() if run[2] == DATA] == [(MIB, 200 * KIB, 0), (40 * MIB, 124 * KIB, 0)]


@pytest.mark.usefixtures("stingy")
@pytest.mark.parametrize("kind", ["scattered", "over a preallocated image"])
def test_an_answer_in_parts_says_the_same(tmp_path: Path, kind: str) -> None:
    with attached(IMAGES[kind](tmp_path), SIZE, read_only=True) as device:
        same_after_reads(device)


@pytest.mark.parametrize("seed", range(6))
def test_neither_does_a_read_of_a_chain_of_anything(tmp_path: Path, seed: int) -> None:
    path, size, _ = make_chain(tmp_path, random.Random(seed), 3)
    with attached(path, size) as device:
        same_after_reads(device)


def test_qemu_img_maps_a_preallocated_image_over_nbd_as_it_maps_the_image(
    serve: Callable[..., Any], tmp_path: Path
) -> None:
    path = preallocated(tmp_path, "metadata")
    server = serve(path, "--read-only")

    def data(*words: str | Path) -> list[tuple[int, int]]:
        mapped = json.loads(qemu.qemu_img("map", "--output=json", *words))
        return [(run["start"], run["length"]) for run in mapped if run["data"] and not run["zero"]]

    assert data("-f", "raw", server.uri) == data(path) == [(MIB, 200 * KIB), (40 * MIB, 124 * KIB)]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts of units that were looked at in L2 tables."""
    counts: list[int] = []
    units = Image.units

    def counted(image: Image, first: int, count: int) -> Units:
        counts.append(count)
        return units(image, first, count)

    monkeypatch.setattr(Image, "units", counted)
    return counts


def test_what_has_no_tables_is_passed_over(tmp_path: Path, looks: list[int]) -> None:
    size = 5 << 40
    places = [0, 1 << 40, (3 << 40) + 64 * KIB, size - 64 * KIB]
    path = create(tmp_path / "large.qcow2", size=size)
    with attached(path, size, read_only=True) as device:
        looks.clear()
        assert device.extents() == [(0, size, 3)]
        assert device.extents(context="qemu:allocation-depth") == [(0, size, 0)]
        assert not looks
    qemu.qemu_io(path, *(f"write {at} 64k" for at in places))
    above = create(tmp_path / "above.qcow2", "-b", str(path), "-F", "qcow2", size=2 * size)
    qemu.qemu_io(above, f"write {1 << 40} 64k")
    for image, length in ((path, size), (above, 2 * size)):
        with attached(image, length, read_only=True) as device:
            looks.clear()
            found = device.extents()
            assert [offset for offset, _, flags in found if flags == DATA] == places
            assert sum(run for _, run, flags in found if flags == DATA) == 64 * KIB * len(places)
            depths = device.extents(context="qemu:allocation-depth")
            assert [offset for offset, _, depth in depths if depth][: len(places)] == places
            assert len(looks) < 100
