"""Dirty bitmaps: reading, updates while the image is written, and the flag in_use after a crash."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from blkloom.image.errors import CorruptImage
from blkloom.image.qcow2.format.header import ExtensionKind, parse
from blkloom.image.qcow2.state.bitmaps import AUTO, IN_USE, Bitmap, Bitmaps, read_directory
from blkloom.image.types import HostOffset
from qcow2_python_engine import Disk, Guest, check, create

KIB = 1 << 10
MIB = 1 << 20


def _with_bitmap(folder: Path, *options: str, granularity: int = 64 * KIB, size: int = 4 * MIB) -> Path:
    path = create(folder, size, *options)
    words = ["bitmap", "--add", "-g", str(granularity), str(path), "seen"]
    subprocess.run(["qemu-img", *words], check=True)
    return path


def _listed(image: bytes) -> tuple[Bitmaps, Bitmap]:
    header = parse(image[: 1 << 16], path="test")
    extension = header.extension(ExtensionKind.BITMAPS)
    assert extension is not None
    disk = Disk(bytearray(image))
    found = read_directory(disk, extension, cluster_bits=header.cluster_bits, disk_size=header.size)  # type: ignore[arg-type]
    whole = Bitmaps(
        disk,  # type: ignore[arg-type]
        found,
        cluster_bits=header.cluster_bits,
        unit_bits=header.geometry.unit_bits,
        disk_size=header.size,
    )
    return whole, found[0]


def _dirty(image: bytes) -> list[int]:
    whole, bitmap = _listed(image)
    return np.flatnonzero(np.unpackbits(whole.bits_of(bitmap), bitorder="little")).tolist()


@pytest.mark.parametrize("granularity", [512, 4 * KIB, 64 * KIB, MIB])
@pytest.mark.parametrize(
    "options", [[], ["cluster_size=4k"], ["extended_l2=on"]], ids=["plain", "small clusters", "extended"]
)
def test_every_change_is_in_the_bitmap_afterwards(tmp_path: Path, options: list[str], granularity: int) -> None:
    path = _with_bitmap(tmp_path, *options, granularity=granularity)
    subprocess.run(["qemu-io", "-c", "write -P 3 0 1M", str(path)], check=True, capture_output=True)
    before = set(_dirty(path.read_bytes()))
    guest = Guest(path.read_bytes())
    changes = [(100 * KIB, 5), (MIB + 5000, 70000), (3 * MIB, 64 * KIB), (4 * MIB - 512, 512)]
    for at, length in changes:
        guest.write(at, b"n" * length)
    guest.write(3 * MIB + 8 * KIB, b"again, where the engine may write by itself")
    guest.writer.discard(2 * MIB, 128 * KIB)
    guest.writer.write_zeroes(2 * MIB + 300 * KIB, 3, may_unmap=True)
    changes += [(2 * MIB, 128 * KIB), (2 * MIB + 300 * KIB, 3)]
    image = guest.close()
    assert not check(image, tmp_path)
    step = max(granularity, guest.image.geometry.unit)
    wanted = before | {
        unit * (step // granularity) + bit
        for at, length in changes
        for unit in range(at // step, (at + length - 1) // step + 1)
        for bit in range(step // granularity)
    }
    assert set(_dirty(image)) == wanted, "whole units, for the engine may write to all of one"
    assert _listed(image)[1].flags == AUTO


def test_while_it_is_written_and_after_a_crash_the_bitmap_says_in_use(tmp_path: Path) -> None:
    guest = Guest(_with_bitmap(tmp_path).read_bytes())
    assert _listed(guest.crash())[1].flags == AUTO
    guest.write(0, b"x")
    assert _listed(guest.crash())[1].flags == AUTO | IN_USE
    story = [what for what, _, _ in guest.disk.log if what != "truncate"]
    assert story[:2] == ["write", "sync"], "it is durable before the first change"
    guest.flush()
    image = guest.crash()
    assert _listed(image)[1].flags == AUTO | IN_USE
    again = Guest(image)
    again.write(MIB, b"x")
    assert _listed(again.close())[1].flags == AUTO | IN_USE, "what was lost stays lost"


def test_a_bitmap_that_records_nothing_is_left_alone(tmp_path: Path) -> None:
    path = _with_bitmap(tmp_path)
    subprocess.run(["qemu-img", "bitmap", "--disable", str(path), "seen"], check=True)
    guest = Guest(path.read_bytes())
    guest.write(0, b"x" * MIB)
    image = guest.close()
    assert _listed(image)[1].flags == 0
    assert _dirty(image) == []
    assert not check(image, tmp_path)


def test_a_bitmap_too_large_to_be_kept_says_in_use_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blkloom.image.qcow2.state.bitmaps._MEMORY_LIMIT", 4)
    guest = Guest(_with_bitmap(tmp_path).read_bytes())
    assert _listed(guest.crash())[1].flags == AUTO | IN_USE
    guest.write(0, b"x")
    assert _listed(guest.close())[1].flags == AUTO | IN_USE


def test_clusters_of_all_ones_and_of_zeros_need_no_space(tmp_path: Path) -> None:
    image = bytearray(_with_bitmap(tmp_path).read_bytes())
    _, bitmap = _listed(bytes(image))
    assert _dirty(bytes(image)) == []
    image[bitmap.table_offset : bitmap.table_offset + 8] = (1).to_bytes(8, "big")
    whole, bitmap = _listed(bytes(image))
    assert set(whole.bits_of(bitmap).tolist()) == {0xFF}


@pytest.mark.parametrize(("unit_bits", "granularity_bits"), [(16, 9), (16, 16), (9, 16), (12, 10)])
def test_units_are_unseen_until_all_their_bits_are_set(unit_bits: int, granularity_bits: int) -> None:
    size = 1 << 20
    disk = Disk(bytearray(1 << 20))
    bitmap = Bitmap("b", 64, HostOffset(1 << 16), 1, AUTO, granularity_bits, 0)
    whole = Bitmaps(disk, [bitmap], cluster_bits=16, unit_bits=unit_bits, disk_size=size)  # type: ignore[arg-type]
    whole.begin()
    whole.mark(300000, 100000)
    unit, step = 1 << unit_bits, max(1 << unit_bits, 1 << granularity_bits)
    low, high = 300000 // step * step, -(-400000 // step) * step
    wanted = [not (low <= at and at + unit <= high) for at in range(0, size, unit)]
    assert whole.unseen(0, size // unit).tolist() == wanted
    assert whole.unseen(3, 9).tolist() == wanted[3:12]


@pytest.mark.parametrize(
    ("at", "value", "what"),
    [
        (0, b"\0" * 8, "table"),
        (0, b"\0\1\0\0\0\0\0\0", "table"),
        (8, b"\xff" * 4, "table"),
        (12, b"\0\0\0\x80", "flags"),
        (16, b"\2", "type"),
        (17, b"\x40", "granularity"),
        (18, b"\0\0", "ends"),
        (20, b"\xff" * 4, "ends"),
    ],
)
def test_a_directory_that_cannot_be_is_corruption(tmp_path: Path, at: int, value: bytes, what: str) -> None:
    image = bytearray(_with_bitmap(tmp_path).read_bytes())
    place = _listed(bytes(image))[1].at + at
    image[place : place + len(value)] = value
    with pytest.raises(CorruptImage, match=what):
        _listed(bytes(image))


@pytest.mark.parametrize("entry", [1 << 60, 0x10001, 0x200, 1 << 50])
def test_a_bitmap_table_that_leads_astray_is_corruption(tmp_path: Path, entry: int) -> None:
    image = bytearray(_with_bitmap(tmp_path).read_bytes())
    offset = _listed(bytes(image))[1].table_offset
    image[offset : offset + 8] = entry.to_bytes(8, "big")
    with pytest.raises(CorruptImage, match="table entry"):
        _dirty(bytes(image))


@pytest.mark.parametrize("granularity", [512, 4 * KIB, 64 * KIB, MIB])
@pytest.mark.parametrize("options", [[], ["extended_l2=on"]], ids=["plain", "extended"])
def test_units_past_the_end_of_the_disk_or_cut_by_it_are_not_guarded_for_ever(
    tmp_path: Path, options: list[str], granularity: int
) -> None:
    size = MIB + 512
    guest = Guest(_with_bitmap(tmp_path, *options, granularity=granularity, size=size).read_bytes())
    bits = guest.image.geometry.unit_bits
    cluster = 1 << guest.image.geometry.cluster_bits
    units = -(-size // cluster) * cluster >> bits
    last = size - 1 >> bits
    guest.write(size - 512, b"n" * 512)
    found = guest.writer.bitmaps.unseen(0, units)
    assert found.size == units
    assert found[0]
    assert not found[last:].any()
    guest.writer.bitmaps.mark(0, size)
    assert not guest.writer.bitmaps.unseen(0, units).any()


@pytest.mark.parametrize("granularity", [512, 64 * KIB, MIB])
def test_runs_are_those_of_the_bits_whether_they_are_on_disk_or_kept(tmp_path: Path, granularity: int) -> None:
    size = 4 * MIB + 512
    path = _with_bitmap(tmp_path, "cluster_size=512", granularity=granularity, size=size)
    subprocess.run(["qemu-io", "-c", "write 100k 3k", "-c", "write 3M 512", str(path)], check=True, capture_output=True)
    whole, bitmap = _listed(path.read_bytes())
    pieces = [run for at in range(0, size, 512) for run in whole.runs(bitmap, at, 512)]
    dirty = _dirty(path.read_bytes())
    wanted = [int(at // granularity in dirty) for at in range(0, size, 512)]
    for runs in (list(whole.runs(bitmap, 0, size)), pieces):
        assert [flags for length, flags in runs for _ in range(0, length, 512)] == wanted
        assert sum(length for length, _ in runs) == size
    before = list(whole.runs(bitmap, 0, size))
    bitmap.bits = whole.bits_of(bitmap)
    assert list(whole.runs(bitmap, 0, size)) == before


def test_bits_that_are_all_ones_without_a_cluster_are_dirty(tmp_path: Path) -> None:
    image = bytearray(_with_bitmap(tmp_path, granularity=64 * KIB).read_bytes())
    _, bitmap = _listed(bytes(image))
    image[bitmap.table_offset : bitmap.table_offset + 8] = (1).to_bytes(8, "big")
    whole, bitmap = _listed(bytes(image))
    assert list(whole.runs(bitmap, 1000, 100 * KIB)) == [(100 * KIB, 1)]
