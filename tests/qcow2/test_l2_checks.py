"""A cluster that an L2 table names although its refcount is 0 is found when the table is read, and not allocated
again.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from . import qemu
from .attached import attached
from .shapes import Shape, make
from .slow_image import COPIED, CORRUPT, OFFSET_MASK, SlowImage

pytestmark = pytest.mark.usefixtures("qemu_tools")

SIZE = 8 << 20
"""Four L2 tables of 4 KiB clusters."""
TABLE = 2 << 20
"""Bytes of the disk that an L2 table describes."""
WRITTEN = 512 << 10


def _image(folder: Path) -> Path:
    made = make(folder, Shape(cluster_bits=12), size=SIZE, steps=0)
    qemu.qemu_io(made.path, f"write -P 7 0 {WRITTEN}")
    return made.path


def _uncount(path: Path, first: int, end: int | None = None) -> None:
    """Host clusters [first, end) of the first block count nothing."""
    data = bytearray(path.read_bytes())
    image = SlowImage(bytes(data))
    block = int.from_bytes(image.bytes_at(image.table_offset, 8), "big")
    end = image.cluster // 2 if end is None else end
    data[block + 2 * first : block + 2 * end] = bytes(2 * (end - first))
    path.write_bytes(data)


def _marked(path: Path) -> bool:
    return bool(SlowImage(path.read_bytes()).incompatible & CORRUPT)


def _host(path: Path, table: int, entry: int) -> int:
    image = SlowImage(path.read_bytes())
    return (image.l2_entry(image.l1(), table * image.l2_entries + entry)[0] & OFFSET_MASK) // image.cluster


@pytest.mark.parametrize("met_by", ["write", "read", "discard", "zero"])
def test_clusters_that_tables_use_and_nothing_counts_are_found_and_not_given_to_others(
    tmp_path: Path, met_by: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = _image(tmp_path)
    _uncount(path, _host(path, 0, 2))
    with attached(path, SIZE) as device:
        there, nothing = 0, TABLE - 4096  # both described by the first table
        requests: dict[str, Callable[[], object]] = {
            "write": lambda: device.pwrite(b"x" * 4096, nothing),
            "zero": lambda: device.write_zeroes(there, 4096),
            "discard": lambda: device.discard(there, 4096),
        }
        if met_by == "read":
            assert device.pread(4096, nothing) == bytes(4096)
        else:
            with pytest.raises(OSError, match=f"{met_by}.* of") as failed:
                requests[met_by]()
            assert failed.value.errno == errno.EIO
        assert _marked(path)
        assert "wants_check=1" in device.status()[0][3]
        with pytest.raises(OSError, match="write of"):
            device.pwrite(b"x" * 4096, TABLE)
        assert device.pread(WRITTEN, 0) == b"\7" * WRITTEN
    assert SlowImage(path.read_bytes()).content()[:WRITTEN] == b"\7" * WRITTEN
    assert "which is free by its refcount" in caplog.text
    qemu.check(path, repair="all")
    with attached(path, SIZE) as device:
        device.pwrite(b"x" * 4096, TABLE)
        assert device.pread(WRITTEN, 0) == b"\7" * WRITTEN
    assert qemu.check(path).whole


def test_an_l2_table_that_nothing_counts_is_found(tmp_path: Path) -> None:
    path = _image(tmp_path)
    table = (SlowImage(path.read_bytes()).l1()[0] & OFFSET_MASK) // 4096
    _uncount(path, table, table + 1)
    with attached(path, SIZE) as device:
        with pytest.raises(OSError, match="write of"):
            device.pwrite(b"x" * 4096, 0)
        assert _marked(path)
        assert device.pread(WRITTEN, 0) == b"\7" * WRITTEN


def test_a_cluster_shared_with_a_snapshot_that_nothing_counts_is_found(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12), size=SIZE, steps=0)
    qemu.qemu_io(made.path, f"write -P 7 0 {WRITTEN}")
    qemu.qemu_img("snapshot", "-c", "then", made.path)
    host = _host(made.path, 0, 3)
    image = SlowImage(made.path.read_bytes())
    assert not image.l2_entry(image.l1(), 3)[0] & COPIED
    _uncount(made.path, host, host + 1)
    with attached(made.path, SIZE) as device:
        with pytest.raises(OSError, match="write of"):
            device.pwrite(b"x" * 4096, 0)
        assert _marked(made.path)
        assert device.pread(WRITTEN, 0) == b"\7" * WRITTEN
    assert qemu.content(made.path, snapshot="then")[:WRITTEN] == b"\7" * WRITTEN


def test_an_image_attached_to_be_read_is_read_whatever_its_counts_say(tmp_path: Path) -> None:
    path = _image(tmp_path)
    _uncount(path, 0)
    before = path.read_bytes()
    with attached(path, SIZE, "read_only") as device:
        assert device.pread(WRITTEN, 0) == b"\7" * WRITTEN
        assert "wants_check=0" in device.status()[0][3]
    assert path.read_bytes() == before
