"""Refcounts: every width, runs over several blocks, growth of the table, and refused changes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from blkloom.image.errors import CorruptImage
from blkloom.image.qcow2.state.refcounts import Refcounts, Widths
from blkloom.image.types import HostOffset

ORDERS = range(7)


class Bytes:
    """A storage in memory that says what was written, in order."""

    path = "memory"

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.written: list[tuple[int, int]] = []

    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length]).ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        if offset + len(data) > len(self.data):
            self.data.extend(bytes(offset + len(data) - len(self.data)))
        self.data[offset : offset + len(data)] = data
        self.written.append((offset, len(data)))

    def zero(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def punch(self, offset: int, length: int) -> bool:
        self.write(offset, bytes(length))
        return True

    def sync(self) -> None:
        self.written.append((-1, 0))

    def truncate(self, size: int) -> None:
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))


def counts_of(storage: Bytes, order: int, cluster_bits: int = 9, *, table: int = 1, clusters: int = 1) -> Refcounts:
    return Refcounts(
        storage,  # type: ignore[arg-type]
        cluster_bits=cluster_bits,
        order=order,
        table_offset=HostOffset(table << cluster_bits),
        table_clusters=clusters,
    )


def fresh(order: int, cluster_bits: int = 9) -> tuple[Bytes, Refcounts]:
    """Header, table and one block that counts them and itself."""
    storage = Bytes(2 << cluster_bits)
    counts = counts_of(storage, order, cluster_bits)
    storage.truncate(3 << cluster_bits)
    counts.table[0] = 2 << cluster_bits
    storage.write(1 << cluster_bits, counts.table.astype(">u8").tobytes())
    counts.set(0, 3, 1)
    counts.write_blocks()
    return storage, counts_of(storage, order, cluster_bits)


@pytest.mark.parametrize("order", ORDERS)
def test_counters_of_every_width_round_trip(order: int) -> None:
    widths = Widths(order)
    raw = np.random.default_rng(order).integers(0, 256, 512, np.uint8).tobytes()
    counts = widths.decode(raw)
    assert counts.size == 512 * 8 >> order
    assert int(counts.max()) <= widths.maximum
    assert widths.encode(counts) == raw


def test_narrow_counters_begin_at_the_least_significant_bit() -> None:
    assert Widths(0).decode(b"\x05")[:4].tolist() == [1, 0, 1, 0]
    assert Widths(1).decode(b"\x1b").tolist() == [3, 2, 1, 0]
    assert Widths(2).decode(b"\x21").tolist() == [1, 2]


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_written_is_what_is_read_anew(order: int) -> None:
    storage, counts = fresh(order)
    assert counts.get(0, 5).tolist() == [1, 1, 1, 0, 0]
    counts.set(7, 20, 1)
    counts.add(np.array([3, 30], np.uint64), 1)
    counts.write_blocks()
    counts.written()
    assert counts_of(storage, order).get(0, 40).tolist() == counts.get(0, 40).tolist()
    assert not counts.dirty


def test_only_changed_sectors_of_a_block_are_written() -> None:
    storage, counts = fresh(4, 16)
    storage.written.clear()
    counts.set(300, 1, 1)
    counts.write_blocks()
    assert storage.written == [((2 << 16) + 512, 512)]


@pytest.mark.parametrize("order", ORDERS)
def test_free_run_finds_the_first_gap_and_its_length(order: int) -> None:
    _, counts = fresh(order)
    counts.set(10, 5, 1)
    assert counts.free_run(0, 100) == (3, 7)
    assert counts.free_run(0, 4) == (3, 4)
    assert counts.free_run(11, 8) == (15, 8)


@pytest.mark.parametrize("order", ORDERS)
def test_past_the_last_block_all_is_free_and_not_described(order: int) -> None:
    _, counts = fresh(order)
    counts.set(0, counts.per_block, 1)
    start, count = counts.free_run(0, 5)
    assert (start, count) == (counts.per_block, 5)
    assert not counts.described(start)


@pytest.mark.parametrize("order", ORDERS)
def test_a_new_block_counts_itself_and_reaches_the_disk_before_the_table_names_it(order: int) -> None:
    storage, counts = fresh(order)
    first = counts.per_block
    assert counts.describing(first) == counts.describe(first) == 1
    assert counts.get(first, 2).tolist() == [1, 0]
    storage.truncate((first + 1) << 9)
    storage.written.clear()
    assert counts.table_changed
    counts.write_blocks()
    assert all(offset >= 2 << 9 for offset, _ in storage.written)
    counts.write_table()
    counts.written()
    assert not counts.dirty
    assert counts_of(storage, order).get(first, 2).tolist() == [1, 0]


@pytest.mark.parametrize("order", ORDERS)
def test_the_table_grows_and_counts_all_it_takes(order: int) -> None:
    storage, counts = fresh(order)
    first = counts.table.size * counts.per_block
    took = counts.describing(first)
    assert counts.describe(first) == took
    assert counts.table_moved
    assert counts.get(first - 1, took + 2).tolist() == [0] + [1] * took + [0]
    storage.truncate((first + took) << 9)
    counts.write_blocks()
    counts.write_table()
    table = counts.table_offset >> 9
    again = counts_of(storage, order, table=table, clusters=counts.table_clusters)
    assert again.get(first - 1, took + 2).tolist() == [0] + [1] * took + [0]
    assert again.get(0, 4).tolist() == [1, 1, 1, 0]


def test_counting_down_tells_what_became_free() -> None:
    _, counts = fresh(4)
    counts.set(20, 3, 2)
    free = counts.add(np.array([22, 20, 20], np.uint64), -1)
    assert free.tolist() == [20]
    assert counts.get(20, 3).tolist() == [0, 2, 1]


@pytest.mark.parametrize("order", ORDERS)
def test_a_count_below_zero_is_corruption_and_changes_nothing(order: int) -> None:
    _, counts = fresh(order)
    with pytest.raises(CorruptImage, match="refcount"):
        counts.add(np.array([2, 5], np.uint64), -1)
    assert counts.get(2, 1).tolist() == [1]


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_a_count_above_its_width_is_refused(order: int) -> None:
    _, counts = fresh(order)
    counts.set(2, 1, counts.maximum)
    with pytest.raises(CorruptImage, match="range"):
        counts.add(np.array([2], np.uint64), 1)


@pytest.mark.parametrize(
    ("entry", "what"),
    [(0x401, "reserved"), (0x600, "block"), (1 << 40, "block")],
    ids=["reserved", "unaligned", "far away"],
)
def test_a_table_that_leads_astray_is_corruption(entry: int, what: str) -> None:
    storage, _ = fresh(4, 16)
    storage.write(1 << 16, entry.to_bytes(8, "big"))
    with pytest.raises(CorruptImage, match=what):
        counts_of(storage, 4, 16).get(0, 1)


@pytest.mark.parametrize(("table", "clusters"), [(1, 1 << 20), (0, 1), (7, 1), (1, 0)])
def test_a_table_that_cannot_be_is_corruption(table: int, clusters: int) -> None:
    storage, _ = fresh(4)
    with pytest.raises(CorruptImage, match="refcount table"):
        counts_of(storage, 4, table=table, clusters=clusters)


@pytest.mark.parametrize("order", ORDERS)
def test_counts_of_an_image_by_qemu(order: int, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    options = f"cluster_size=512,refcount_bits={1 << order}"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "1M"], check=True)
    subprocess.run(["qemu-io", "-c", "write 0 64k", path], check=True, capture_output=True)
    storage = Bytes(0)
    storage.data = bytearray(path.read_bytes())
    table = int.from_bytes(storage.data[48:56], "big") >> 9
    clusters = int.from_bytes(storage.data[56:60], "big")
    counts = counts_of(storage, order, table=table, clusters=clusters)
    total = -(-len(storage.data) // 512)
    assert counts.get(0, total).sum() == np.count_nonzero(counts.get(0, total))
    assert counts.last_used() == total - 1
