r"""Parsing of a table's text: lines, comments, escapes."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from blkloom.errors import Place, TableError
from blkloom.table import Segment, Table, format_table, parse_table
from blkloom.targets.loop import Loop
from blkloom.targets.registry import Targets, all_targets, builtin_targets
from blkloom.targets.zero import Zero
from blkloom.units import Bytes, Sectors, to_bytes
from words_target import Words

TARGETS = Targets([Words], installed=())


def words_of(arguments: str) -> tuple[str, ...]:
    table = parse_table(f"0 8 words {arguments}", targets=TARGETS)
    target = table.segments[0].target
    assert isinstance(target, Words)
    return target.words


def test_a_table_of_several_lines_becomes_its_segments_in_order() -> None:
    table = parse_table("0 2048 loop /a 512\n2048 8 zero\n", targets=builtin_targets())
    assert table == Table(
        (
            Segment(Sectors(0), Sectors(2048), Loop("/a", Bytes(512))),
            Segment(Sectors(2048), Sectors(8), Zero()),
        )
    )
    assert table.length == 2056
    assert to_bytes(table.length) == 2056 * 512


def test_blank_lines_comments_and_white_space_at_both_ends_count_for_nothing() -> None:
    text = "\n# a comment\n\t 0 8\twords  a b  # why\r\n   \n  #0 8 gone\n8 8 words\f\v\n\n"
    table = parse_table(text, targets=TARGETS)
    assert [segment.target for segment in table.segments] == [Words(("a", "b")), Words()]
    assert [str(segment.place) for segment in table.segments] == ["table:3:3", "table:6:1"]


def test_the_place_does_not_count_when_tables_are_compared() -> None:
    one = parse_table("0 8 words", targets=TARGETS, source="one")
    other = parse_table("\n\n  0   8 words # same", targets=TARGETS, source="other")
    assert one == other
    assert hash(one) == hash(other)
    assert other.segments[0].place == Place("other", 3, 3)


@pytest.mark.parametrize(
    ("written", "means"),
    [
        (r"/a\ b", ("/a b",)),
        (r"/a\\b", ("/a\\b",)),
        (r"\/a", ("/a",)),  # any character may be escaped
        (r"\n", ("n",)),  # and stands for itself
        (r"/a\#b", ("/a#b",)),
        (r"/a#b", ("/a",)),  # dmsetup cuts at any #, inside a word too
        (r"/a\ ", ("/a ",)),
        (r"\  x", (" ", "x")),
        ("/a\\\tb", ("/a\tb",)),
        ("/\"a\" 'b'", ('/"a"', "'b'")),  # quotes mean nothing
        ("/a,b;c", ("/a,b;c",)),
        ("/\u00e4\u00a0\u2028b", ("/\u00e4\u00a0\u2028b",)),  # white space is what C calls so
        ("\\\x01", ("\x01",)),
    ],
)
def test_a_backslash_makes_the_next_character_literal(written: str, means: tuple[str, ...]) -> None:
    assert words_of(written) == means


def test_names_that_are_not_utf8_come_through_as_the_same_bytes() -> None:
    name = b"/disk\xff\xfe \xe4"
    table = parse_table(os.fsdecode(b"0 8 words " + name.replace(b" ", b"\\ ")), targets=TARGETS)
    assert os.fsencode(table.segments[0].target.words[0]) == name
    assert os.fsencode(format_table(table)) == b"0 8 words " + name.replace(b" ", b"\\ ")


def test_the_target_word_is_taken_as_it_stands() -> None:
    with pytest.raises(TableError, match="'words#'"):
        parse_table("0 8 words# no comment here", targets=TARGETS)


def test_numbers_may_have_leading_zeros_and_stay_decimal() -> None:
    assert parse_table("000 0010 words", targets=TARGETS).length == 10


@pytest.mark.parametrize(
    "line",
    [
        "0 2048 linear /dev/sda 384",
        "0 2048 striped 2 32 /dev/sda1 0 /dev/sdb1 8",
        "0 8 zero",
        "0 8 error",
        "0 8 ram",
        "0 8 ram 2 huge_pages preallocate",
        "0 8 loop /disk.img",
        "0 8 loop /disk\\ one.img 512 1 direct_io",
    ],
)
def test_lines_of_the_built_in_targets_print_as_they_were_written(line: str) -> None:
    assert format_table(parse_table(line, targets=builtin_targets())) == line


def test_printing_is_canonical() -> None:
    text = "# two\n 0  8   words \\a\\  b\n\n08 8 words#\n".replace("words#", "words #")
    table = parse_table(text, targets=TARGETS)
    assert format_table(table) == "0 8 words a\\  b\n8 8 words"
    assert parse_table(format_table(table), targets=TARGETS) == table


@pytest.mark.parametrize("word", ["", "a\nb", "a\0b", "\ud800"])
def test_a_name_no_table_can_hold_is_refused_when_printed(word: str) -> None:
    place = Place("disk.table", 3, 1)
    segment = Segment(Sectors(0), Sectors(8), Words((word,)), place)
    with pytest.raises(TableError, match="a table cannot hold") as caught:
        format_table(Table((segment,)))
    assert caught.value.place == place
    assert caught.value.value == word
    assert caught.value.cure


@pytest.mark.parametrize("name", ["", "two words", "a\nb", "\udfff"])
def test_a_target_name_no_table_can_hold_is_refused_when_printed(name: str) -> None:
    cls = type("Odd", (Words,), {"name": name})
    with pytest.raises(TableError, match="target name"):
        format_table(Table((Segment(Sectors(0), Sectors(8), cls()),)))


def test_a_segment_knows_where_it_ends() -> None:
    segment = Segment(Sectors(8), Sectors(24), Words())
    assert segment.end == 32
    assert replace(segment, length=Sectors(1)).end == 9


def test_ten_thousand_segments_round_trip() -> None:
    text = "\n".join(f"{at * 8} 8 loop /some/where/disk\\ {at}.img {(at + 1) * 512}" for at in range(10_000))
    table = parse_table(text, targets=all_targets())
    assert len(table.segments) == 10_000
    assert format_table(table) == text
