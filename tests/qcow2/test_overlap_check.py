"""Pointers to metadata that lead to other metadata: the write is refused before it harms anything, and the image is
marked corrupt, as QEMU does ("Preventing invalid write on metadata").
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from blkloom import Device

from . import qemu
from .attached import attached
from .shapes import Shape, make
from .slow_image import BITMAPS, COPIED, CORRUPT, OFFSET_MASK, SlowImage

pytestmark = pytest.mark.usefixtures("qemu_tools")

SIZE = 8 << 20
"""Four L2 tables of 4 KiB clusters."""
TABLE = 2 << 20
"""Bytes of the disk that an L2 table describes."""
WRITTEN = 128 << 10

Place = Callable[[SlowImage], int]


def _word(data: bytearray, at: int, value: int | None = None) -> int:
    """The big-endian 64 bits at `at`, which may be changed."""
    if value is not None:
        data[at : at + 8] = value.to_bytes(8, "big")
    return int.from_bytes(data[at : at + 8], "big")


def _block(image: SlowImage) -> int:
    return int.from_bytes(image.bytes_at(image.table_offset, 8), "big")


def _directory(image: SlowImage) -> int:
    return struct.unpack(">IIQQ", image.extensions[BITMAPS])[3]


def _bitmap_table(image: SlowImage) -> int:
    return image.bitmaps()[0].table_offset


TARGETS: dict[str, Place] = {
    "the refcount table": lambda image: image.table_offset,
    "a refcount block": _block,
    "the L1 table": lambda image: image.l1_offset,
    "a snapshot's L1 table": lambda image: image.snapshots()[0].l1_offset,
    "the snapshot table": lambda image: image.snapshot_offset,
    "the bitmap directory": _directory,
    "a bitmap's table": _bitmap_table,
}


def _harmed(folder: Path, harm: Callable[[bytearray, SlowImage], None]) -> Path:
    """An image with a snapshot and a bitmap, with data of its own in the first of four tables' clusters."""
    made = make(folder, Shape(cluster_bits=12, snapshots=1, bitmap=True), size=SIZE, steps=0)
    qemu.qemu_io(made.path, f"write -P 1 0 {WRITTEN}")
    data = bytearray(made.path.read_bytes())
    harm(data, SlowImage(bytes(data)))
    made.path.write_bytes(data)
    return made.path


def _refused(device: Device, at: int) -> None:
    with pytest.raises(OSError, match="write of") as failed:
        device.pwrite(b"w" * 4096, at)
    assert failed.value.errno == errno.EIO


def _is_marked(path: Path) -> bool:
    return bool(SlowImage(path.read_bytes()).incompatible & CORRUPT)


def _unharmed(before: bytes, path: Path) -> None:
    """Nothing has changed but the header, and the flag of a bitmap that it is in use."""
    after = path.read_bytes()
    assert len(after) >= len(before)
    differs = {at for at in range(0, len(before), 4096) if before[at : at + 4096] != after[at : at + 4096]}
    assert differs <= {0, _directory(SlowImage(before))}


@pytest.mark.parametrize("copied", [COPIED, 0], ids=["in place", "copied first"])
@pytest.mark.parametrize("target", TARGETS)
def test_an_l1_entry_that_leads_to_other_metadata_is_refused_before_the_first_write(
    tmp_path: Path, target: str, copied: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = _harmed(tmp_path, lambda data, image: _point(data, image.l1_offset + 8, TARGETS[target](image) | copied))
    before = path.read_bytes()
    with attached(path, SIZE) as device:
        assert path.read_bytes() == before
        _refused(device, TABLE + WRITTEN)
        device.flush()
        assert "wants_check=1" in device.status()[0][3]
        assert device.pread(WRITTEN, 0) == b"\1" * WRITTEN, "what is all right is read on"
        _refused(device, 0)
    assert _is_marked(path)
    _unharmed(before, path)
    assert "preventing invalid write on metadata" in caplog.text


def _point(data: bytearray, at: int, value: int) -> None:
    _word(data, at, value)


def test_two_l1_entries_with_one_table_are_refused(tmp_path: Path) -> None:
    path = _harmed(tmp_path, lambda data, image: _point(data, image.l1_offset + 8, image.l1()[0]))
    before = path.read_bytes()
    with attached(path, SIZE) as device:
        _refused(device, TABLE + WRITTEN)
    assert _is_marked(path)
    _unharmed(before, path)


@pytest.mark.parametrize("target", ["the L1 table", "an L2 table", "the refcount table", "a snapshot's L1 table"])
def test_a_refcount_table_entry_that_leads_to_other_metadata_is_refused(tmp_path: Path, target: str) -> None:
    places = TARGETS | {"an L2 table": lambda image: image.l1()[0] & OFFSET_MASK}

    def harm(data: bytearray, image: SlowImage) -> None:
        _word(data, image.table_offset, places[target](image))

    path = _harmed(tmp_path, harm)
    before = path.read_bytes()
    with attached(path, SIZE) as device:
        _refused(device, TABLE)
        device.flush()
    assert _is_marked(path)
    _unharmed(before, path)


@pytest.mark.parametrize(
    "target", ["the L1 table", "an L2 table", "a refcount block", "the snapshot table", "its table"]
)
def test_a_bitmaps_table_entry_that_leads_to_other_metadata_is_refused(tmp_path: Path, target: str) -> None:
    places = TARGETS | {"an L2 table": lambda image: image.l1()[0] & OFFSET_MASK, "its table": _bitmap_table}

    def harm(data: bytearray, image: SlowImage) -> None:
        _word(data, _bitmap_table(image), places[target](image))

    path = _harmed(tmp_path, harm)
    before = path.read_bytes()
    with attached(path, SIZE) as device:
        _refused(device, 0)
    assert _is_marked(path)
    _unharmed(before, path)


def test_tables_of_the_header_that_overlap_are_refused(tmp_path: Path) -> None:
    def harm(data: bytearray, image: SlowImage) -> None:
        _word(data, 40, image.table_offset)  # the L1 table is where the refcount table is

    path = _harmed(tmp_path, harm)
    before = path.read_bytes()
    with attached(path, SIZE) as device:
        _refused(device, TABLE)
    assert _is_marked(path)
    _unharmed(before, path)


def test_metadata_that_data_entries_name_is_not_freed_by_discarding_them(tmp_path: Path) -> None:
    def harm(data: bytearray, image: SlowImage) -> None:
        _word(data, image.l1()[0] & OFFSET_MASK, image.l1_offset)

    path = _harmed(tmp_path, harm)
    before = path.read_bytes()
    image = SlowImage(before)
    with attached(path, SIZE) as device:
        device.discard(0, 4096)
        with suppress(OSError):  # which finds it, unless the background check has before
            device.flush()
    assert _is_marked(path)
    after = path.read_bytes()
    assert after[image.l1_offset :][:4096] == before[image.l1_offset :][:4096]


def test_qemu_refuses_the_same(tmp_path: Path) -> None:
    path = _harmed(tmp_path, lambda data, image: _point(data, image.l1_offset + 8, image.table_offset | COPIED))
    said = qemu.run("qemu-io", "-f", "qcow2", path, "-c", f"write -P 2 {TABLE + WRITTEN} 4k", accept=(0, 1))
    assert "failed" in said
    assert _is_marked(path)
