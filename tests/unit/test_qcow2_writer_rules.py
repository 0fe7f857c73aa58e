"""The whole writer: preallocated clusters and their release, discards, header bits, corruption, a full disk."""

from __future__ import annotations

import errno
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from blkloom.errors import FaultError
from blkloom.image.errors import CorruptImage
from blkloom.image.qcow2.format.header import Incompatible, encode_fields, parse
from blkloom.image.qcow2.write.writer import Options
from blkloom.image.types import HostOffset
from qcow2_python_engine import Guest, allocated, check, create

KIB = 1 << 10
MIB = 1 << 20
ALONE = Options(preallocate=0)


def _with_header(image: bytes, **changes: int) -> bytes:
    header = replace(parse(image[: 1 << 16], path="test"), **changes)
    fields = encode_fields(header)
    return fields + image[len(fields) :]


# Ahead


def test_neighbours_that_read_as_zeros_get_places_with_a_write(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, 64 * MIB).read_bytes())
    guest.write(5 * MIB, b"x" * 512)
    assert allocated(guest) == 64
    assert guest.faults == 1
    for at in range(4 * MIB, 8 * MIB, 64 * KIB):
        guest.write(at, b"y" * 512)
    assert guest.faults == 1, "the neighbours are the engine's alone"


def faults_in_order(guest: Guest) -> list[int]:
    """The clusters of 64 KiB at which someone who fills the disk in order comes to a fault."""
    found = []
    for cluster in range(guest.size // (64 * KIB)):
        before = guest.faults
        guest.write(cluster * 64 * KIB, b"x" * 512)
        if guest.faults > before:
            found.append(cluster)
    return found


def test_who_writes_on_and_on_gets_four_times_as_many_each_time_and_64_times_as_many_in_the_end(
    tmp_path: Path,
) -> None:
    guest = Guest(create(tmp_path, 32 * MIB).read_bytes(), options=Options(preallocate=128 * KIB))
    assert faults_in_order(guest) == [0, 8, 32, 128, 256, 384]


def test_where_places_must_be_written_with_zeros_no_more_are_given_for_writing_on(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, 4 * MIB).read_bytes(), options=Options(preallocate=128 * KIB))
    guest.write(0, b"x" * (4 * MIB))
    guest.writer.discard(0, 4 * MIB)
    guest.flush()
    guest.disk.holes = False
    assert faults_in_order(guest) == list(range(0, 64, 2))
    assert not check(guest.close(), tmp_path)


def test_what_was_given_ahead_and_never_written_is_taken_out_at_the_end(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, 64 * MIB).read_bytes())
    guest.write(5 * MIB, b"x" * 512)
    guest.write(7 * MIB + 512, b"y" * 512)
    guest.flush()
    image = guest.close()
    assert not check(image, tmp_path)
    assert guest.writer.preallocation.returned == 62
    again = Guest(image)
    assert allocated(again) == 2
    assert again.read(7 * MIB, 2 * KIB) == bytes(512) + b"y" * 512 + bytes(1024)


def test_a_crash_leaves_what_was_given_ahead_as_zeros(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, 64 * MIB).read_bytes())
    guest.write(5 * MIB, b"x" * 512)
    guest.flush()
    image = guest.crash()
    assert not check(image, tmp_path)
    assert Guest(image).read(4 * MIB, 4 * MIB) == bytes(MIB) + b"x" * 512 + bytes(3 * MIB - 512)


def test_nothing_is_given_ahead_where_the_backing_file_has_data(tmp_path: Path) -> None:
    backing = b"b" * (6 * MIB)
    guest = Guest(create(tmp_path, 64 * MIB).read_bytes(), backing=backing)
    guest.write(5 * MIB, b"x" * 512)
    assert allocated(guest) == 1
    guest.write(7 * MIB, b"x" * 512)
    assert allocated(guest) == 1 + 32, "past the backing file's end there are zeros"
    assert guest.read(6 * MIB - 512, MIB + 1024) == b"b" * 512 + bytes(MIB) + b"x" * 512
    image = guest.close()
    assert not check(image, tmp_path)
    assert Guest(image, backing=backing).read(6 * MIB, MIB) == bytes(MIB)


def test_discarded_clusters_given_ahead_are_not_taken_out_twice(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, 64 * MIB).read_bytes())
    guest.write(5 * MIB, b"x" * 512)
    guest.writer.discard(4 * MIB, 4 * MIB)
    guest.write(4 * MIB, b"z" * 100)
    assert not check(guest.close(), tmp_path)


