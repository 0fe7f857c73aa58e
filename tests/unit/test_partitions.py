"""Partition tables of sfdisk, sgdisk and parted, parsed as these tools parse them; and invalid ones. tests/kernel
compares with the kernel.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from blkloom.partitions import Partition, PartitionTable, block_size_of, find_partitions
from blkloom.units import Sectors
from partition_images import (
    BY_TOOLS,
    IMAGES,
    Program,
    by_number,
    disk_of,
    found_in,
    gpt,
    make,
    mbr,
    put,
    run,
    with_blocks,
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Where a disk may be made."""
    return tmp_path / "disk.img"


@pytest.mark.parametrize("name", IMAGES)
def test_every_partition_is_found_and_has_its_number(program: Program, image: Path, name: str) -> None:
    if IMAGES[name].block != 512 and "sfdisk" in name and os.geteuid() != 0:
        pytest.skip("losetup needs root")
    make(name, program, image)
    table = found_in(image, IMAGES[name].block)
    assert [partition.number for partition in table.partitions] == IMAGES[name].numbers
    if name in BY_TOOLS:
        assert not table.warnings


@pytest.mark.parametrize("name", [name for name, made in BY_TOOLS.items() if made.block == 512])
def test_what_tools_made_is_read_as_sfdisk_reads_it(program: Program, image: Path, name: str) -> None:
    make(name, program, image)
    told = json.loads(run(program("sfdisk", "fdisk"), "--json", image))["partitiontable"]
    expected = {}
    for partition in told["partitions"]:
        number = int(re.sub(r".*\D", "", partition["node"]))
        extended = partition["type"] in ("5", "f", "85")  # of which the kernel shows 1 KiB
        expected[number] = (partition["start"], 2 if extended else partition["size"])
    table = found_in(image)
    assert table.kind == told["label"]
    assert by_number(table) == expected


# MBR


def disk_with(records: dict[int, bytes]) -> PartitionTable:
    """What is found on a disk that is empty but for these blocks."""
    return find_partitions(disk_of(with_blocks(records)))


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1024])
def test_an_empty_or_tiny_disk_has_no_partitions(size: int) -> None:
    assert find_partitions(disk_of(bytes(size))) == PartitionTable()


def test_a_boot_record_with_other_flags_than_a_partitions_is_no_table() -> None:
    assert disk_with({0: mbr((0x12, 0x83, 1, 100))}) == PartitionTable()


def test_a_partition_behind_the_end_is_left_out_and_one_across_it_is_cut(program: Program, image: Path) -> None:
    make("beyond-the-end", program, image)
    table = found_in(image)
    assert by_number(table) == {1: (100, 200), 2: (131000, 72)}
    assert [warning.partition(":")[0] for warning in table.warnings] == ["partition 2", "partition 3", "partition 4"]


def test_a_chain_of_records_that_comes_back_to_itself_ends() -> None:
    table = disk_with(
        {
            0: mbr((0, 5, 100, 1000)),
            100: mbr((0, 0x83, 1, 10), (0, 5, 50, 100)),
            150: mbr((0, 0x83, 1, 20), (0, 5, 0xFFFFFFFF - 149, 100)),
        }
    )
    assert [p.number for p in table.partitions] == [1, 5, 6]
    assert "beyond the end" in table.warnings[0]
    table = disk_with({0: mbr((0, 5, 100, 1000)), 100: mbr((0, 0x83, 1, 10), (0, 5, 0, 100))})
    # A link to the first record itself: start 0 is no link to the kernel's eyes only if it has no length.
    assert [(p.number, p.start, p.length) for p in table.partitions] == [(1, 100, 2), (5, 101, 10)]
    assert "does not end (block 100)" in table.warnings[0]


def test_a_chain_of_empty_records_is_given_up_after_a_hundred() -> None:
    records = {100 + at: mbr((0, 0, 0, 0), (0, 5, at + 1, 2)) for at in range(200)}
    table = disk_with({0: mbr((0, 5, 100, 1000))} | records)
    assert [p.number for p in table.partitions] == [1]
    assert "does not end (block 200)" in table.warnings[0]


