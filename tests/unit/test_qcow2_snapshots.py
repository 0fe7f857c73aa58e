"""The snapshot table, and reading of a snapshot."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import blkloom
from blkloom.errors import UsageError
from blkloom.image.errors import CorruptImage
from blkloom.image.qcow2.format.snapshots import Snapshot, find_snapshot, read_snapshots
from blkloom.image.qcow2.format.tables import COPIED
from blkloom.image.types import HostOffset
from qcow2_by_hand import ByHand, MemoryFile

CLUSTER = 4096


def entry(
    identity: bytes,
    name: bytes,
    *,
    l1: int = 2 * CLUSTER,
    l1_size: int = 1,
    extra: bytes = struct.pack(">QQ", 7, 1 << 20),
    extra_length: int | None = None,
) -> bytes:
    length = len(extra) if extra_length is None else extra_length
    raw = struct.pack(">QIHHIIQII", l1, l1_size, len(identity), len(name), 5, 6, 8, 9, length) + extra + identity + name
    return raw + bytes(-len(raw) % 8)


def image(*entries: bytes, count: int | None = None, cut: int = 0) -> tuple[MemoryFile, ByHand]:
    made = ByHand(1 << 20)
    made.header_fields["snapshot_count"] = len(entries) if count is None else count
    made.header_fields["snapshot_offset"] = HostOffset(made.place(b"".join(entries)))
    raw = made.build()
    return MemoryFile(raw[: len(raw) - cut]), made


def read(*entries: bytes, count: int | None = None, cut: int = 0) -> list[Snapshot]:
    file, made = image(*entries, count=count, cut=cut)
    return read_snapshots(file, made.header())  # type: ignore[arg-type] # only reads


def test_entries_of_any_length_follow_one_another() -> None:
    found = read(entry(b"1", b"before"), entry(b"22", b"", extra=b""), entry(b"3", b"x" * 500, extra=bytes(24)))
    assert [(one.id, one.name) for one in found] == [("1", "before"), ("22", ""), ("3", "x" * 500)]
    assert [one.disk_size for one in found] == [1 << 20, None, 0]
    assert [one.vm_state_size for one in found] == [7, 9, 0]
    assert sum(one.length for one in found) == sum(
        map(len, (entry(b"1", b"before"), entry(b"22", b"", extra=b""), entry(b"3", b"x" * 500, extra=bytes(24))))
    )


def test_more_entries_than_one_read_brings_are_all_found() -> None:
    found = read(*(entry(str(number).encode(), b"n" * 900) for number in range(300)))
    assert [one.id for one in found] == [str(number) for number in range(300)]


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (entry(b"1", b"x", l1=CLUSTER + 512), "L1 table of 1 entries at 0x1200"),
        (entry(b"1", b"x", l1=0), "L1 table of 1 entries at 0x0"),
        (entry(b"1", b"x", l1_size=1 << 31), "L1 table of 2147483648 entries"),
        (entry(b"1", b"x", extra_length=1 << 30), "1073741824 bytes of extra data"),
        (entry(b"1", b"x", extra=struct.pack(">QQ", 0, 1 << 63)), "disk of 9223372036854775808 bytes"),
    ],
)
def test_an_entry_that_cannot_be_is_named(raw: bytes, says: str) -> None:
    with pytest.raises(CorruptImage, match=says):
        read(entry(b"0", b"good"), raw)


def test_a_table_past_the_end_of_the_file_is_corrupt() -> None:
    with pytest.raises(CorruptImage, match="snapshot 1: an L1 table of 0 entries"):
        read(entry(b"1", b"x"), count=65536)
    with pytest.raises(CorruptImage, match=r"snapshot 0.*past the end"):
        read(entry(b"1", b"x"), cut=4090)


def test_a_word_is_an_id_first_and_a_name_second() -> None:
    found = read(entry(b"1", b"2"), entry(b"2", b"one"))
    assert find_snapshot(found, "2", path="x") is found[1]
    assert find_snapshot(found, "one", path="x") is found[1]
    with pytest.raises(UsageError, match=r"no snapshot 'three'; there are: 1 \(2\), 2 \(one\)"):
        find_snapshot(found, "three", path="x")


def test_a_snapshot_is_attached_read_only_with_its_own_size(tmp_path: Path) -> None:
    made = ByHand(8 * CLUSTER)
    made.data(0, b"now" * 1000)
    old = made.place(b"then" * 1000)
    l2 = made.place(struct.pack(">2Q", old | COPIED, 1))
    l1 = made.place(struct.pack(">Q", l2))
    extra = struct.pack(">QQ", 0, 2 * CLUSTER)
    made.header_fields["snapshot_count"] = 1
    made.header_fields["snapshot_offset"] = HostOffset(made.place(entry(b"1", b"then", l1=l1, extra=extra)))
    path = made.write(tmp_path / "disk.qcow2")
    with blkloom.open(f"0 16 qcow2 {path} 1 snapshot=then") as device:
        assert device.pread(2 * CLUSTER, 0) == (b"then" * 1000).ljust(2 * CLUSTER, b"\0")
        with pytest.raises(OSError, match="Read-only"):
            device.pwrite(b"x" * 512, 0)
    with blkloom.open(path, read_only=True) as device:
        assert device.pread(4, 0) == b"nown"
    with pytest.raises(blkloom.errors.TableError, match="16 sectors are there, not 17"):
        blkloom.open(f"0 17 qcow2 {path} 1 snapshot=1")
