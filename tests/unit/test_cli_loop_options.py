"""The command line of `blkloom loop`, parsed like losetup's getopt_long, and tables of loop devices."""

from __future__ import annotations

import pytest

from blkloom.cli.loop_devices import LoopTable
from blkloom.cli.loop_options import LoopFailed, read_options
from blkloom.units import Sectors


@pytest.mark.parametrize(
    ("words", "given", "operands"),
    [
        ("-f --show a", {"find": "", "show": ""}, ["a"]),
        ("a -f", {"find": ""}, ["a"]),
        ("-fPr a", {"find": "", "partscan": "", "read-only": ""}, ["a"]),
        ("-fo512 a", {"find": "", "offset": "512"}, ["a"]),
        ("-o 512 a", {"offset": "512"}, ["a"]),
        ("--offset=512 a", {"offset": "512"}, ["a"]),
        ("--off 512 a", {"offset": "512"}, ["a"]),
        ("-o 1 -o 2", {"offset": "2"}, []),
        ("--direct-io a", {"direct-io": ""}, ["a"]),
        ("--direct-io=off a", {"direct-io": "off"}, ["a"]),
        ("--block-map a", {"block-map": ""}, ["a"]),
        ("--sizelimit=1K -f -- -f", {"sizelimit": "1K", "find": ""}, ["-f"]),
        ("-f -", {"find": ""}, ["-"]),
        ("--no a", {}, None),
        ("--noh", {"noheadings": ""}, []),
        ("--a", {}, None),
        ("--al", {"all": ""}, []),
        ("--au", {"autoclear": ""}, []),
        ("--out NAME", {}, None),
        ("--output NAME", {"output": "NAME"}, []),
        ("--sho a", {"show": ""}, ["a"]),
        ("--sh a", {"show": ""}, ["a"]),  # as it is to losetup, which has no --shared
    ],
)
def test_words_are_sorted_as_getopt_sorts_them(words: str, given: dict[str, str], operands: list[str] | None) -> None:
    if operands is None:
        with pytest.raises(LoopFailed, match="ambiguous"):
            read_options(words.split())
        return
    found = read_options(words.split())
    assert (found.given, found.operands) == (given, operands)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("0x200", 512),
        ("1K", 1024),
        ("1k", 1024),
        ("1KiB", 1024),
        ("1KB", 1000),
        ("0.5M", 1 << 19),
        ("3G", 3 << 30),
        ("2T", 2 << 40),
        ("1TB", 10**12),
    ],
)
def test_sizes_have_the_suffixes_of_losetup(text: str, size: int) -> None:
    found = read_options(["-o", text, f"--sizelimit={text}", "-b", text])
    assert (found.offset, found.sizelimit, found.block_size) == (size, size, size)


@pytest.mark.parametrize("text", ["", "-1", "K", "1Q", "1KK", "0x", "0xfg", "1e3", "9" * 30, "0x" + "f" * 5000])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(LoopFailed, match="failed to parse offset") as caught:
        read_options(["-o", text])
    assert caught.value.lines[0] == f"blkloom: failed to parse offset: '{text}': Invalid argument"


@pytest.mark.parametrize(
    "words",
    ["-a -d", "-D -f", "-c -j x", "-l -d", "-O NAME -f", "-J --raw", "--change x -d", "--direct-io --block-map"],
)
def test_actions_exclude_each_other(words: str) -> None:
    with pytest.raises(LoopFailed, match="mutually exclusive arguments: --"):
        read_options(words.split())


def test_direct_io_turned_off_goes_with_a_block_map() -> None:
    found = read_options(["--direct-io=off", "--block-map=try"])
    assert (found.direct_io, found.block_map) == (False, "block_map=try")


@pytest.mark.parametrize(
    ("table", "text"),
    [
        (LoopTable(Sectors(8), "/a"), "0 8 loop /a"),
        (LoopTable(Sectors(8), "/a b\\c#\t", 512), "0 8 loop /a\\ b\\\\c\\#\\\t 512"),
        (LoopTable(Sectors(8), "/a", 0, ("direct_io", "read_only")), "0 8 loop /a 0 2 direct_io read_only"),
    ],
)
def test_a_loop_table_round_trips(table: LoopTable, text: str) -> None:
    assert table.text() == text
    assert LoopTable.read(text) == table


@pytest.mark.parametrize("text", ["", "0 8 zero", "0 8 loop", "0 8 loop /a\n8 8 zero", "0 8 linear /a 0"])
def test_other_tables_are_none_of_a_loop_device(text: str) -> None:
    assert LoopTable.read(text) is None


def test_options_of_a_table_are_replaced_one_by_one() -> None:
    table = LoopTable(Sectors(8), "/a", 0, ("block_map=try", "block_size=4096"))
    assert table.block_size == 4096
    assert not table.read_only
    assert table.with_options(mode="direct_io").options == ("direct_io", "block_size=4096")
    assert table.with_options(mode="", read_only=True, block_size=512).options == ("read_only",)
    assert table.with_options(mode="block_map", read_only=True, block_size=1024).options == (
        *("block_map", "read_only", "block_size=1024"),
    )
    assert table.with_options() == table
    table = LoopTable(Sectors(8), "/a", 0, ("block_map", "immutable=off"))
    assert table.with_options(mode="block_map=try").options == ("block_map=try", "immutable=off")
    assert table.with_options(mode="").options == ()


@pytest.mark.parametrize(
    ("size", "offset", "limit", "block", "sectors"),
    [
        (8192, 0, 0, 512, 16),
        (8191, 0, 0, 512, 15),
        (8192, 512, 0, 512, 15),
        (8192, 8192, 0, 512, 0),
        (8192, 9216, 0, 512, 0),
        (8192, 0, 4096, 512, 8),
        (8192, 0, 1000, 512, 1),
        (8192, 0, 99999, 512, 16),
        (8192 + 4095, 0, 0, 4096, 16),
        (511, 0, 0, 512, 0),
    ],
)
def test_the_size_is_what_the_loop_driver_makes_of_it(
    size: int, offset: int, limit: int, block: int, sectors: int
) -> None:
    table = LoopTable(Sectors(0), "/a", offset).with_options(block_size=block)
    assert table.size_of(size, limit) == sectors