@pytest.mark.parametrize("ahead", [0, 4 * MIB])
def test_where_there_are_no_holes_old_data_is_cleared_before_its_place_is_used_again(
    tmp_path: Path, ahead: int
) -> None:
    guest = Guest(create(tmp_path, 4 * MIB).read_bytes(), options=Options(preallocate=ahead))
    guest.disk.holes = False
    guest.write(0, b"secret" * 40000)
    guest.writer.discard(0, 4 * MIB)
    guest.flush()
    assert b"secret" in guest.crash()
    guest.write(MIB, b"x")
    assert guest.read(0, 4 * MIB) == bytes(MIB) + b"x" + bytes(3 * MIB - 1)
    image = guest.close()
    assert not check(image, tmp_path)
    assert Guest(image).read(0, 4 * MIB) == bytes(MIB) + b"x" + bytes(3 * MIB - 1)


# Zeros and discards


@pytest.mark.parametrize("may_unmap", [True, False], ids=["unmap", "keep"])
@pytest.mark.parametrize("backing", [None, b"b" * (2 * MIB)], ids=["alone", "backed"])
@pytest.mark.parametrize(
    "options", [[], ["compat=0.10"], ["extended_l2=on"], ["cluster_size=4k"]], ids=["v3", "v2", "extended", "small"]
)
def test_zeros_are_zeros(tmp_path: Path, options: list[str], backing: bytes | None, may_unmap: bool) -> None:
    guest = Guest(create(tmp_path, 2 * MIB, *options).read_bytes(), backing=backing)
    expected = bytearray(backing or bytes(2 * MIB))
    for at, length in [(0, 200 * KIB), (MIB, 64 * KIB), (MIB + 256 * KIB, 10)]:
        guest.write(at, b"x" * length)
        expected[at : at + length] = b"x" * length
    for at, length in [(100 * KIB + 7, 64 * KIB), (MIB - 3 * KIB, 200 * KIB), (2 * MIB - 100 * KIB, 100 * KIB)]:
        guest.writer.write_zeroes(at, length, may_unmap=may_unmap)
        expected[at : at + length] = bytes(length)
    assert guest.read(0, 2 * MIB) == expected
    guest.write(MIB + 5, b"again")
    expected[MIB + 5 : MIB + 10] = b"again"
    image = guest.close()
    assert not check(image, tmp_path)
    assert Guest(image, backing=backing).read(0, 2 * MIB) == expected


def test_zeros_that_may_not_unmap_keep_their_place(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, MIB).read_bytes(), options=ALONE)
    guest.write(0, b"x" * (128 * KIB))
    host = guest.entry(0)
    guest.writer.write_zeroes(0, 64 * KIB, may_unmap=False)
    assert allocated(guest) == 2
    guest.write(5, b"y")
    assert guest.entry(0) == host
    assert guest.read(0, 16) == bytes(5) + b"y" + bytes(10)


def test_a_discard_gives_space_back_and_nothing_below_shows_through(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, MIB).read_bytes(), backing=b"b" * MIB, options=ALONE)
    guest.write(0, b"x" * (256 * KIB))
    guest.writer.discard(10, 256 * KIB - 20)
    assert allocated(guest) == 2, "clusters covered in part stay"
    assert guest.read(64 * KIB, 128 * KIB) == bytes(128 * KIB)
    assert guest.read(0, 64 * KIB) == b"x" * (64 * KIB)
    assert not check(guest.close(), tmp_path)
    assert guest.writer.allocator.freed == 2


def test_a_version_2_image_over_a_backing_file_does_not_discard(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, MIB, "compat=0.10").read_bytes(), backing=b"b" * MIB, options=ALONE)
    guest.write(0, b"x" * (256 * KIB))
    guest.writer.discard(0, MIB)
    assert guest.read(0, 256 * KIB) == b"x" * (256 * KIB), "the old data of the backing file must not come back"
    with pytest.raises(FaultError) as caught:
        guest.writer.write_zeroes(0, MIB, may_unmap=True, fast=True)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_discards_can_be_ignored(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, MIB).read_bytes(), options=Options(preallocate=0, discard=False))
    guest.write(0, b"x" * (256 * KIB))
    guest.writer.discard(0, 256 * KIB)
    assert guest.read(0, 256 * KIB) == b"x" * (256 * KIB)
    guest.writer.write_zeroes(0, 256 * KIB, may_unmap=True)
    assert guest.read(0, 256 * KIB) == bytes(256 * KIB)
    assert allocated(guest) == 4