def test_a_disk_has_255_partitions_at_most() -> None:
    records = {100 + at: mbr((0, 0x83, 1, 1), (0, 5, at + 1, 2)) for at in range(400)}
    table = disk_with({0: mbr((0, 5, 100, 1000))} | records)
    assert [p.number for p in table.partitions] == [1, *range(5, 256)]
    assert table.warnings == ["more than 255 partitions; the others are left out"]


def test_two_extended_partitions_share_the_numbers_from_five_on() -> None:
    table = disk_with(
        {
            0: mbr((0, 5, 100, 100), (0, 0x85, 300, 100)),
            100: mbr((0, 0x83, 1, 10)),
            300: mbr((0, 0x83, 1, 20)),
        }
    )
    assert by_number(table) == {1: (100, 2), 2: (300, 2), 5: (101, 10), 6: (301, 20)}


def test_rubbish_in_the_third_and_fourth_entry_of_a_logical_record_is_passed_over() -> None:
    record = mbr((0, 0x83, 1, 10), (0, 0, 0, 0), (0, 0x83, 5, 2000), (0, 0x83, 20, 30))
    table = disk_with({0: mbr((0, 5, 100, 100)), 100: record})
    assert by_number(table) == {1: (100, 2), 5: (101, 10), 6: (120, 30)}


def test_the_mbr_of_a_gpt_disk_without_gpt_has_no_partitions() -> None:
    table = disk_with({0: mbr((0, 0xEE, 1, 4095), (0, 0x83, 100, 10))})
    assert table.partitions == []
    assert table.warnings == ["the MBR is that of a GPT disk, and there is no GPT"]


# GPT


@pytest.mark.parametrize("entry_size", [128, 256, 4096])
@pytest.mark.parametrize("block", [512, 1024, 2048, 4096])
def test_a_gpt_is_read_at_every_block_and_entry_size(block: int, entry_size: int) -> None:
    table = find_partitions(disk_of(gpt((100, 199), (300, 300), block=block, entry_size=entry_size, count=16), block))
    times = block // 512
    assert by_number(table) == {1: (100 * times, 100 * times), 2: (300 * times, times)}
    assert (table.kind, table.warnings) == ("gpt", [])


@pytest.mark.parametrize(("made", "opened"), [(4096, 512), (512, 4096), (2048, 1024)])
def test_a_gpt_for_another_block_size_is_named_with_its_block_size(made: int, opened: int) -> None:
    disk = disk_of(gpt((100, 199), block=made, count=16), opened)
    what = f"there is a GPT for blocks of {made} bytes, and the device has blocks of {opened}; use -b {made}"
    assert find_partitions(disk) == PartitionTable(warnings=[what])
    assert block_size_of(disk.size, disk.read) == made
    assert block_size_of(4096, disk_of(bytes(4096)).read) is None


def test_a_protective_mbr_that_does_not_begin_at_block_one_is_mended_as_the_warning_says(
    program: Program, image: Path
) -> None:
    data = gpt((100, 199), blocks=32768, count=128)
    data[454:458] = bytes(4)
    image.write_bytes(data)
    (warning,) = found_in(image).warnings
    assert "the MBR's entry for it does not begin at block 1; `fdisk` and its command w mend it" in warning
    subprocess.run([program("fdisk", "fdisk"), image], input="w\n", text=True, check=True, capture_output=True)
    assert by_number(found_in(image)) == {1: (100, 100)}


