"""Inconsistent metadata found while an image is written to, and images marked corrupt: as in QEMU, except that readable
ranges stay readable.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import zstandard

import blkloom
from blkloom import Device
from blkloom.errors import BlkloomError
from blkloom.image.errors import CorruptImage

from . import qemu
from .attached import attached, await_check, first_difference, read_all, table_of
from .shapes import Shape, make
from .slow_image import COPIED, CORRUPT, DIRTY, OFFSET_MASK, SlowImage

pytestmark = pytest.mark.usefixtures("qemu_tools")

KIB = 1 << 10
SIZE = 1 << 20
DATA = 128 * KIB
"""Bytes of data at the disk's start."""


def _word(data: bytearray, at: int, value: int | None = None) -> int:
    """The big-endian 64 bits at `at`, which may be changed."""
    if value is not None:
        data[at : at + 8] = value.to_bytes(8, "big")
    return int.from_bytes(data[at : at + 8], "big")


def _l2(image: SlowImage) -> int:
    return image.l1()[0] & OFFSET_MASK


def _data_over_a_table(data: bytearray, image: SlowImage) -> None:
    _word(data, _l2(image), image.l1_offset | COPIED)


def _data_beside_its_cluster(data: bytearray, image: SlowImage) -> None:
    _word(data, _l2(image), _word(data, _l2(image)) + 512)


def _a_table_beside_its_cluster(data: bytearray, image: SlowImage) -> None:
    _word(data, image.l1_offset, _word(data, image.l1_offset) + 512)


def _a_block_beside_its_cluster(data: bytearray, image: SlowImage) -> None:
    _word(data, image.table_offset, _word(data, image.table_offset) + 512)


def _counts_of_nothing(data: bytearray, image: SlowImage) -> None:
    block = _word(data, image.table_offset)
    data[block : block + image.cluster] = bytes(image.cluster)


HARMS = [
    _data_over_a_table,
    _data_beside_its_cluster,
    _a_table_beside_its_cluster,
    _a_block_beside_its_cluster,
    _counts_of_nothing,
]


def _harmed(folder: Path, harm: Callable[[bytearray, SlowImage], None]) -> Path:
    made = make(folder, Shape(cluster_bits=12), size=SIZE, steps=0)
    qemu.qemu_io(made.path, f"write -P 1 0 {DATA}")
    data = bytearray(made.path.read_bytes())
    harm(data, SlowImage(bytes(data)))
    made.path.write_bytes(data)
    return made.path


def _mark(path: Path, bits: int) -> None:
    data = bytearray(path.read_bytes())
    _word(data, 72, _word(data, 72) | bits)
    path.write_bytes(data)


def _is_marked(path: Path) -> bool:
    return bool(SlowImage(path.read_bytes()).incompatible & CORRUPT)


