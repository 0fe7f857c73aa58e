"""Writes that are prepared together share clusters, runs and copies; a failed one does not affect the others."""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path
from typing import Any

import pytest

from blkloom.image.errors import CorruptImage
from blkloom.image.qcow2.format.tables import COPIED, OFFSET_MASK
from blkloom.image.qcow2.state.refcounts import Refcounts
from blkloom.image.qcow2.write.writer import Options
from qcow2_python_engine import Guest, allocated, check, create

KIB = 1 << 10
MIB = 1 << 20
CLUSTER = 64 * KIB
ALONE = Options(preallocate=0)


def _write(guest: Guest, *offsets: int) -> None:
    """512 bytes at each, all together."""
    guest.write_together([(offset, bytes([number + 1]) * 512) for number, offset in enumerate(offsets)])
    for number, offset in enumerate(offsets):
        assert guest.read(offset, 512) == bytes([number + 1]) * 512


def _hosts(guest: Guest) -> list[int]:
    """Where the guest's clusters are, by host cluster number, in the guest's order; those without a place left out."""
    tables = [table for index in range(len(guest.image.l1)) if (table := guest.image.l2(index)) is not None]  # type: ignore[arg-type]
    entries = [int(entry) for table in tables for entry in table.entries]
    assert all(entry & COPIED for entry in entries if entry)
    return [(entry & OFFSET_MASK) // CLUSTER for entry in entries if entry]


def test_windows_all_over_the_disk_get_one_run_and_one_change_of_refcounts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = Guest(create(tmp_path, 2048 * MIB).read_bytes())
    guest.write(0, b"x" * 512)  # which makes the first L2 table
    changes: list[tuple[int, int]] = []
    change = Refcounts.set

    def count(refcounts: Refcounts, first: int, number: int, value: int) -> None:
        changes.append((number, value))
        change(refcounts, first, number, value)

    monkeypatch.setattr(Refcounts, "set", count)
    _write(guest, 32 * MIB, 600 * MIB, 24 * MIB + 5, 40 * MIB, 1500 * MIB)
    assert guest.together == 5
    assert sorted(changes) == [(1, 1), (1, 1), (5 * 64, 1)], "two L2 tables, and all data at once"
    assert allocated(guest) == 256 + 5 * 64
    monkeypatch.undo()
    assert not check(guest.close(), tmp_path)


def test_writes_to_one_window_share_it(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, 64 * MIB).read_bytes())
    _write(guest, 5 * MIB, 7 * MIB, 5 * MIB + 512, 4 * MIB, 5 * MIB + CLUSTER)
    assert (guest.together, allocated(guest), guest.faults) == (5, 64, 0)
    image = guest.close()
    assert not check(image, tmp_path)
    assert allocated(Guest(image)) == 4, "clusters that were not written are freed"


def test_a_window_is_given_as_far_as_it_is_free(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, 64 * MIB).read_bytes(), options=ALONE)
    guest.write(4 * MIB + 10 * CLUSTER, b"x" * 512)
    guest.write(4 * MIB + 20 * CLUSTER, b"y" * 512)
    again = Guest(guest.close())
    _write(again, 4 * MIB + 15 * CLUSTER, 4 * MIB + 5 * CLUSTER, 4 * MIB + 17 * CLUSTER)
    assert (again.together, allocated(again)) == (2, 2 + 9 + 10), (
        "the write before the data is left to be prepared by itself"
    )
    assert again.read(4 * MIB + 10 * CLUSTER, 512) == b"x" * 512
    assert again.read(4 * MIB + 20 * CLUSTER, 512) == b"y" * 512
    assert not check(again.close(), tmp_path)