BAD_HEADERS = {
    "size below the least": (put("<I", 12, 91), "has 91 bytes"),
    "size above a block": (put("<I", 12, 513), "has 513 bytes"),
    "size of four gigabytes": (put("<I", 12, 0xFFFFFFFF), "has 4294967295 bytes"),
    "another signature": (put("<B", 0, 0), "no GPT header"),
    "of another block": (put("<Q", 24, 7), "belongs in block 7"),
    "usable blocks turned round": (put("<QQ", 40, 50, 49), "usable blocks 50 to 49"),
    "usable blocks behind the end": (put("<QQ", 40, 50, 1 << 63), "usable blocks"),
    "entries of no size": (put("<I", 84, 0), "have 0 bytes"),
    "entries of an odd size": (put("<I", 84, 129), "have 129 bytes"),
    "entries of a huge size": (put("<I", 84, 1 << 31), "have 2147483648 bytes"),
    "no entries": (put("<I", 80, 0), "0 entries"),
    "four thousand million entries": (put("<I", 80, 0xFFFFFFFF), "4294967295 entries"),
    "entries behind the end": (put("<Q", 72, 4095), "not inside the device"),
    "entries at the last number there is": (put("<Q", 72, (1 << 64) - 1), "not inside the device"),
    "other entries": (put("<Q", 72, 1000), "checksum of its entries"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_primary_header_makes_way_for_the_alternate_one(case: str) -> None:
    edit, why = BAD_HEADERS[case]
    table = find_partitions(disk_of(gpt((100, 199), count=128, edit=edit)))
    assert by_number(table) == {1: (100, 100)}
    assert why in table.warnings[0]
    assert table.warnings[1:] == ["using the alternate GPT"]


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_two_bad_headers_are_no_table_and_the_warnings_say_why(case: str) -> None:
    edit, why = BAD_HEADERS[case]
    table = find_partitions(disk_of(gpt((100, 199), count=128, edit=edit, edit_copy=edit)))
    assert table.partitions == []
    if case != "another signature":
        assert table.kind == "gpt"
        assert all(why in warning for warning in table.warnings)


def test_a_bad_alternate_header_is_told() -> None:
    table = find_partitions(disk_of(gpt((100, 199), count=128, edit_copy=put("<I", 80, 0))))
    assert by_number(table) == {1: (100, 100)}
    assert table.warnings[0].startswith("the alternate GPT is invalid")


def test_a_flipped_bit_in_header_or_entries_is_noticed() -> None:
    for at in (512 + 60, 1024 + 35):
        data = gpt((100, 199), count=128)
        data[at] ^= 1
        table = find_partitions(disk_of(data))
        assert by_number(table) == {1: (100, 100)}
        assert "checksum" in table.warnings[0]


def test_a_gpt_without_a_protective_mbr_is_not_believed(program: Program, image: Path) -> None:
    make("gpt-without-protective-mbr", program, image)
    assert found_in(image) == PartitionTable("dos", [Partition(1, Sectors(100), Sectors(50))])


def test_gpt_entries_that_leave_the_disk_or_are_turned_round_are_left_out() -> None:
    entries = ((100, 199), (200, 4096), (300, 299), (5000, 6000), (0, (1 << 64) - 1), (400, 400))
    table = find_partitions(disk_of(gpt(*entries, count=128)))
    assert by_number(table) == {1: (100, 100), 6: (400, 1)}
    assert [warning.partition(":")[0] for warning in table.warnings] == [f"partition {at}" for at in (2, 3, 4, 5)]


def test_gpt_entries_from_256_on_are_left_out() -> None:
    table = find_partitions(disk_of(gpt(*[(1000 + at, 1000 + at) for at in range(300)], count=300)))
    assert [p.number for p in table.partitions] == list(range(1, 256))
    assert table.warnings == ["entries from 256 on are left out"]


def test_the_largest_array_that_is_read_has_a_mebibyte() -> None:
    assert by_number(find_partitions(disk_of(gpt((5000, 5001), blocks=16384, count=8192)))) == {1: (5000, 2)}
    assert find_partitions(disk_of(gpt((5000, 5001), blocks=16384, count=8193))).partitions == []


@pytest.mark.parametrize("block", [0, 256, 513, 8192])
def test_a_disk_has_blocks_of_512_to_4096_bytes(block: int) -> None:
    with pytest.raises(ValueError, match="logical block size"):
        disk_of(bytes(4096), block)


@pytest.mark.parametrize("label", ["gpt", "dos"])
def test_types_names_and_uuids_are_those_of_partx(label: str, program: Program, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    second = 'type=swap, name="a \u00fc b"' if label == "gpt" else "size=16384, type=extended"
    table = f"label: {label}\nstart=2048, size=2048\nstart=8192, {second}\n"
    run(
        program("sfdisk", "fdisk"), "--quiet", image, said=table + ("start=10240, size=64, type=7\n" * (label == "dos"))
    )
    columns = ["--noheadings", "--raw", "--output", "NR,START,TYPE,UUID,NAME"]
    shown = run(program("partx", "util-linux"), *columns, image)
    names = shown.encode().decode("unicode_escape").encode("latin-1").decode()  # partx escapes bytes of names
    found = found_in(image).partitions
    assert [f"{p.number} {p.start} {p.type} {p.uuid} {p.name}".strip() for p in found] == [
        *map(str.strip, names.splitlines())
    ]
