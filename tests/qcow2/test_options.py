"""The effect of each option of the table on the image."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import blkloom
from blkloom import Device
from blkloom.errors import BackingError, BusyError, TableError

from . import qemu
from .attached import attached, first_difference, read_all, table_of
from .shapes import Made, Shape, make

pytestmark = pytest.mark.usefixtures("qemu_tools")

KIB = 1 << 10
MIB = 1 << 20
SIZE = 16 * MIB


def _empty(folder: Path) -> Made:
    return make(folder, Shape(), size=SIZE, steps=0)


def _data(path: Path) -> list[tuple[int, int]]:
    """(offset, length) of what QEMU finds to hold data; the image may be live."""
    found = json.loads(qemu.qemu_img("map", "-U", "--output=json", path))
    return [(run["start"], run["length"]) for run in found if run["data"]]


def _held(path: Path) -> int:
    """Bytes that the file takes."""
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("cluster_bits", [12, 16])
def test_discards_free_whole_clusters(tmp_path: Path, cluster_bits: int) -> None:
    made = make(tmp_path, Shape(cluster_bits=cluster_bits), size=MIB, steps=0)
    with attached(made.path, MIB) as device:
        assert device.limits.discard == 1 << cluster_bits


def test_read_only_opens_for_reading_and_lets_other_readers_in(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(lazy=True, bitmap=True), size=MIB)
    before = made.path.read_bytes()
    with attached(made.path, MIB, "read_only") as one, attached(made.path, MIB, "read_only") as other:
        for device in (one, other):
            assert not first_difference(read_all(device), made.content)
            with pytest.raises(OSError, match="write of"):
                device.pwrite(b"x", 0)
            with pytest.raises(OSError, match="discard of"):
                device.discard(0, MIB)
        assert qemu.content(made.path) == made.content, "QEMU may read too"
        with pytest.raises(qemu.QemuError, match="lock"):
            qemu.qemu_io(made.path, "write 0 512")
    assert made.path.read_bytes() == before


def test_a_snapshot_is_shown_as_it_was_while_others_may_read(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12, snapshots=2), size=MIB)
    with attached(made.path, MIB, "snapshot=s1") as one, attached(made.path, MIB, "snapshot=s2") as two:
        assert not first_difference(read_all(one), made.snapshots["s1"])
        assert not first_difference(read_all(two), made.snapshots["s2"])
    with pytest.raises(blkloom.BlkloomError, match=r"no snapshot 's9'; there are: 1 \(s1\), 2 \(s2\)"):
        blkloom.open(table_of(made.path, MIB, "snapshot=s9"))


def test_lock_off_takes_no_lock_and_heeds_none(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(backing="qcow2"), size=MIB)
    with attached(made.path, MIB):
        with pytest.raises(BusyError):
            blkloom.open(table_of(made.path, MIB, "read_only"))
        with attached(made.path, MIB, "lock=off", "read_only") as device:
            assert not first_difference(read_all(device), made.content)
    with attached(made.path, MIB, "lock=off") as device:
        qemu.qemu_img("check", made.path)
        qemu.qemu_io(made.path, "read 0 512")
        device.suspend()
        qemu.qemu_img("snapshot", "-c", "now", made.path)
        device.resume()
        device.pwrite(b"x" * 512, 0)
    assert qemu.check(made.path).whole


def test_allow_backing_opens_directories_and_files_and_nothing_else(tmp_path: Path) -> None:
    inside, outside, far = (tmp_path / name for name in ("inside", "outside", "far"))
    for folder in (inside, outside, far):
        folder.mkdir()
    (far / "bottom.raw").write_bytes(b"f" * MIB)
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-b", far / "bottom.raw", "-F", "raw", outside / "middle.qcow2")
    path = inside / "top.qcow2"
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-b", outside / "middle.qcow2", "-F", "qcow2", path)
    for refused in ((), (f"allow_backing={outside}",), (f"allow_backing={far}",)):
        with pytest.raises(BackingError, match="outside of what may be reached"):
            blkloom.open(table_of(path, MIB, *refused))
    allowed = [f"allow_backing={outside}", f"allow_backing={far / 'bottom.raw'}"]
    with attached(path, MIB, *allowed) as device:
        assert device.pread(MIB, 0) == b"f" * MIB


def test_cache_limits_the_memory_of_decompressed_clusters(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(b"compressible " * (SIZE // 13))
    path = tmp_path / "packed.qcow2"
    qemu.qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, path)
    size = raw.stat().st_size // 512 * 512
    with attached(path, size, "read_only", "cache=1M") as device:
        assert not first_difference(read_all(device), raw.read_bytes()[:size])
        words = dict(word.split("=") for word in device.status()[0][3].split()[1:])
        used, slots = map(int, words["cache"].split("/"))
        assert 0 < used <= slots == MIB // (64 * KIB)


def _written(device: Device, content: bytes) -> None:
    device.pwrite(content, 0)
    device.flush()


def test_discard_is_ignored_or_gives_the_space_back(tmp_path: Path) -> None:
    made = _empty(tmp_path)
    with attached(made.path, SIZE, "discard=ignore") as device:
        _written(device, b"x" * 4 * MIB)
        full = _held(made.path)
        device.discard(0, 4 * MIB)
        device.flush()
        assert _held(made.path) == full
        assert device.pread(4 * MIB, 0) == b"x" * 4 * MIB
    assert _data(made.path) == [(0, 4 * MIB)]
    with attached(made.path, SIZE, "discard=unmap") as device:
        device.discard(0, 4 * MIB)
        device.flush()
        assert _held(made.path) < full // 8
        assert device.pread(4 * MIB, 0) == bytes(4 * MIB)
    assert not _data(made.path)
    assert qemu.check(made.path).whole


@pytest.mark.parametrize(("option", "given"), [("preallocate=0", 64 * KIB), ("preallocate=1M", MIB)])
def test_preallocate_is_how_much_a_first_write_is_given(tmp_path: Path, option: str, given: int) -> None:
    made = _empty(tmp_path)
    with attached(made.path, SIZE, option) as device:
        device.pwrite(b"x" * 512, 5 * MIB)
        device.flush()
        size = made.path.stat().st_size
        assert _mapped(made.path) == given
        faults = _faults(device)
        device.pwrite(b"x" * 512, 5 * MIB + 64 * KIB)
        assert (_faults(device) == faults) == (given > 64 * KIB), "its neighbour costs nothing"
    assert _mapped(made.path) == 128 * KIB, "the rest was given back"
    assert made.path.stat().st_size <= size
    assert qemu.check(made.path).whole


def _mapped(path: Path) -> int:
    """Bytes of the disk that have a place in the file, used or not."""
    found = json.loads(qemu.qemu_img("map", "-U", "--output=json", path))
    return sum(int(run["length"]) for run in found if "offset" in run)


def _faults(device: Device) -> int:
    return int(dict(word.split("=") for word in device.status()[0][3].split()[1:])["faults"])


def test_direct_io_has_space_for_what_the_file_grows_by_and_gives_back_what_is_left(tmp_path: Path) -> None:
    made, held = _empty(tmp_path), {}
    for option in ("direct_io", "preallocate=4M"):
        with attached(made.path, SIZE, option) as device:
            device.pwrite(b"d" * 4096, len(held) * 8 * MIB)
            device.flush()
            held[option] = _held(made.path)
        assert _held(made.path) < MIB
    try:
        os.close(os.open(made.path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no direct I/O")
    assert held["direct_io"] >= 4 * MIB, "its own writes find space by themselves"
    assert held["preallocate=4M"] < MIB, "the cache finds it when it writes back"
    assert qemu.check(made.path).whole
    wanted = b"d" * 4096 + bytes(8 * MIB - 4096)
    assert not first_difference(qemu.content(made.path), wanted * 2)


@pytest.mark.parametrize(
    ("shape", "direct"),
    [
        (Shape(cluster_bits=9), False),
        (Shape(cluster_bits=16, extended=True), False),
        (Shape(cluster_bits=12), True),
        (Shape(cluster_bits=17, extended=True), True),
    ],
    ids=["512 bytes", "subclusters of 2 KiB", "4 KiB", "subclusters of 4 KiB"],
)
def test_clusters_that_share_a_block_are_not_written_directly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, shape: Shape, direct: bool
) -> None:
    made = make(tmp_path, shape, size=MIB, steps=0)
    with attached(made.path, MIB, "direct_io") as device:
        device.pwrite(b"x" * 512, 512)
        assert device.pread(1024, 0) == bytes(512) + b"x" * 512
    said = [record.message for record in caplog.records if "no direct I/O, for its clusters of" in record.message]
    assert bool(said) != direct
    caplog.clear()
    with attached(made.path, MIB, "direct_io", read_only=True) as device:
        assert device.pread(1024, 0) == bytes(512) + b"x" * 512
    assert not [record for record in caplog.records if "no direct I/O, for" in record.message], "nothing is written"


def test_compact_zeroes_keeps_zeros_out_of_the_image(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12, backing="raw"), size=MIB, steps=0)
    with attached(made.path, MIB, "compact_zeroes") as device:
        device.pwrite(bytes(512 * KIB), 0)
        assert device.pread(MIB, 0) == bytes(512 * KIB) + made.content[512 * KIB :]
    assert not [run for run in _data(made.path) if run[0] < 512 * KIB], "zero clusters hide what is below"
    assert qemu.check(made.path).whole
    with attached(made.path, MIB) as device:
        device.pwrite(bytes(256 * KIB), 0)
        device.pwrite(bytes(256 * KIB), 512 * KIB)
    assert _data(made.path)[0][0] == 0, "unless it was asked for, what is written is written"
    assert qemu.content(made.path) == bytes(768 * KIB) + made.content[768 * KIB :]


def test_a_table_that_ends_before_the_image_is_written_to_its_end(tmp_path: Path) -> None:
    path, cluster = tmp_path / "i.qcow2", 64 * KIB
    qemu.qemu_img("create", "-f", "qcow2", path, str(SIZE))
    # Half of what a write is given at once is free in one piece, the rest elsewhere: places past the table's end.
    qemu.qemu_io(path, "write 8M 2M")
    qemu.run("qemu-io", "-d", "unmap", "-c", "write 12M 64k", "-c", "discard 8M 2M", path)
    with attached(path, 2 * cluster) as device:
        device.pwrite(b"w" * 4096, cluster)
        assert device.pread(4096, cluster) == b"w" * 4096
    assert qemu.check(path).whole
    assert qemu.content(path)[cluster : cluster + 4096] == b"w" * 4096


@pytest.mark.parametrize("second", ["qcow2 {}", "qcow2 {} 1 read_only", "loop {}"])
def test_an_image_that_is_written_to_is_one_segments_alone(tmp_path: Path, second: str) -> None:
    path = _empty(tmp_path).path
    lines = [f"qcow2 {path}", second.format(path)]
    for one, other in (lines, lines[::-1]):
        with pytest.raises(TableError, match="two segments"):
            blkloom.open(f"0 8 {one}\n8 8 {other}")
    with blkloom.open(f"0 8 qcow2 {path} 1 read_only\n8 8 qcow2 {path} 1 read_only") as device:
        assert read_all(device) == bytes(8 * KIB)


@pytest.mark.parametrize("short", [0, 512], ids=["a whole data file", "a data file cut short"])
def test_a_raw_data_files_ragged_end_is_what_was_written_last(tmp_path: Path, short: int) -> None:
    path, data, size = tmp_path / "i.qcow2", tmp_path / "i.raw", MIB + 3 * 512
    qemu.qemu_img("create", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", path, str(size))
    qemu.qemu_io(path, f"write -P 5 0 {size - short}")
    os.truncate(data, size - short)
    with attached(path, size) as device:
        assert device.pread(512, MIB) == b"\5" * 512
        device.write_zeroes(MIB, size - MIB)
        assert device.pread(size - MIB, MIB) == bytes(size - MIB)
        device.pwrite(b"w" * 512, size - 512)
        assert device.pread(512, size - 512) == b"w" * 512
        device.discard(MIB, size - MIB)
        wanted = device.pread(size - MIB, MIB)
    assert data.read_bytes() == b"\5" * MIB + wanted