def test_zeros_written_as_data_can_be_kept_out_of_the_image(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, MIB).read_bytes(), options=Options(preallocate=0, compact_zeroes=True))
    guest.write(0, bytes(256 * KIB))
    assert allocated(guest) == 0
    guest.write(0, bytes(KIB) + b"x")
    assert allocated(guest) == 1


# Snapshots and compressed clusters


@pytest.mark.parametrize("options", [[], ["extended_l2=on"], ["cluster_size=512"]], ids=["plain", "extended", "small"])
def test_a_snapshot_keeps_what_it_holds(tmp_path: Path, options: list[str]) -> None:
    path = create(tmp_path, MIB, *options)
    subprocess.run(["qemu-io", "-c", "write -P 7 0 600k", str(path)], check=True, capture_output=True)
    subprocess.run(["qemu-img", "snapshot", "-c", "then", str(path)], check=True)
    guest = Guest(path.read_bytes())
    guest.write(100 * KIB, b"n" * (100 * KIB))
    guest.writer.discard(300 * KIB, 100 * KIB)
    guest.writer.write_zeroes(500 * KIB, 50 * KIB + 3, may_unmap=False)
    path.write_bytes(guest.close())
    assert not check(path.read_bytes(), tmp_path)
    flat = tmp_path / "then.raw"
    subprocess.run(["qemu-img", "convert", "-l", "then", "-O", "raw", str(path), str(flat)], check=True)
    assert flat.read_bytes() == b"\7" * (600 * KIB) + bytes(MIB - 600 * KIB)


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_a_write_to_a_compressed_cluster_unpacks_it(tmp_path: Path, kind: str) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(range(256)) * (4 * KIB))
    path = tmp_path / "packed.qcow2"
    words = ["convert", "-c", "-O", "qcow2", "-o", f"compression_type={kind}", str(raw), str(path)]
    subprocess.run(["qemu-img", *words], check=True)
    guest = Guest(path.read_bytes())
    expected = bytearray(raw.read_bytes())
    for at in range(100, MIB - 512, 150 * KIB):
        guest.write(at, b"n" * 512)
        expected[at : at + 512] = b"n" * 512
    assert guest.read(0, MIB) == expected
    image = guest.close()
    assert not check(image, tmp_path)
    assert Guest(image).read(0, MIB) == expected


def test_an_end_that_failed_can_be_tried_again(tmp_path: Path) -> None:
    path = create(tmp_path, 4 * MIB, "lazy_refcounts=on")
    subprocess.run(["qemu-img", "bitmap", "--add", str(path), "seen"], check=True)
    fresh = path.read_bytes()
    steps = 0
    while True:
        guest = Guest(fresh)
        guest.write(MIB, b"x" * 512)
        guest.disk.fails = steps
        try:
            guest.close()
            break
        except OSError:
            guest.disk.fails = None
        guest.write(2 * MIB, b"y" * 512)
        image = guest.close()
        assert not check(image, tmp_path), f"step {steps}"
        again = Guest(image)
        assert again.read(2 * MIB, 512) == b"y" * 512
        bitmap = again.writer.bitmaps.all[0]
        bits = int.from_bytes(again.writer.bitmaps.bits_of(bitmap).tobytes(), "little")
        assert bits & (1 << 16 | 1 << 32) == 1 << 16 | 1 << 32, f"step {steps}"
        steps += 1
    assert steps > 8


# The header


def test_unknown_autoclear_bits_go_before_anything_is_written(tmp_path: Path) -> None:
    image = _with_header(create(tmp_path, MIB).read_bytes(), autoclear=1 << 40)
    guest = Guest(image)
    assert parse(guest.crash()[: 1 << 16], path="").autoclear == 0
    assert [event[0] for event in guest.disk.log][-2:] == ["write", "sync"]


def test_an_image_without_writes_stays_as_it_is(tmp_path: Path) -> None:
    image = create(tmp_path, MIB, "lazy_refcounts=on").read_bytes()
    guest = Guest(image)
    guest.read(0, MIB)
    guest.writer.flush()
    assert guest.close() == image


