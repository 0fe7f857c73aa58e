"""Maintenance of a live device's image with qemu-img: refused while the device is live, possible while it is suspended,
and visible to connected clients afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from conformance.nbd_client import READ, NbdClient
from qcow2 import qemu
from qcow2.shapes import Shape
from qcow2.slow_image import SlowImage

from .conftest import Life
from .maintained import MIB, NAME, Disk, disks

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("qemu_tools")]
KIB = 1 << 10
SIZE = 4 * MIB
GRANULE = 64 * KIB

Program = Callable[[str, str], str]
Make = Callable[..., Disk]

WRITERS = [
    "snapshot -c more {image}",
    "snapshot -a first {image}",
    "snapshot -d first {image}",
    "resize {image} +1M",
    "resize --shrink {image} -- -1M",
    "check -r leaks {image}",
    "check -r all {image}",
    "rebase -b {other} -F raw {image}",
    "rebase -u -b {other} -F raw {image}",
    "rebase -b '' {image}",
    "commit {image}",
    "amend -o compat=0.10 {image}",
    "amend -o lazy_refcounts=on {image}",
    "amend -o refcount_bits=64 {image}",
    "bitmap --add {image} more",
    "bitmap --remove {image} on",
    "bitmap --clear {image} on",
    "bitmap --enable {image} off",
    "bitmap --disable {image} on",
    "bitmap --merge on {image} off",
    "convert -n -O qcow2 {other} {image}",
]
READERS = ["snapshot -l {image}", "info {image}", "map {image}", "check {image}", "measure -O raw {image}"]


@pytest.fixture
def life(shared: Life) -> Life:
    return shared


@pytest.fixture
def disk(blkloom: str, life: Life, tmp_path: Path) -> Iterator[Make]:
    with disks(blkloom, life, tmp_path, size=SIZE) as made:
        yield made


def test_the_lock_of_a_live_device_refuses_every_writer(disk: Make, tmp_path: Path) -> None:
    one = disk(Shape(cluster_bits=12, backing="qcow2"))
    with one.suspended() as image:
        qemu.qemu_img("snapshot", "-c", "first", image)
        qemu.qemu_img("bitmap", "--add", image, "on")
        qemu.qemu_img("bitmap", "--add", "--disable", image, "off")
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(SIZE))
    before = one.path.read_bytes()
    for line in WRITERS:
        with pytest.raises(qemu.QemuError, match=r'Failed to get "write" lock'):
            qemu.qemu_img(*_words(line, one.path, other))
    for line in READERS:
        with pytest.raises(qemu.QemuError, match=r'Failed to get shared "write" lock'):
            qemu.qemu_img(*_words(line, one.path, other))
    assert "first" in qemu.qemu_img("snapshot", "-l", "-U", one.path), "-U reads without a lock"
    assert one.path.read_bytes() == before
    one.verify()
    one.end()


def _words(line: str, image: Path, other: Path) -> list[str]:
    return [word.format(image=image, other=other).strip("'") for word in line.split()]


# Snapshots


def test_snapshots_are_made_listed_applied_and_deleted(disk: Make) -> None:
    one = disk()
    one.write(1, 0, MIB)
    with one.suspended() as image:
        qemu.qemu_img("snapshot", "-c", "first", image)
    first = bytes(one.content)
    one.write(2, 0, 512 * KIB)
    with one.suspended() as image:
        qemu.qemu_img("snapshot", "-c", "second", image)
        assert qemu.qemu_img("snapshot", "-l", image).count("second") == 1
    second = bytes(one.content)
    one.write(3, 100, 3 * MIB)
    with one.suspended() as image:
        qemu.qemu_img("snapshot", "-a", "first", image)
    one.content[:] = first
    one.verify()
    one.write(4, MIB, MIB)
    with one.suspended() as image:
        assert qemu.content(image, snapshot="first") == first
        assert qemu.content(image, snapshot="second") == second
        qemu.qemu_img("snapshot", "-d", "first", image)
    one.write(5, 64 * KIB, MIB)
    with one.suspended() as image:
        assert qemu.content(image, snapshot="second") == second
        qemu.qemu_img("snapshot", "-d", "second", image)
    one.end()


def test_applying_a_snapshot_of_another_size_changes_the_device(disk: Make) -> None:
    one = disk()
    with one.suspended() as image:
        qemu.qemu_img("snapshot", "-c", "small", image)
        qemu.qemu_img("resize", image, "6M")
    assert one.size == 6 * MIB
    with one.suspended() as image:
        qemu.qemu_img("snapshot", "-a", "small", image)
    assert one.size == SIZE
    one.end()


# Size


def test_an_image_grows_and_shrinks_under_its_device(disk: Make, life: Life) -> None:
    one = disk()
    with one.suspended() as image:
        qemu.qemu_img("resize", image, "6M")
    assert one.size == 6 * MIB
    one.verify()
    with closing(NbdClient.unix(life.socket(NAME))) as new:
        assert new.size == 6 * MIB
        assert new.ask(READ, SIZE, 2 * MIB).data == bytes(2 * MIB)
    one.content.extend(bytes(2 * MIB))
    with one.suspended() as image:
        qemu.qemu_img("resize", "--shrink", image, "3M")
    assert one.size == 3 * MIB
    assert one.nbd.ask(READ, SIZE - 512, 512).error, "the client that stayed thinks it is larger"
    del one.content[3 * MIB :]
    with one.suspended() as image:
        qemu.qemu_img("resize", image, "5M")
    one.content.extend(bytes(2 * MIB))
    with closing(NbdClient.unix(life.socket(NAME))) as new:
        assert new.ask(READ, 3 * MIB, 2 * MIB).data == bytes(2 * MIB), "what was cut off does not come back"
    one.nbd.close()
    one.nbd = NbdClient.unix(life.socket(NAME))
    one.write(6, 5 * MIB - 512, 512)
    one.end()


# Repair


def test_leaks_and_wrong_counts_are_repaired(disk: Make) -> None:
    one = disk()
    for repair in ("leaks", "all"):
        one.write(7, MIB, MIB)
        with one.suspended() as image:
            _harm(image, leak=True, error=repair == "all")
            found = qemu.check(image)
            assert found.leaks
            assert bool(found.corruptions) == (repair == "all")
            qemu.check(image, repair=repair)
        one.verify()
        assert one.status["wants_check"] == "0"
    one.end()


def _harm(path: Path, *, leak: bool, error: bool) -> None:
    """Counts (of 16 bits) of the last cluster in use and one behind it: none, and one too many."""
    data = bytearray(path.read_bytes())
    image = SlowImage(bytes(data))
    block = int.from_bytes(image.bytes_at(image.table_offset, 8), "big")
    last = max(n for n in range(len(data) // image.cluster) if data[block + 2 * n + 1])
    if error:
        data[block + last * 2 : block + last * 2 + 2] = bytes(2)
    if leak:
        data[block + last * 2 + 2 : block + last * 2 + 4] = b"\0\1"
        data.extend(bytes(image.cluster))
    path.write_bytes(data)


# Backing files


def test_an_image_is_rebased_onto_another_backing_file(disk: Make, tmp_path: Path) -> None:
    one = disk(Shape(cluster_bits=12, backing="qcow2"))
    base = next(tmp_path.glob("disk-base.*"))
    other = tmp_path / "other.raw"
    other.write_bytes(b"o" * SIZE)
    with one.suspended() as image:
        qemu.qemu_img("rebase", "-b", other, "-F", "raw", image)
    base.unlink()
    one.verify()
    one.write(8, MIB, 5 * KIB)
    assert one.status["chain"] == "2"
    with one.suspended() as image:
        qemu.qemu_img("rebase", "-b", "", image)
    other.unlink()
    one.verify()
    assert one.status["chain"] == "1"
    one.end()


def test_a_backing_file_that_moved_is_found_where_rebase_says_it_is(disk: Make, tmp_path: Path) -> None:
    one = disk(Shape(cluster_bits=12, backing="raw"))
    base = next(tmp_path.glob("disk-base.*"))
    with one.suspended() as image:
        moved = base.rename(tmp_path / "moved.raw")
        qemu.qemu_img("rebase", "-u", "-b", moved.name, "-F", "raw", image)
    one.verify()
    with one.suspended() as image:
        qemu.qemu_img("rebase", "-u", "-b", "", image)
        one.content[:] = qemu.content(image)
    one.end()


def test_an_image_is_committed_into_its_backing_file_and_empty_then(disk: Make, tmp_path: Path) -> None:
    one = disk(Shape(cluster_bits=12, backing="qcow2"))
    base = next(tmp_path.glob("disk-base.*"))
    one.write(9, MIB, 2 * MIB)
    with one.suspended() as image:
        qemu.qemu_img("commit", "-q", image)
        assert qemu.content(base) == one.content
        assert not any(run["depth"] == 0 and run["data"] for run in _map(image)), "it is empty"
    one.verify()
    with pytest.raises(qemu.QemuError, match="lock"):
        qemu.qemu_io(base, "write 0 512")
    one.write(10, 0, 100 * KIB)
    assert qemu.check(base).whole
    one.end()


def _map(image: Path) -> list[dict[str, int]]:
    found: list[dict[str, int]] = json.loads(qemu.qemu_img("map", "--output=json", image))
    return found


def test_a_backing_file_that_another_device_reads_is_not_committed_into(disk: Make, life: Life, tmp_path: Path) -> None:
    one = disk(Shape(cluster_bits=12, backing="raw"))
    base = next(tmp_path.glob("disk-base.*"))
    with life.client() as client:
        client.create("reader", table=f"0 {SIZE // 512} loop {base} 0", read_only=True)
        with one.suspended() as image, pytest.raises(qemu.QemuError, match='Failed to get "write" lock'):
            qemu.qemu_img("commit", image)
        client.remove("reader", retry=True)
    one.end()


# What the format can say


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (Shape(cluster_bits=12), ["compat=0.10", "compat=1.1", "lazy_refcounts=on", "lazy_refcounts=off"]),
        (Shape(cluster_bits=12, snapshots=1), ["compat=0.10", "compat=1.1"]),
        (Shape(cluster_bits=12), ["refcount_bits=1", "refcount_bits=64", "refcount_bits=16"]),
        (Shape(cluster_bits=12, version=2), ["compat=1.1,lazy_refcounts=on", "compat=0.10"]),
        (Shape(cluster_bits=12, backing="raw"), ["compat=0.10", "compat=1.1"]),
        (Shape(cluster_bits=14, extended=True), ["lazy_refcounts=on", "refcount_bits=32"]),
    ],
    ids=str,
)
def test_an_amended_image_is_read_and_written_as_what_it_became(disk: Make, shape: Shape, options: list[str]) -> None:
    one = disk(shape)
    for number, option in enumerate(options):
        with one.suspended() as image:
            qemu.qemu_img("amend", "-o", option, image)
        one.verify()
        one.write(11 + number, number * 300 * KIB + 512, 290 * KIB)
        one.verify()
    one.end()


@pytest.mark.parametrize("raw", ["on", "off"])
def test_a_data_file_is_named_anew_and_its_rawness_taken_back(disk: Make, tmp_path: Path, raw: str) -> None:
    one = disk(Shape(cluster_bits=12, data_file="raw" if raw == "on" else "cooked"))
    with one.suspended() as image:
        moved, named = tmp_path / "moved.data", tmp_path / "disk.data"
        moved.hardlink_to(named)
        qemu.qemu_img("amend", "-o", f"data_file={moved}", image)
        named.unlink()
    one.verify()
    one.write(12, 5000, MIB)
    with one.suspended() as image:
        qemu.qemu_img("amend", "-o", "data_file_raw=off", image)
    one.write(13, 512, MIB)
    one.end()


# Dirty bitmaps


def test_bitmaps_record_from_when_they_are_added_until_they_are_removed(disk: Make) -> None:
    one = disk()
    with one.suspended() as image:
        qemu.qemu_img("bitmap", "--add", "-g", str(GRANULE), image, "one")
        qemu.qemu_img("bitmap", "--add", "-g", str(GRANULE), image, "two")
    one.write(14, 2 * GRANULE, 10)
    with one.suspended() as image:
        assert _dirty(image) == {"one": {2}, "two": {2}}
        qemu.qemu_img("bitmap", "--clear", image, "one")
        qemu.qemu_img("bitmap", "--disable", image, "two")
    one.write(15, 5 * GRANULE - 1, 2)
    with one.suspended() as image:
        assert _dirty(image) == {"one": {4, 5}, "two": {2}}
        qemu.qemu_img("bitmap", "--enable", image, "two")
        qemu.qemu_img("bitmap", "--disable", image, "one")
    one.write(16, 9 * GRANULE, 10)
    with one.suspended() as image:
        assert _dirty(image) == {"one": {4, 5}, "two": {2, 9}}
        qemu.qemu_img("bitmap", "--merge", "one", image, "two")
        qemu.qemu_img("bitmap", "--remove", image, "one")
    one.write(17, 20 * GRANULE, GRANULE)
    with one.suspended() as image:
        assert _dirty(image) == {"two": {2, 4, 5, 9, 20}}
        qemu.qemu_img("resize", image, "5M")
    one.content.extend(bytes(MIB))
    one.nbd.close()
    one.nbd = NbdClient.unix(one.life.socket(NAME))
    one.write(18, 5 * MIB - 512, 512)
    with one.suspended() as image:
        assert _dirty(image)["two"] >= {2, 4, 5, 9, 20, 79}
        qemu.qemu_img("bitmap", "--remove", image, "two")
    one.write(19, 0, 512)
    with one.suspended() as image:
        assert not _dirty(image)
    one.end()


def _dirty(path: Path) -> dict[str, set[int]]:
    """The granules that each bitmap says were changed; none is in use."""
    image = SlowImage(path.read_bytes())
    assert not any(bitmap.flags & 1 for bitmap in image.bitmaps())
    return {
        bitmap.name: {n for n, dirty in enumerate(image.dirty_ranges(bitmap)) if dirty} for bitmap in image.bitmaps()
    }
