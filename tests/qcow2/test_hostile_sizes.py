"""Small images that name very many objects, or one object very often, do not cause much memory or time to be used."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import pytest

from blkloom import Device
from blkloom._engine import ClusterTable
from blkloom.targets.image import LoadedImage

from . import qemu
from .attached import attached
from .hostile import examine
from .slow_image import BITMAPS, BITMAPS_CONSISTENT, COPIED, CORRUPT, DIRTY

MIB = 1 << 20
L1_MOST = 32 * MIB
"""Bytes of an L1 table at most."""

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("qemu_tools")]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """With data in it, and clusters of 512 bytes."""
    path = tmp_path / "disk.qcow2"
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "1M")
    qemu.qemu_io(path, "write -P 1 0 64k")
    return path


def _put(path: Path, at: int, form: str, *values: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(struct.pack(form, *values))


def _get(path: Path, at: int) -> int:
    with path.open("rb") as file:
        file.seek(at)
        return int.from_bytes(file.read(8), "big")


def _append(path: Path, data: bytes, *, room: int = 0) -> int:
    """Where a cluster begins behind what is there; `room` bytes are made, as a hole."""
    at = -(-path.stat().st_size // 65536) * 65536
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
        file.truncate(max(at + room, at + len(data)))
    return at


@pytest.mark.parametrize("dirty", [False, True])
@pytest.mark.parametrize("step", [0, 512])
def test_snapshots_without_number_with_the_largest_tables(
    image: Path, dirty: bool, step: int, caplog: pytest.LogCaptureFixture
) -> None:
    count = 60_000
    l1 = _append(image, b"", room=L1_MOST + count * step)
    entry = struct.Struct(">QIHHIIQII")
    entries = b"".join(entry.pack(l1 + n * step, L1_MOST // 8, 0, 0, 0, 0, 0, 0, 0) for n in range(count))
    _put(image, 60, ">IQ", count, _append(image, entries))
    _put(image, 72, ">Q", DIRTY if dirty else 0)
    found = examine(image, writable=True)
    assert not found.refused, "it is served all the same"
    if dirty:
        assert "too many to be counted" in caplog.text


def test_one_table_that_all_of_a_large_disk_leads_to(image: Path) -> None:
    l2 = _get(image, _get(image, 40))
    entries = struct.pack(">Q", l2) * (L1_MOST // 8)
    _put(image, 24, ">Q", (L1_MOST // 8) * 64 * 512)
    _put(image, 36, ">IQ", L1_MOST // 8, _append(image, entries))
    _put(image, 72, ">Q", DIRTY)
    assert not examine(image, writable=True).refused
    assert _get(image, 72) & CORRUPT


def test_a_refcount_table_that_names_one_block_without_end(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    qemu.qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    qemu.qemu_io(image, "write -P 1 0 64k")
    block = _append(image, b"\0\1" * 32768)
    first = _get(image, _get(image, 48))
    table = struct.pack(">Q", first) + struct.pack(">Q", block) * (4 * MIB // 8 - 1)
    _put(image, 48, ">QI", _append(image, table), len(table) // 65536)
    _put(image, 72, ">Q", DIRTY)
    examine(image, writable=True)


def test_bitmaps_without_number_with_the_largest_tables(image: Path) -> None:
    count = 60_000
    table = _append(image, b"", room=128 * MIB)
    entry = struct.pack(">QIIBBHI", table, 128 * MIB // 8, 0, 1, 16, 1, 0) + b"b".ljust(8, b"\0")
    directory = _append(image, entry * count)
    _put(image, 88, ">Q", BITMAPS_CONSISTENT)
    _put(image, 112, ">IIIIQQQ", BITMAPS, 24, count, 0, len(entry) * count, directory, 0)
    found = examine(image, writable=True)
    assert "bitmaps: the tables of the first 3 take" in found.refused


def test_a_dirty_image_of_holes_that_are_tables(image: Path) -> None:
    """Their blocks of counts are missing, too."""
    count = 1 << 16
    tables = _append(image, b"", room=count * 512)
    entries = b"".join(struct.pack(">Q", tables + n * 512 | COPIED) for n in range(count))
    _put(image, 24, ">Q", count * 64 * 512)
    _put(image, 36, ">IQ", count, _append(image, entries))
    _put(image, 72, ">Q", DIRTY)
    assert not examine(image, writable=True).refused, "refcount blocks for all of them are made"
    assert (checked := qemu.check(image)).whole, checked.said


def _table(device: Device) -> ClusterTable:
    """The engine's, of the image that is the whole device."""
    assert device._active
    (owner,) = device._active.owners.values()
    assert isinstance(owner.target, LoadedImage)
    assert owner.target._attachment
    return owner.target._attachment.table


def test_discards_over_a_chain_of_unlike_clusters_take_memory_for_what_is_read_and_no_more(tmp_path: Path) -> None:
    below, path, size = tmp_path / "below.qcow2", tmp_path / "disk.qcow2", 4 << 30
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", below, str(size))
    qemu.qemu_io(below, "write -P 3 1G 64k")
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", "-b", below, "-F", "qcow2", path)
    with attached(path, size) as device:
        assert device.pread(512, 0) == bytes(512)
        table = _table(device)
        tracemalloc.start()
        try:
            device.discard(0, size)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 4 * (8 << 20), "a piece of 2^20 entries at a time"
        assert table.pages == 1
        assert device.pread(512, 1 << 30) == bytes(512)
        assert table.pages == 2