def test_a_dirty_image_is_repaired_in_the_background(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, MIB, "lazy_refcounts=on", "cluster_size=512").read_bytes(), options=ALONE)
    guest.write(0, b"x" * (40 * KIB))
    guest.writer.discard(0, 4 * KIB)
    guest.flush()
    guest.write(60 * KIB, b"y" * KIB)
    crashed = guest.crash()
    assert parse(crashed[:512], path="").incompatible & Incompatible.DIRTY
    assert "ERROR" in check(crashed, tmp_path), "its counts are behind"
    again = Guest(crashed)
    again.check_all()
    assert not check(again.crash(), tmp_path), "they are exact, and nothing leaks"
    again.write(0, b"z" * KIB)
    assert again.read(4 * KIB, 36 * KIB) == b"x" * (36 * KIB)
    assert not check(again.close(), tmp_path)


# What is wrong


def test_data_over_metadata_is_found_and_the_image_only_read_from_then_on(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, MIB).read_bytes(), options=ALONE)
    guest.write(0, b"x" * (64 * KIB))
    image = bytearray(guest.close())
    header = parse(bytes(image[: 1 << 16]), path="")
    l2 = int.from_bytes(image[header.l1_offset : header.l1_offset + 8], "big") & ~(1 << 63)
    image[l2 : l2 + 8] = (header.l1_offset | 1 << 63).to_bytes(8, "big")
    guest = Guest(bytes(image))
    with pytest.raises(CorruptImage, match="metadata"):
        guest.write(0, b"y" * 512)
    assert (
        guest.disk.data[header.l1_offset : header.l1_offset + 512] == image[header.l1_offset : header.l1_offset + 512]
    )
    assert parse(guest.crash()[: 1 << 16], path="").incompatible & Incompatible.CORRUPT
    with pytest.raises(OSError, match="corrupt") as caught:
        guest.write(512 * KIB, b"y" * 512)
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError, match="corrupt"):
        guest.writer.discard(0, MIB)
    guest.writer.flush()
    guest.close()


def test_an_l1_table_that_counts_as_free_is_not_written_over(tmp_path: Path) -> None:
    image = bytearray(create(tmp_path, MIB).read_bytes())
    header = parse(bytes(image[: 1 << 16]), path="")
    table = header.refcount_table_offset
    block = int.from_bytes(image[table : table + 8], "big")
    at = block + (header.l1_offset >> 16) * 2
    image[at : at + 2] = bytes(2)
    guest = Guest(bytes(image))
    guest.write(0, b"x")
    with pytest.raises(CorruptImage, match=f"{header.l1_offset:#x} is in use, and free by its refcount"):
        guest.check_all()
    assert guest.read(0, 1) == b"x"
    with pytest.raises(OSError, match="corrupt"):
        guest.write(0, b"y")


# A full disk


def test_neighbours_are_left_out_where_space_is_short(tmp_path: Path) -> None:
    def reserve(offset: HostOffset, length: int) -> None:
        if length > 64 * KIB:
            raise OSError(errno.ENOSPC, "full")

    guest = Guest(create(tmp_path, 64 * MIB).read_bytes(), allocating=reserve)
    guest.write(5 * MIB, b"x" * 512)
    assert allocated(guest) == 1
    assert not check(guest.close(), tmp_path)


def test_a_full_disk_fails_the_write_and_nothing_else(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, 64 * MIB, "cluster_size=4k").read_bytes(), options=ALONE)
    guest.write(0, b"x" * 4096)
    guest.disk.full_at = guest.disk.size()
    with pytest.raises(OSError, match="full") as caught:
        guest.write(MIB, b"y" * (32 * MIB))
    assert caught.value.errno == errno.ENOSPC
    guest.write(0, b"z" * 4096)
    guest.writer.discard(MIB, MIB)
    guest.flush()
    guest.write(32 * MIB, b"z" * 4096)
    guest.disk.full_at = 1 << 40
    guest.write(33 * MIB, b"z" * 4096)
    assert guest.read(32 * MIB, 4096) == b"z" * 4096
    assert not check(guest.close(), tmp_path)


def test_changed_tables_are_written_before_they_are_too_many(tmp_path: Path) -> None:
    options = Options(preallocate=0, dirty_limit=4 * 512)
    guest = Guest(create(tmp_path, 4 * MIB, "cluster_size=512").read_bytes(), options=options)
    for at in range(0, 4 * MIB, 32 * KIB):
        guest.write(at, b"x" * 512)
        assert guest.writer._write_back.held <= 5 * 512
    assert not check(guest.close(), tmp_path)