def test_writes_into_a_cluster_of_the_backing_file_share_one_copy(tmp_path: Path) -> None:
    below = bytes(range(1, 251)) * (1 * MIB // 250 + 1)
    guest = Guest(create(tmp_path, 1 * MIB).read_bytes(), backing=below[: 1 * MIB])
    _write(guest, 3 * CLUSTER, 3 * CLUSTER + 4096, 9 * CLUSTER + 100, 3 * CLUSTER + 512)
    assert guest.together == 4
    assert guest.writer.copier.copied == 2 * CLUSTER
    hosts = _hosts(guest)
    assert hosts == [hosts[0], hosts[0] + 1]
    assert guest.read(3 * CLUSTER + 8192, 512) == below[3 * CLUSTER + 8192 :][:512]
    assert not check(guest.close(), tmp_path)


def test_a_snapshot_s_cluster_is_copied_too(tmp_path: Path) -> None:
    path = create(tmp_path, 1 * MIB)
    first = Guest(path.read_bytes(), options=ALONE)
    first.write(0, b"old" * 50000)
    path.write_bytes(first.close())
    subprocess.run(["qemu-img", "snapshot", "-c", "kept", str(path)], check=True)
    guest = Guest(path.read_bytes(), options=ALONE)
    _write(guest, CLUSTER, 512, 2048)
    assert guest.together == 3
    assert guest.read(3000, 300) == (b"old" * 50000)[3000:3300]
    guest.flush()
    path.write_bytes(guest.close())
    assert not check(path.read_bytes(), tmp_path)
    subprocess.run(["qemu-img", "snapshot", "-a", "kept", str(path)], check=True)
    assert Guest(path.read_bytes()).read(0, 150000) == b"old" * 50000


def test_a_cluster_that_cannot_be_copied_fails_the_writes_to_it_and_no_other(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, 1 * MIB).read_bytes(), backing=b"x" * CLUSTER)
    guest.quick_copy.fails = True
    writes = [(0, 512), (3 * CLUSTER, 512), (600, 512)]
    assert guest.prepare_together(writes) == [1]
    with pytest.raises(OSError, match="told to fail"):
        guest.write(0, b"y" * 512)
    guest.quick_copy.fails = False
    assert guest.prepare_together(writes) == [0, 2]
    guest.write(0, b"y" * 512)
    assert not check(guest.close(), tmp_path), "no cluster is lost"


def test_where_space_is_short_some_find_it_and_the_others_are_told(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, 1024 * MIB).read_bytes())
    guest.write(0, b"x" * 512)
    guest.disk.full_at = guest.disk.size()
    offsets = [number * 4 * MIB for number in range(1, 100)]
    ready = guest.prepare_together([(offset, 512) for offset in offsets])
    assert len(ready) < len(offsets)
    errors: list[int | None] = []
    for offset in offsets:
        try:
            guest.write(offset, b"y" * 512)
        except OSError as error:
            errors.append(error.errno)
        else:
            assert guest.read(offset, 512) == b"y" * 512
    assert set(errors) == {errno.ENOSPC}
    guest.disk.full_at = 1 << 62
    _write(guest, *offsets)
    assert not check(guest.close(), tmp_path)


def test_clusters_that_are_no_holes_are_zeroed_before_they_are_given(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, 64 * MIB).read_bytes())
    guest.write(0, b"x" * 4 * MIB)
    guest.writer.discard(0, 4 * MIB)
    guest.flush()
    guest.check_all()
    guest.disk.holes = False
    _write(guest, 45 * MIB, 32 * MIB, 45 * MIB + 512)
    assert guest.together == 3
    assert guest.read(0, 45 * MIB - CLUSTER) == bytes(32 * MIB) + b"\2" * 512 + bytes(13 * MIB - CLUSTER - 512)
    assert guest.read(45 * MIB + 1024, 3 * MIB - 1024) == bytes(3 * MIB - 1024)
    assert not check(guest.close(), tmp_path)


def test_a_cluster_that_cannot_be_zeroed_is_not_lost(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, 64 * MIB).read_bytes())
    guest.write(0, b"x" * 4 * MIB)
    guest.writer.discard(0, 4 * MIB)
    guest.flush()
    guest.check_all()
    guest.disk.holes = False
    zero = guest.disk.zero

    def fails(*_: Any) -> None:
        raise OSError(errno.EIO, "told to fail")

    guest.disk.zero = fails  # type: ignore[method-assign]
    with pytest.raises(OSError, match="told to fail"):
        guest.prepare_together([(45 * MIB, 512), (32 * MIB, 512)])
    guest.disk.zero = zero  # type: ignore[method-assign]
    _write(guest, 45 * MIB, 32 * MIB)
    assert not check(guest.close(), tmp_path)


def test_a_corrupt_table_marks_the_image_and_gives_nothing(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, 1024 * MIB).read_bytes())
    guest.write(600 * MIB, b"x" * 512)
    image = bytearray(guest.close())
    guest = Guest(bytes(image))
    guest.image.l1[0] = guest.image.header.l1_offset | COPIED  # an L2 table where the L1 table is
    with pytest.raises(CorruptImage):
        guest.writer.prepare_writes([(600 * MIB + 4 * MIB, 512), (0, 512)])
    assert guest.writer.broken
    assert guest.writer.prepare_writes([(600 * MIB + 8 * MIB, 512), (700 * MIB, 512)]) == []


def test_writes_of_zeros_that_free_clusters_are_left_to_be_looked_at(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, 64 * MIB).read_bytes(), options=Options(compact_zeroes=True))
    guest.write_together([(0, bytes(512)), (8 * MIB, bytes(512))])
    assert (guest.together, allocated(guest)) == (0, 0)
