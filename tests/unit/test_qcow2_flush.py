"""The order of write-back: syncs, the state after a failure, and the reuse of freed clusters."""

from __future__ import annotations

from pathlib import Path

import pytest

from blkloom.image.qcow2.write.writer import Options
from qcow2_python_engine import Guest, check, create

KIB = 1 << 10
ALONE = Options(preallocate=0)


def _places(guest: Guest) -> dict[str, range]:
    """Where the tables are, by name."""
    header, cluster = guest.image.header, guest.image.geometry.cluster
    block = int(guest.writer._refcounts.table[0])
    l2 = int(guest.image.l1[0]) & (1 << 56) - 1
    return {
        "header": range(cluster),
        "refcount table": range(header.refcount_table_offset, header.refcount_table_offset + cluster),
        "refcounts": range(block, block + cluster),
        "L1": range(header.l1_offset, header.l1_offset + cluster),
        "L2": range(l2, l2 + cluster),
    }


def _story(guest: Guest) -> list[str]:
    """The log in words; guest data left out."""
    places, found = _places(guest), []
    for what, offset, _ in guest.disk.log:
        if what == "write":
            found += [name for name, place in places.items() if offset in place]
        elif what in ("sync", "punch"):
            found.append(what)
    return found


def test_counts_then_tables_then_what_leads_to_them(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, 1 << 20).read_bytes(), options=ALONE)
    guest.write(0, b"x" * 512)
    guest.disk.log.clear()
    guest.writer.flush()
    assert _story(guest) == ["refcounts", "sync", "L2", "sync", "L1", "sync"]


def test_under_a_known_table_a_flush_takes_two_syncs(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, 1 << 20).read_bytes(), options=ALONE)
    guest.write(0, b"x" * 512)
    guest.writer.flush()
    guest.write(128 * KIB, b"x" * 512)
    guest.disk.log.clear()
    guest.writer.flush()
    assert _story(guest) == ["refcounts", "sync", "L2", "sync"]
    guest.disk.log.clear()
    guest.write(129 * KIB, b"y" * 512)
    guest.writer.flush()
    assert _story(guest) == [], "nothing of the mapping changed"


def test_only_the_changed_part_of_a_table_is_written(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, 64 << 20).read_bytes(), options=ALONE)
    guest.write(0, b"x" * 512)
    guest.writer.flush()
    guest.write(10 << 20, b"x" * 512)
    guest.disk.log.clear()
    guest.writer.flush()
    l2 = _places(guest)["L2"]
    assert [(offset - l2.start, length) for what, offset, length in guest.disk.log if offset in l2] == [(160 * 8, 8)]


def test_lazy_counts_are_written_at_the_end(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, 1 << 20, "lazy_refcounts=on").read_bytes(), options=ALONE)
    guest.write(0, b"x" * 512)
    assert _story(guest)[:2] == ["header", "sync"], "the dirty bit is durable before anything changes"
    guest.disk.log.clear()
    guest.writer.flush()
    assert _story(guest) == ["sync", "L2", "sync", "L1", "sync"], "the file's new end is durable before the tables"
    guest.disk.log.clear()
    image = guest.close()
    assert _story(guest)[:2] == ["refcounts", "sync"]
    assert _story(guest)[-2:] == ["header", "sync"]
    assert not check(image, tmp_path)


def test_a_new_refcount_block_is_durable_before_the_table_names_it(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, 1 << 20, "cluster_size=512", "refcount_bits=64").read_bytes(), options=ALONE)
    guest.disk.log.clear()
    guest.write(0, b"x" * (64 * KIB))
    guest.writer.flush()
    story = _story(guest)
    table = story.index("refcount table") if "refcount table" in story else story.index("header")
    assert "sync" in story[:table]
    assert "sync" in story[table : story.index("L1")]
    assert not check(guest.close(), tmp_path)


def test_freed_clusters_are_punched_and_reused_only_when_nothing_on_disk_names_them(tmp_path: Path) -> None:
    guest = Guest(create(tmp_path, 1 << 20).read_bytes(), options=ALONE)
    guest.write(0, b"x" * (64 * KIB))
    guest.writer.flush()
    host = guest.entry(0)
    guest.writer.discard(0, 64 * KIB)
    guest.disk.log.clear()
    guest.write(128 * KIB, b"y" * 512)
    assert guest.entry(2) != host
    assert _story(guest) == []
    assert guest.synchronized == 0
    guest.writer.flush()
    story = _story(guest)
    assert story.index("punch") > story.index("L2")
    assert story[story.index("L2") + 1] == "sync"
    assert guest.synchronized == 1, "requests in flight may have been there"


@pytest.mark.parametrize("lazy", [False, True])
def test_after_a_failure_anywhere_the_next_flush_does_it_all(tmp_path: Path, lazy: bool) -> None:
    options = ["cluster_size=512", "refcount_bits=64", f"lazy_refcounts={'on' if lazy else 'off'}"]
    fresh = create(tmp_path, 1 << 20, *options).read_bytes()
    steps = 0
    while True:
        guest = Guest(fresh)
        data = bytes(range(256)) * 300
        guest.write(1000, data)
        guest.writer.discard(4096, 8192)
        guest.disk.fails = steps
        try:
            guest.writer.flush()
        except OSError:
            guest.disk.fails = None
            guest.writer.flush()
            crashed = Guest(guest.crash())
            expected = bytearray(data)
            expected[4096 - 1000 : 4096 + 8192 - 1000] = bytes(8192)
            assert crashed.read(1000, len(data)) == expected
            assert not check(guest.close(), tmp_path), f"after a failure of step {steps}"
            steps += 1
        else:
            break
    assert steps > 5


def test_after_a_kill_at_any_write_the_image_has_leaks_at_most(tmp_path: Path) -> None:
    fresh = create(tmp_path, 1 << 20, "cluster_size=512").read_bytes()
    for steps in range(0, 60, 3):
        guest = Guest(fresh, options=Options(preallocate=2048))
        guest.disk.fails = steps
        try:
            for number in range(6):
                guest.write(number * 50000, bytes([number + 1]) * 3000)
                guest.writer.discard(number * 50000, 1024)
                guest.writer.flush()
        except OSError:
            said = check(guest.crash(), tmp_path)
            assert "ERROR" not in said, f"step {steps}: {said}"
