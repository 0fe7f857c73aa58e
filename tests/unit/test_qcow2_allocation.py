"""Allocation: lowest free clusters first, contents are zeros, never metadata, and no reuse before a flush."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from blkloom.image.errors import CorruptImage
from blkloom.image.qcow2.state.refcounts import Refcounts
from blkloom.image.qcow2.write.allocation import Allocator, Run, runs_of
from blkloom.image.types import HostOffset
from qcow2_python_engine import Disk

BITS = 9
CLUSTER = 1 << BITS


def allocator(
    disk: Disk, *, used: int = 8, metadata: str = "", order: int = 4, direct: bool = False
) -> tuple[Refcounts, Allocator]:
    """Over a file of `used` clusters in use: header, refcount table, block, others."""
    disk.truncate(used << BITS)
    counts = Refcounts(
        disk,  # type: ignore[arg-type]
        cluster_bits=BITS,
        order=order,
        table_offset=HostOffset(CLUSTER),
        table_clusters=1,
    )
    counts.table[0] = 2 << BITS
    counts.set(0, used, 1)
    found = Allocator(
        counts,
        disk,  # type: ignore[arg-type]
        cluster_bits=BITS,
        metadata_in=lambda first, count: metadata if first <= 9 < first + count else "",
        direct=direct,
    )
    return counts, found


def test_new_clusters_lie_behind_the_file_one_after_the_other_and_read_as_zeros() -> None:
    disk = Disk()
    counts, alloc = allocator(disk)
    assert [alloc.take(3), alloc.take(2)] == [Run(8, 3, True), Run(11, 2, True)]
    assert counts.get(8, 6).tolist() == [1] * 5 + [0]
    assert disk.size() >= 13 << BITS


def test_what_is_written_directly_has_space_before() -> None:
    disk = Disk()
    counts, alloc = allocator(disk, direct=True)
    assert alloc.take(3) == Run(8, 3, True)
    assert ("lay out", 8 << BITS, disk.size() - (8 << BITS)) in disk.log
    disk.log.clear()
    alloc.take(1)
    assert not disk.log, "it is there"
    alloc.give_back(np.array([4], np.uint64))
    alloc.settle()
    disk.log.clear()
    assert alloc.take(3) == Run(4, 1, True)
    assert alloc.take(1).first == 12
    assert counts.get(4, 9).tolist() == [1] * 9
    assert [(what, at >> BITS) for what, at, _ in disk.log] == [
        *(("punch", 4), ("lay out", 4)),
        *(("punch", 12), ("lay out", 12)),
    ], "what had space and is looked for anew has it again"


def test_a_file_that_is_written_directly_ends_with_a_cluster() -> None:
    disk = Disk()
    disk.data.extend(bytes((8 << BITS) - 100))
    Allocator(
        None,  # type: ignore[arg-type]
        disk,  # type: ignore[arg-type]
        cluster_bits=BITS,
        metadata_in=lambda first, count: "",
        direct=True,
    )
    assert disk.size() == 8 << BITS


def test_gaps_are_filled_first_and_punched_before_they_are() -> None:
    disk = Disk()
    counts, alloc = allocator(disk, used=20)
    disk.data[5 << BITS : 7 << BITS] = b"x" * (2 * CLUSTER)
    counts.set(5, 2, 0)
    assert alloc.take(4) == Run(5, 2, True)
    assert not any(disk.data[5 << BITS : 7 << BITS])
    assert alloc.take(1).first == 20


def test_where_there_are_no_holes_a_gap_is_not_said_to_be_zeros() -> None:
    disk = Disk(holes=False)
    counts, alloc = allocator(disk, used=20)
    counts.set(5, 2, 0)
    assert alloc.take(2) == Run(5, 2, False)
    assert alloc.take(1).zeroed, "the file's new end is zeros anywhere"


def test_what_was_given_back_is_not_given_out_before_it_is_settled() -> None:
    disk = Disk()
    counts, alloc = allocator(disk)
    run = alloc.take(2)
    alloc.give_back(np.arange(run.first, run.first + run.count, dtype=np.uint64))
    alloc.forget_run()
    assert alloc.take(1).first == 10
    disk.log.clear()
    alloc.settle()
    assert ("punch", 8 << BITS, 2 << BITS) in disk.log
    alloc.forget_run()
    assert alloc.take(5).first == 8
    assert counts.get(8, 3).tolist() == [1, 1, 1]


def test_a_cluster_used_twice_is_free_when_it_was_given_back_twice() -> None:
    counts, alloc = allocator(Disk())
    counts.set(4, 1, 2)
    alloc.give_back(np.array([4], np.uint64))
    alloc.settle()
    assert counts.get(4, 1).tolist() == [1]
    alloc.give_back(np.array([4], np.uint64))
    alloc.settle()
    assert counts.get(4, 1).tolist() == [0]


def test_giving_back_what_is_free_is_corruption() -> None:
    _, alloc = allocator(Disk())
    alloc.give_back(np.array([100], np.uint64))
    with pytest.raises(CorruptImage, match="refcount"):
        alloc.settle()


def test_metadata_that_counts_as_free_is_never_given_out() -> None:
    _, alloc = allocator(Disk(), metadata="the L1 table")
    with pytest.raises(CorruptImage, match="L1 table"):
        alloc.take(1)


@pytest.mark.parametrize("order", range(7))
def test_clusters_beyond_every_block_get_blocks_and_a_larger_table(order: int) -> None:
    disk = Disk()
    counts, alloc = allocator(disk, order=order)
    wanted, seen = 3 * counts.table.size * counts.per_block, set(range(8))
    most = min(wanted, 30000)
    while len(seen) < most:
        run = alloc.take(most)
        new = set(range(run.first, run.first + run.count))
        assert not seen & new, "given out twice"
        seen |= new
    blocks = set(counts.block_clusters().tolist()) - {2}
    assert not seen & blocks
    assert all(counts.get(block, 1)[0] == 1 for block in blocks)
    table = counts.table_offset >> BITS
    assert counts.get(table, counts.table_clusters).tolist() == [1] * counts.table_clusters


def test_a_table_that_moved_gives_its_old_place_back() -> None:
    counts, alloc = allocator(Disk(), order=6)
    while counts.table_offset == CLUSTER:
        alloc.take(64)
    assert counts.get(1, 1).tolist() == [1]
    alloc.settle()
    assert counts.get(1, 1).tolist() == [0]


def test_a_full_block_device_is_full() -> None:
    class Device(Disk):
        def truncate(self, size: int) -> None:
            if self.data:
                raise OSError(errno.EINVAL, "a block device")
            super().truncate(size)

    disk = Device()
    counts, alloc = allocator(disk)
    with pytest.raises(OSError, match="no space") as caught:
        alloc.take(1)
    assert caught.value.errno == errno.ENOSPC
    counts.set(5, 1, 0)
    alloc.forget_run()
    assert alloc.take(1).first == 5
    alloc.trim_file()
    assert disk.size() == 8 << BITS


def test_the_file_ends_behind_its_last_cluster_in_use() -> None:
    disk = Disk()
    _, alloc = allocator(disk)
    alloc.take_back(alloc.take(3))
    alloc.forget_run()
    alloc.take(1)
    alloc.trim_file()
    assert disk.size() == 9 << BITS
    assert alloc.take(1).first == 9


def test_what_the_file_had_is_not_cut_off_even_if_nothing_counts_it() -> None:
    disk = Disk()
    counts, alloc = allocator(disk)
    before = disk.size()
    counts.set(counts.last_used(), 1, 0)
    alloc.trim_file()
    assert disk.size() == before


def test_space_is_reserved_where_that_is_asked_for() -> None:
    def reserve(offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    counts, alloc = allocator(Disk())
    alloc._reserve = reserve
    with pytest.raises(OSError, match="full"):
        alloc.take(4)
    assert counts.get(8, 4).tolist() == [0] * 4, "what was not had does not count"


def test_runs_of_numbers() -> None:
    assert list(runs_of(np.array([1, 2, 3, 7, 9, 10], np.uint64))) == [(1, 3), (7, 1), (9, 2)]
    assert list(runs_of(np.zeros(0, np.uint64))) == []
