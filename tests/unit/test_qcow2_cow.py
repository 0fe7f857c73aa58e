"""Copy on write: which clusters need a copy, and what is copied to the new cluster."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blkloom.image.qcow2.format.geometry import Geometry
from blkloom.image.qcow2.format.tables import ALL_ZERO, COMPRESSED, COPIED, Layout, host_clusters
from blkloom.image.qcow2.write.cow import Copier, Payload
from blkloom.image.qcow2.write.write_classification import (
    BAD,
    COPY,
    IN_PLACE,
    READY,
    ZEROS,
    classify_writes,
    touched_by,
)
from blkloom.image.runs import runs_alike
from blkloom.image.types import GuestOffset
from qcow2_python_engine import Disk, Guest, allocated, check, create

HOST = 0x50000
PLAIN = Layout(Geometry(16), 3, False)
EXTERNAL = Layout(Geometry(16), 3, True)
EXTENDED = Layout(Geometry(16, True), 3, False)
SOME = 0x0000_00FF
KIB = 1 << 10


@pytest.mark.parametrize(
    ("entry", "alone", "over_data"),
    [
        (0, ZEROS, COPY),
        (ALL_ZERO, ZEROS, ZEROS),
        (HOST | COPIED, READY, READY),
        (HOST, COPY, COPY),
        (HOST | COPIED | ALL_ZERO, IN_PLACE, IN_PLACE),
        (HOST | ALL_ZERO, ZEROS, ZEROS),
        (COMPRESSED | HOST, COPY, COPY),
        (HOST | COPIED | 2, BAD, BAD),
        (0x51200 | COPIED, BAD, BAD),
    ],
)
def test_what_a_cluster_needs_before_it_may_be_written(entry: int, alone: int, over_data: int) -> None:
    entries = np.array([entry], np.uint64)
    assert classify_writes(PLAIN, entries, None, None, None).tolist() == [alone]
    assert classify_writes(PLAIN, entries, None, None, np.array([False])).tolist() == [over_data]
    assert classify_writes(PLAIN, entries, None, None, np.array([True])).tolist() == [alone]


def test_version_2_knows_no_zero_clusters() -> None:
    layout = Layout(Geometry(16), 2, False)
    assert classify_writes(layout, np.array([ALL_ZERO], np.uint64), None, None, None).tolist() == [BAD]


def test_an_external_data_file_may_hold_data_at_its_start() -> None:
    entries = np.array([COPIED, 0, COPIED | ALL_ZERO], np.uint64)
    assert classify_writes(EXTERNAL, entries, None, None, None).tolist() == [READY, ZEROS, IN_PLACE]
    assert host_clusters(EXTERNAL, entries).size == 0, "its clusters are not counted"


@pytest.mark.parametrize(
    ("entry", "bitmap", "units", "wanted"),
    [
        (0, 0, (0, 1), ZEROS),
        (0, SOME << 32, (0, 1), ZEROS),
        (HOST | COPIED, SOME, (0, 8), READY),
        (HOST | COPIED, SOME, (0, 9), IN_PLACE),
        (HOST | COPIED, SOME << 32, (0, 1), IN_PLACE),
        (HOST, SOME, (0, 8), COPY),
        (HOST, 0xFFFF_FFFF << 32, (0, 8), ZEROS),
        (COMPRESSED | HOST, 0, (0, 1), COPY),
        (HOST | COPIED, 1 | 1 << 32, (4, 5), BAD),
        (0, 1, (4, 5), BAD),
    ],
)
def test_what_subclusters_need(entry: int, bitmap: int, units: tuple[int, int], wanted: int) -> None:
    touched = touched_by(*units, 0, 1)
    found = classify_writes(EXTENDED, np.array([entry], np.uint64), np.array([bitmap], np.uint64), touched, None)
    assert found.tolist() == [wanted]


def test_touched_subclusters_of_a_write_over_several_clusters() -> None:
    touched = touched_by(32 * 5 + 30, 32 * 7 + 2, 5, 3)
    assert [np.flatnonzero(row).tolist() for row in touched] == [[30, 31], list(range(32)), [0, 1]]


def test_every_host_cluster_a_compressed_one_touches_is_referred_to() -> None:
    shift = 62 - (16 - 8)
    within = COMPRESSED | 3 << shift | 0x20000
    across = COMPRESSED | 3 << shift | 0x2FE00 + 100
    entries = np.array([within, HOST | COPIED, across, 0], np.uint64)
    assert sorted(host_clusters(PLAIN, entries).tolist()) == [2, 2, 3, 5]


def test_neighbours_alike() -> None:
    assert list(runs_alike(np.array([1, 1, 3, 3, 3, 0], np.uint8))) == [(1, 0, 2), (3, 2, 5), (0, 5, 6)]


def _copier(old: bytes) -> tuple[Disk, Copier, list[tuple[int, int]]]:
    disk, reads = Disk(bytearray(len(old))), []

    def read(offset: GuestOffset, length: int) -> bytes:
        reads.append((offset, length))
        return old[offset : offset + length]

    return disk, Copier(disk, read), reads  # type: ignore[arg-type]


def test_the_old_contents_with_the_write_over_them_go_in_one_piece() -> None:
    disk, copier, reads = _copier(b"o" * 4096)
    copier.fill(0, 4096, 0, Payload(GuestOffset(512), 1024, lambda: b"n" * 1024), zeroed=True)
    assert disk.data == b"o" * 512 + b"n" * 1024 + b"o" * 2560
    assert reads == [(0, 4096)]
    assert [event[0] for event in disk.log] == ["write"]


def test_what_is_written_whole_is_not_read() -> None:
    disk, copier, reads = _copier(b"o" * 4096)
    copier.fill(1024, 2048, 1024, Payload(GuestOffset(0), 4096, lambda: bytes(range(256)) * 16), zeroed=False)
    assert reads == []
    assert disk.data[1024:2048] == bytes(range(256)) * 4


def test_without_the_write_at_hand_all_of_the_old_contents_are_copied() -> None:
    disk, copier, _ = _copier(b"o" * 4096)
    copier.fill(0, 4096, 0, Payload(GuestOffset(512), 1024, None), zeroed=True)
    assert disk.data == b"o" * 4096


def test_zeros_are_not_written_over_zeros() -> None:
    disk, copier, _ = _copier(bytes(4096))
    copier.fill(0, 4096, 0, Payload(GuestOffset(0), 512, None), zeroed=True)
    assert disk.log == []
    copier.fill(0, 4096, 0, Payload(GuestOffset(0), 512, None), zeroed=False)
    assert disk.log == [("write", 0, 4096)]


@pytest.mark.parametrize("options", [[], ["extended_l2=on"]], ids=["clusters", "subclusters"])
def test_a_write_over_a_backing_file_keeps_what_it_does_not_cover(tmp_path: Path, options: list[str]) -> None:
    below = bytes(range(1, 129)) * (2 * KIB)
    guest = Guest(create(tmp_path, 512 * KIB, *options).read_bytes(), backing=below)
    guest.write(100 * KIB + 5, b"new" * 1000)
    expected = bytearray(below.ljust(512 * KIB, b"\0"))
    expected[100 * KIB + 5 : 100 * KIB + 5 + 3000] = b"new" * 1000
    assert guest.read(0, guest.size) == expected
    assert allocated(guest) == 1
    assert not check(guest.close(), tmp_path)


def test_only_touched_subclusters_are_copied(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, 512 * KIB, "extended_l2=on").read_bytes(), backing=b"b" * (512 * KIB))
    guest.write(3 * KIB, b"n" * 100)
    assert guest.writer.copier.copied == 2 * KIB
    guest.write(64 * KIB, b"n" * (64 * KIB))
    assert guest.writer.copier.copied == 2 * KIB, "a whole cluster needs no copy"
    guest.write(5 * KIB, b"m" * (2 * KIB))
    assert guest.read(0, 8 * KIB) == b"b" * 3072 + b"n" * 100 + b"b" * 1948 + b"m" * 2048 + b"b" * 1024
    assert not check(guest.close(), tmp_path)


def test_a_write_to_a_version_2_image_over_a_backing_file_needs_no_zero_flag(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, 512 * KIB, "compat=0.10").read_bytes(), backing=b"b" * (100 * KIB))
    guest.write(64 * KIB, b"n" * 512)
    guest.write(400 * KIB, b"n" * 512)
    assert guest.read(64 * KIB, 64 * KIB) == b"n" * 512 + b"b" * (36 * KIB - 512) + bytes(28 * KIB)
    assert guest.read(384 * KIB, 64 * KIB) == bytes(16 * KIB) + b"n" * 512 + bytes(48 * KIB - 512)
    assert not check(guest.close(), tmp_path)
