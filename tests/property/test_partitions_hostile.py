"""The search for partitions on arbitrary disks ends, reads little, and finds only partitions inside the disk."""

from __future__ import annotations

import struct
import zlib

from hypothesis import example, given
from hypothesis import strategies as st

from blkloom.partitions import Disk, find_partitions

BLOCKS = st.sampled_from([512, 1024, 2048, 4096])
LARGE = st.one_of(st.integers(0, 200), st.integers(0, (1 << 32) - 1))
HUGE = st.one_of(st.integers(0, 200), st.integers(0, (1 << 64) - 1))
SMALL_OR_HUGE = st.integers(0, 64) | st.integers(0, 1 << 64)
MOST_READ = 16 << 20

ENTRY = st.tuples(st.sampled_from([0, 0x80, 0x80, 1]), st.sampled_from([0, 5, 0xF, 0x85, 0x83, 0xEE]), LARGE, LARGE)
RECORD = st.tuples(st.lists(ENTRY, max_size=4), st.booleans())


def record(entries: list[tuple[int, int, int, int]], magic: bool) -> bytes:
    found = bytearray(512)
    for at, entry in enumerate(entries):
        struct.pack_into("<B3xB3xII", found, 446 + 16 * at, *entry)
    if magic:
        found[510:] = b"\x55\xaa"
    return bytes(found)


def check(blocks: dict[int, bytes], size: int, block: int) -> None:
    """The disk has only these blocks, all others are zeros."""
    read = 0

    def reading(offset: int, length: int) -> bytes:
        nonlocal read
        assert length > 0
        assert 0 <= offset <= offset + length <= size
        read += length
        assert read <= MOST_READ
        found = bytearray(length)
        for at, data in blocks.items():
            begin = at * block - offset
            if 0 <= begin < length:
                part = data[: length - begin]
                found[begin : begin + len(part)] = part
        return bytes(found)

    table = find_partitions(Disk(size, block, reading))
    numbers = [partition.number for partition in table.partitions]
    assert numbers == sorted(set(numbers))
    assert len(numbers) <= 255
    for partition in table.partitions:
        assert partition.start >= 0
        assert partition.length > 0
        assert (partition.start + partition.length) * 512 <= size


@given(st.binary(max_size=4096), BLOCKS)
def test_any_bytes(data: bytes, block: int) -> None:
    check({0: data}, len(data), block)


@given(RECORD, st.dictionaries(st.integers(1, 200), RECORD, max_size=20), BLOCKS, st.integers(0, 1 << 50))
def test_any_chain_of_boot_records(
    first: tuple[list[tuple[int, int, int, int]], bool],
    others: dict[int, tuple[list[tuple[int, int, int, int]], bool]],
    block: int,
    size: int,
) -> None:
    check({at: record(*made) for at, made in {**others, 0: first}.items()}, size, block)


@given(
    numbers=st.tuples(*[HUGE] * 4),
    array=st.tuples(HUGE, LARGE, st.sampled_from([128, 256, 4096]) | LARGE),
    header_size=st.sampled_from([92, 92, 512]) | LARGE,
    entries=st.lists(st.tuples(HUGE, HUGE), max_size=8),
    block=BLOCKS,
    size=st.integers(0, 1 << 62),
)
@example((1, 2, 3, 4), (2, 8, 128), 92, [(1, 0)], 512, 1 << 20)
def test_any_gpt_with_right_checksums(
    numbers: tuple[int, int, int, int],
    array: tuple[int, int, int],
    header_size: int,
    entries: list[tuple[int, int]],
    block: int,
    size: int,
) -> None:
    data = b"".join(
        struct.pack("<16s16sQQ", b"t" * 16, bytes(16), *entry).ljust(min(array[2], 4096), b"\0") for entry in entries
    )
    wanted = array[1] * array[2]
    crc = zlib.crc32(data.ljust(wanted, b"\0")[:wanted]) if wanted <= 1 << 20 else 0
    header = bytearray(
        struct.pack("<8sIII4xQQQQ16sQIII", b"EFI PART", 0, header_size, 0, *numbers, bytes(16), *array, crc)
    ).ljust(512, b"\0")
    struct.pack_into("<I", header, 16, zlib.crc32(header[: max(92, min(header_size, 512))]))
    check({0: record([(0, 0xEE, 1, 100)], True), 1: bytes(header), array[0]: data}, size, block)