def _write(device: Device) -> int:
    """The error number of a write to where there is data, and of one to where there is nothing yet."""
    for at in (0, SIZE // 2):
        try:
            device.pwrite(b"w" * 4096, at)
        except OSError as error:
            return error.errno or -1
    return 0


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_found_wrong_is_marked_told_and_only_read_from_then_on(
    tmp_path: Path, harm: Callable[[bytearray, SlowImage], None]
) -> None:
    path = _harmed(tmp_path, harm)
    theirs = shutil.copy(path, tmp_path / "theirs.qcow2")
    with attached(path, SIZE) as device:
        assert not _is_marked(path)
        assert _write(device) == errno.EIO
        assert _is_marked(path)
        assert "wants_check=1" in device.status()[0][3]
        before = path.read_bytes()
        for _ in range(2):
            assert _write(device) == errno.EIO
            with pytest.raises(OSError, match="discard of") as failed:
                device.discard(64 * KIB, 64 * KIB)
            assert failed.value.errno == errno.EIO
            device.flush()
        if harm is not _a_table_beside_its_cluster:  # nothing else is known of the disk
            assert device.pread(DATA - 4096, 4096) == b"\1" * (DATA - 4096), "what is all right is read on"
            assert device.pread(4096, SIZE - 4096) == bytes(4096)
    assert path.read_bytes() == before
    qemu.run(
        "qemu-io", "-f", "qcow2", theirs, "-c", "write -P 2 0 4k", "-c", f"write -P 2 {SIZE // 2} 4k", accept=(0, 1)
    )
    assert _is_marked(Path(theirs)), "QEMU takes the same for corruption"


def _first_entry(value: int) -> Callable[[bytearray, SlowImage], None]:
    def harm(data: bytearray, image: SlowImage) -> None:
        _word(data, _l2(image), value)

    return harm


BAD_ENTRIES = {
    "unaligned": COPIED | 0x10200,
    "past the end": COPIED | 1 << 40,
    "reserved bits": COPIED | 0x10000 | 4,
    "compressed, past the end": 1 << 62 | 1 << 40,
    "zeros with a place past the end": COPIED | 1 << 40 | 1,
}
NEXT = 8192
"""Of a cluster whose entry is right."""


def _request(device: Device, what: str) -> int:
    """The error number of a request to the first cluster."""
    try:
        match what:
            case "read":
                device.pread(512, 512)
            case "write":
                device.pwrite(b"w" * 512, 512)
            case "whole":
                device.pwrite(b"w" * 4096, 0)
            case "zero":
                device.write_zeroes(0, 4096)
            case "discard":
                device.discard(0, 4096)
    except OSError as error:
        return error.errno or -1
    return 0


REQUESTS = ["read", "write", "whole", "zero", "discard"]


def _needs_its_place(kind: str, what: str) -> bool:
    """Not where zeros are read or stay zeros."""
    return not kind.startswith("zeros") or what in ("write", "whole")


@pytest.mark.parametrize(
    ("kind", "what"), [(kind, what) for kind in BAD_ENTRIES for what in REQUESTS if _needs_its_place(kind, what)]
)
def test_a_bad_entry_is_marked_and_told_of_by_whatever_request_meets_it(
    tmp_path: Path, kind: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = _harmed(tmp_path, _first_entry(BAD_ENTRIES[kind]))
    with attached(path, SIZE) as device:
        assert device.pread(4096, NEXT) == b"\1" * 4096
        assert device.extents(0, SIZE)
        device.pwrite(b"n" * 4096, NEXT)
        device.flush()
        assert not _is_marked(path), "nothing has met it yet"
        assert not caplog.messages
        assert _request(device, what) == errno.EIO
        assert _is_marked(path)
        assert "L2 table 0: entry 0 is 0x" in caplog.text
        for again in REQUESTS:
            assert _request(device, again) == (errno.EIO if again != "read" or _needs_its_place(kind, again) else 0)
        device.flush()
        assert device.pread(4096, NEXT) == b"n" * 4096
    assert _is_marked(path)


@pytest.mark.parametrize("kind", ["unaligned", "past the end", "reserved bits"])
def test_a_bad_entry_of_an_image_that_is_only_read_costs_its_cluster(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = _harmed(tmp_path, _first_entry(BAD_ENTRIES[kind]))
    before = path.read_bytes()
    with attached(path, SIZE, read_only=True) as device:
        for times in range(1, 3):
            assert _request(device, "read") == errno.EIO
            assert caplog.text.count("L2 table 0: entry 0 is 0x") == times
        assert device.pread(4096, NEXT) == b"\1" * 4096
    assert path.read_bytes() == before


def test_a_bad_entry_of_a_backing_file_marks_neither_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = _harmed(tmp_path, _first_entry(BAD_ENTRIES["unaligned"]))
    before = base.read_bytes()
    path = tmp_path / "over.qcow2"
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", path)
    with attached(path, SIZE) as device:
        assert _request(device, "read") == _request(device, "write") == errno.EIO
        assert f"{base}: L2 table 0: entry 0 is 0x" in caplog.text
        device.pwrite(b"w" * 4096, SIZE // 2)
        device.flush()
    assert not _is_marked(path)
    assert base.read_bytes() == before


def test_a_compressed_cluster_beside_a_data_file_is_marked(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12, data_file="cooked"), size=SIZE, steps=0)
    qemu.qemu_io(made.path, f"write -P 1 0 {DATA}")
    data = bytearray(made.path.read_bytes())
    _word(data, _l2(SlowImage(bytes(data))), 1 << 62)
    made.path.write_bytes(data)
    theirs = tmp_path / "theirs.qcow2"
    shutil.copy(made.path, theirs)
    with pytest.raises(qemu.QemuError):
        qemu.qemu_io(theirs, "read 0 512")
    assert _is_marked(theirs), "QEMU takes the same for corruption"
    with attached(made.path, SIZE) as device:
        assert _request(device, "read") == errno.EIO
        assert _is_marked(made.path)


def test_subclusters_that_cannot_be_are_marked_when_met(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=14, extended=True), size=SIZE, steps=0)
    qemu.qemu_io(made.path, f"write -P 1 0 {DATA}")
    data = bytearray(made.path.read_bytes())
    entry = _l2(SlowImage(bytes(data)))
    last = (len(data) >> 14) - 1 << 14
    both, past_the_end = (1 << 32 | 1, 0), (1 << 31, 31 * 512)
    for bitmap, at in (both, past_the_end):
        _word(data, entry, last | COPIED)
        _word(data, entry + 8, bitmap)
        made.path.write_bytes(data[: last + 8192])
        with attached(made.path, SIZE) as device:
            assert device.pread(512, 16 * 512) == bytes(512)
            assert not _is_marked(made.path)
            with pytest.raises(OSError, match="Input/output"):
                device.pread(512, at)
            assert _is_marked(made.path)


def _with_a_damaged_cluster(folder: Path, compression: Literal["zlib", "zstd"]) -> Path:
    """The first of two compressed clusters; what its entry says is right."""
    made = make(folder, Shape(compression=compression), size=SIZE, steps=0)
    qemu.qemu_io(made.path, "write -c -P 1 0 64k", "write -c -P 2 64k 64k")
    data = bytearray(made.path.read_bytes())
    place = _word(data, _l2(SlowImage(bytes(data)))) & ((1 << 54) - 1)
    data[place : place + 12] = b"\xff" * 12
    made.path.write_bytes(data)
    return made.path


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_a_damaged_compressed_cluster_fails_what_needs_it_and_nothing_else(
    tmp_path: Path, compression: Literal["zlib", "zstd"], caplog: pytest.LogCaptureFixture
) -> None:
    path = _with_a_damaged_cluster(tmp_path, compression)
    theirs = tmp_path / "theirs.qcow2"
    shutil.copy(path, theirs)
    with pytest.raises(qemu.QemuError, match="Input/output error"):
        qemu.qemu_io(theirs, "write 512 512")
    qemu.qemu_io(theirs, "write -P 2 64k 512")
    assert not _is_marked(theirs)
    with attached(path, SIZE) as device:
        for what in ("read", "write"):
            assert _request(device, what) == errno.EIO
        assert "compressed cluster at 0x" in caplog.text
        said = device.message(0, ["get_errors"]) or ""
        assert f"data_read=2 {path}: compressed cluster at 0x" in said
        assert "wants_check=0" in said
        device.pwrite(b"w" * 512, 64 * KIB)
        device.pwrite(b"w" * 512, SIZE // 2)
        device.flush()
        assert device.pread(1024, 64 * KIB) == b"w" * 512 + b"\2" * 512
        assert _request(device, "read") == errno.EIO
        device.pwrite(b"r" * 64 * KIB, 0)  # all of it is replaced
        assert device.pread(64 * KIB, 0) == b"r" * 64 * KIB
    assert not _is_marked(path)
    assert (checked := qemu.check(path)).whole, checked.said
    assert qemu.content(path)[: 64 * KIB] == b"r" * 64 * KIB


def test_a_damaged_cluster_of_a_backing_file_fails_only_what_copies_it(tmp_path: Path) -> None:
    base = _with_a_damaged_cluster(tmp_path, "zlib")
    path = tmp_path / "over.qcow2"
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", path)
    with attached(path, SIZE) as device:
        assert _request(device, "write") == errno.EIO
        device.pwrite(b"w" * 512, 64 * KIB)
        device.write_zeroes(0, 64 * KIB)
        device.flush()
        assert device.pread(512, 0) == bytes(512)
    assert not _is_marked(path)
    assert (checked := qemu.check(path)).whole, checked.said


def test_a_zstd_cluster_with_a_large_window_reads_as_qemu_reads_it(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(compression="zstd"), size=SIZE, steps=0)
    noise = tmp_path / "noise"
    noise.write_bytes(bytes(byte & 1 for byte in random.Random(1).randbytes(64 * KIB)))
    qemu.qemu_io(made.path, f"write -c -s {noise} 0 64k")
    data = bytearray(made.path.read_bytes())
    place = _word(data, _l2(SlowImage(bytes(data)))) & ((1 << 54) - 1)
    parameters = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=False)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = packer.compress(bytes(32 * KIB) + b"\3" * (32 * KIB)) + packer.flush()
    data[place : place + len(frame)] = frame
    made.path.write_bytes(data)
    theirs = qemu.content(made.path)
    with attached(made.path, SIZE, "cache=64k") as device:
        assert not first_difference(read_all(device), theirs)
        device.pwrite(b"w" * 512, 512)
    assert not _is_marked(made.path)
    assert qemu.content(made.path) == theirs[:512] + b"w" * 512 + theirs[1024:]


def test_a_file_that_was_cut_short_does_not_grow_over_what_is_missing(tmp_path: Path) -> None:
    path = _harmed(tmp_path, lambda _data, _image: None)
    last = _word(bytearray(path.read_bytes()), _l2(SlowImage(path.read_bytes())) + 8 * (DATA // 4096 - 1))
    size = (last & OFFSET_MASK) - DATA // 2
    os.truncate(path, size)
    with attached(path, SIZE, "preallocate=0") as device:
        device.pwrite(b"w" * 4096, 0)
        device.flush()
        assert not _is_marked(path), "nothing has met it yet"
        assert _write_until_it_fails(device, SIZE // 2) == errno.EIO
        assert _is_marked(path)
        assert path.stat().st_size == size
        with pytest.raises(OSError, match="Input/output"):
            device.pread(4096, DATA - 4096)
        assert device.pread(4096, 0) == b"w" * 4096
    with attached(path, SIZE, "read_only") as device, pytest.raises(OSError, match="Input/output"):
        device.pread(4096, DATA - 4096)


def _write_until_it_fails(device: Device, start: int) -> int:
    for at in range(start, SIZE, 4096):
        try:
            device.pwrite(b"w" * 4096, at)
        except OSError as error:
            return error.errno or -1
    return 0


def test_a_file_cut_short_under_a_snapshot_does_not_grow_either(tmp_path: Path) -> None:
    path = make(tmp_path, Shape(cluster_bits=12), size=SIZE, steps=0).path
    qemu.qemu_io(path, f"write {SIZE - DATA} {DATA}", f"write 0 {DATA}", f"discard {SIZE - DATA} {DATA}")
    qemu.qemu_img("snapshot", "-c", "before", path)  # its tables, and those of now, come to lie before its data
    qemu.qemu_io(path, f"discard 0 {DATA}")
    image = SlowImage(path.read_bytes())
    assert not any(image.l2_entry(image.l1(), cluster)[0] & OFFSET_MASK for cluster in range(SIZE // 4096))
    (snapshot,) = image.snapshots()
    entries = [image.l2_entry(image.l1(snapshot), cluster)[0] & OFFSET_MASK for cluster in range(DATA // 4096)]
    size = max(entries)
    assert size > max(image.l1()) & OFFSET_MASK
    os.truncate(path, size)
    with attached(path, SIZE, "preallocate=0") as device:
        assert _write_until_it_fails(device, 0) == errno.EIO
    assert _is_marked(path)
    assert path.stat().st_size == size


def test_a_file_cut_short_while_it_is_written_to_is_marked(tmp_path: Path) -> None:
    path = _harmed(tmp_path, lambda _data, _image: None)
    with attached(path, SIZE, "preallocate=0") as device:
        assert device.pread(DATA, 0) == b"\1" * DATA
        size = path.stat().st_size - DATA // 2
        os.truncate(path, size)
        with pytest.raises(OSError, match="Input/output"):
            device.pread(4096, DATA - 4096)
        with pytest.raises(OSError, match="Input/output"):
            device.pwrite(b"w" * 4096, SIZE // 2)
        assert _is_marked(path)
        assert path.stat().st_size == size


def test_counts_of_nothing_past_the_end_do_not_keep_a_file_from_growing(tmp_path: Path) -> None:
    path = _harmed(tmp_path, lambda _data, _image: None)
    data = bytearray(path.read_bytes())
    block = _word(data, SlowImage(bytes(data)).table_offset)
    end = len(data) // 4096
    data[block + 2 * end + 2 : block + 2 * end + 4] = b"\0\1"  # as a crash may leave it
    path.write_bytes(data)
    with attached(path, SIZE) as device:
        device.pwrite(b"w" * (SIZE // 2), SIZE // 2)
    assert not _is_marked(path)
    checked = qemu.check(path)
    assert checked.whole, f"all tables were looked at before, and the counts put right: {checked.said}"


def test_a_flush_does_not_say_that_what_is_lost_is_durable(tmp_path: Path) -> None:
    path = _harmed(tmp_path, _data_over_a_table)
    with attached(path, SIZE) as device:
        device.pwrite(b"w" * 4096, SIZE // 2)
        with pytest.raises(OSError, match="write of"):
            device.pwrite(b"w" * 4096, 0)
        assert _is_marked(path)
        for _ in range(2):
            with pytest.raises(OSError, match="flush of") as failed:
                device.flush()
            assert failed.value.errno == errno.EIO
        with pytest.raises(OSError, match="flush on suspend"):
            device.suspend()
        device.suspend(flush=False)
        qemu.check(path, repair="all")
        device.resume()
        device.flush()
        assert device.pread(4096, SIZE // 2) in (bytes(4096), b"w" * 4096)


@pytest.mark.parametrize("harm", [_data_over_a_table, _counts_of_nothing])  # what QEMU repairs
def test_a_device_whose_image_went_bad_goes_on_when_that_was_repaired(
    tmp_path: Path, harm: Callable[[bytearray, SlowImage], None]
) -> None:
    path = _harmed(tmp_path, harm)
    with attached(path, SIZE) as device:
        assert _write(device) == errno.EIO
        device.suspend()
        with pytest.raises(BlkloomError, match=r"marked corrupt.*qemu-img check -r all"):
            device.resume()
        qemu.check(path, repair="all")
        device.resume()
        assert "wants_check=0" in device.status()[0][3]
        assert not _write(device)
        content = read_all(device)
    assert content[:4096] == content[SIZE // 2 :][:4096] == b"w" * 4096
    assert (checked := qemu.check(path)).whole, checked.said
    assert qemu.content(path) == content


def test_an_image_marked_corrupt_is_only_attached_to_be_read(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12, snapshots=1), size=SIZE)
    _mark(made.path, CORRUPT)
    with pytest.raises(qemu.QemuError, match="corrupt"):
        qemu.qemu_io(made.path, "read 0 512")
    qemu.run("qemu-io", "-r", "-f", "qcow2", made.path, "-c", "read 0 512")
    before = made.path.read_bytes()
    with pytest.raises(CorruptImage, match=r"marked corrupt; .*qemu-img check -r all.*read_only"):
        blkloom.open(table_of(made.path, SIZE))
    for options, content in (("read_only",), made.content), (("snapshot=s1",), made.snapshots["s1"]):
        with attached(made.path, SIZE, *options) as device:
            assert not first_difference(read_all(device), content)
            assert "wants_check=1" in device.status()[0][3]
            with pytest.raises(OSError, match=r"read.only|Read-only"):
                device.pwrite(b"x", 0)
    assert made.path.read_bytes() == before


def test_a_dirty_image_attached_to_be_read_stays_dirty_and_says_so(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12, lazy=True), size=SIZE)
    _mark(made.path, DIRTY)
    before = made.path.read_bytes()
    with attached(made.path, SIZE, "read_only") as device:
        assert not first_difference(read_all(device), made.content)
        assert "wants_check=1" in device.status()[0][3]
    assert made.path.read_bytes() == before
    with attached(made.path, SIZE) as device:
        await_check(device)
        assert "wants_check=0" in device.status()[0][3], "attached to be written to it was repaired"
        assert not first_difference(read_all(device), made.content)
    assert (checked := qemu.check(made.path)).whole, checked.said


def test_a_backing_file_marked_corrupt_is_read(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12, backing="qcow2"), size=SIZE)
    _mark(next(tmp_path.glob("disk-base.*")), CORRUPT)
    with attached(made.path, SIZE) as device:
        assert not first_difference(read_all(device), made.content)
        device.pwrite(b"x" * 512, 0)
    assert (checked := qemu.check(made.path)).whole, checked.said


def test_version_2_has_no_bit_to_set_and_is_only_read_all_the_same(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(version=2, cluster_bits=12), size=SIZE, steps=0)
    qemu.qemu_io(made.path, f"write -P 1 0 {DATA}")
    data = bytearray(made.path.read_bytes())
    _data_over_a_table(data, SlowImage(bytes(data)))
    made.path.write_bytes(data)
    with attached(made.path, SIZE) as device:
        assert _write(device) == errno.EIO
        assert _write(device) == errno.EIO
        assert device.pread(4096, 4096) == b"\1" * 4096
        assert "wants_check=1" in device.status()[0][3]
    assert made.path.read_bytes() == data
