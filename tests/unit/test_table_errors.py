"""Invalid tables: each error names source, line, column, value and remedy."""

from __future__ import annotations

from typing import ClassVar, Self

import pytest

from blkloom.errors import Place, TableError, UnknownTarget
from blkloom.table import Segment, Table, parse_table
from blkloom.table.arguments import Arguments
from blkloom.table.syntax import Syntax, integer, word
from blkloom.targets.registry import Targets, builtin_targets
from blkloom.targets.spec import TargetSpec
from blkloom.units import DEVICE_LIMIT, SECTOR, Sectors
from words_target import Blank

MOST = (DEVICE_LIMIT - 1) // SECTOR


class Plain(Blank):
    name: ClassVar[str] = "plain"


class Alone(Blank):
    name: ClassVar[str] = "alone"
    singleton: ClassVar[bool] = True


class Two(Blank):
    name: ClassVar[str] = "two"
    a: str
    b: int
    arguments: ClassVar[Syntax] = (word("a"), integer("b", most=10))


class Broken(Blank):
    name: ClassVar[str] = "broken"
    arguments: ClassVar[Syntax] = (word("key"),)

    @classmethod
    def parse(cls, arguments: Arguments) -> Self:
        raise KeyError(arguments.word("key"))


TARGETS = Targets([Plain, Alone, Two, Broken])

CASES = {
    # text: place, value, part of what, part of the cure
    "": ("1:1", "", "the table is empty", "<start> <length> <target>"),
    "\n # only this\n": ("1:1", "", "the table is empty", "<start> <length> <target>"),
    "0": ("1:2", "0", "at least start, length and target", "<start> <length> <target>"),
    "0 8 plain\n  8 8 ": ("2:7", "8 8", "at least start, length and target", "<start> <length> <target>"),
    "x 8 plain": ("1:1", "x", "start is not a number", "<start> <length> <target>"),
    "-1 8 plain": ("1:1", "-1", "start is not a number", "<start> <length> <target>"),
    "0 8s plain": ("1:3", "8s", "length is not a number", "<start> <length> <target>"),
    "0 \u0663 plain": ("1:3", "\u0663", "length is not a number", "<start> <length> <target>"),
    "0 8\0 plain": ("1:3", "8\0", "length is not a number", "<start> <length> <target>"),
    "0 0 plain": ("1:3", "0", "at least one sector", "512 bytes"),
    "8 8 plain": ("1:1", "8", "must start at sector 0", "start it at 0"),
    "0 8 plain\n9 8 plain": ("2:1", "9", "gap: the segment before it ends at sector 8", "start it at 8"),
    "0 8 plain\n\n 7 8 plain": ("3:2", "7", "overlaps", "start it at 8"),
    f"0 {MOST + 1} plain": ("1:3", str(MOST + 1), "2^63 bytes", f"{MOST} sectors at most"),
    f"0 8 plain\n8 {MOST - 7} plain": ("2:3", str(MOST - 7), "2^63 bytes", f"{MOST - 8} sectors at most"),
    f"0 {MOST} plain\n{MOST} 1 plain": ("2:" + str(len(str(MOST)) + 2), "1", "2^63 bytes", "remove the segment"),
    f"{1 << 64} 8 plain": ("1:1", str(1 << 64), "2^63 bytes", f"{MOST} sectors at most"),
    f"0 {'9' * 5000} plain": ("1:3", "9" * 5000, "2^63 bytes", f"{MOST} sectors at most"),
    "0 8 plane": ("1:5", "plane", "unknown target", "did you mean 'plain'"),
    "0 8 two": ("1:8", "", "a is missing", "two <a> <b>"),
    "0 8 two  x   # 1": ("1:11", "", "b is missing", "two <a> <b>"),
    "0 8 two x y": ("1:11", "y", "Invalid b", "two <a> <b>"),
    "0 8 two x 11": ("1:11", "11", "from 0 to 10", "two <a> <b>"),
    f"0 8 two x {'0' * 45}11": ("1:11", "0" * 45 + "11", "from 0 to 10", "two <a> <b>"),
    "0 8 two \\  1 9 # 9": ("1:14", "9", "more words than the target takes", "two <a> <b>"),
    "0 8 plain no": ("1:11", "no", "more words than the target takes", "plain"),
    "0 8 alone\n8 8 plain": ("1:5", "alone", "must appear alone", "linear"),
    "0 8 plain\n8 8 alone": ("2:5", "alone", "must appear alone", "linear"),
    "0 8 two a\\": ("1:10", "\\", "nothing follows the backslash", "\\\\"),
    "0 8 two \\": ("1:9", "\\", "nothing follows the backslash", "\\\\"),
    "0 8 two a\\\n1": ("1:10", "\\", "nothing follows the backslash", "next"),
    "0 8 two a\0 1": ("1:10", "\0", "NUL", "remove"),
    "0 8 two a\\\0 1": ("1:11", "\0", "NUL", "remove"),
    "0 8 two \x1b 1": ("1:9", "\x1b", "control character", "backslash before it"),
    "0 8 two a 1\x7f": ("1:12", "\x7f", "control character", "backslash before it"),
    "0 8 two \ud800 1": ("1:9", "\ud800", "not a character", "surrogateescape"),
    "0 8 two \\\udfff 1": ("1:10", "\udfff", "not a character", "surrogateescape"),
    "0 8 broken it": ("1:12", "", "broken failed to parse its arguments: KeyError: 'it'", "broken <key>"),
}


@pytest.mark.parametrize("text", CASES, ids=lambda text: repr(text[:40]))
def test_the_error_names_place_value_and_cure(text: str) -> None:
    place, value, what, cure = CASES[text]
    with pytest.raises(TableError) as caught:
        parse_table(text, targets=TARGETS, source="disk.table")
    error = caught.value
    assert (str(error.place), error.value) == (f"disk.table:{place}", value)
    assert what in error.what
    assert cure in error.cure
    assert str(error).startswith(f"disk.table:{place}: ")
    assert error.exit_code == 65


def test_an_unknown_target_has_a_class_of_its_own() -> None:
    with pytest.raises(UnknownTarget):
        parse_table("0 8 plane", targets=TARGETS)


def test_the_first_faulty_line_is_the_one_reported() -> None:
    with pytest.raises(TableError) as caught:
        parse_table("0 8 plain\n9 8 plain\n17 8 unknown", targets=TARGETS)
    assert caught.value.place == Place("table", 2, 1)


def test_what_a_target_raised_is_the_cause_of_the_error() -> None:
    with pytest.raises(TableError) as caught:
        parse_table("0 8 broken it", targets=TARGETS)
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_largest_device_is_one_sector_below_the_limit() -> None:
    assert parse_table(f"0 {MOST} plain", targets=TARGETS).length == MOST
    assert (MOST + 1) * SECTOR == DEVICE_LIMIT


@pytest.mark.parametrize(
    ("segments", "what"),
    [
        ([(1, 8, Plain)], "must start at sector 0"),
        ([(0, 0, Plain)], "at least one sector"),
        ([(0, -8, Plain)], "at least one sector"),
        ([(0, 8, Plain), (16, 8, Plain)], "gap"),
        ([(0, 8, Plain), (4, 8, Plain)], "overlaps"),
        ([(0, MOST, Plain), (MOST, 1, Plain)], "2\\^63"),
        ([(0, 8, Alone), (8, 8, Plain)], "must appear alone"),
        ([(0, 8, Plain), (8, 8, Alone)], "must appear alone"),
    ],
)
def test_a_table_made_by_a_program_is_held_to_the_same_rules(
    segments: list[tuple[int, int, type[TargetSpec]]], what: str
) -> None:
    with pytest.raises(TableError, match=what):
        Table(tuple(Segment(Sectors(start), Sectors(length), target()) for start, length, target in segments))


@pytest.mark.parametrize(
    ("line", "place", "value"),
    [
        ("0 8 zero x", "table:1:10", "x"),
        ("0 8 linear /a", "table:1:14", ""),
        ("0 8 loop /a 1x", "table:1:13", "1x"),
        ("0 8 striped 2 8 /a 0 /b", "table:1:13", "2"),
        ("0 8 ram 2 huge_pages", "table:1:9", "2"),
    ],
)
def test_built_in_targets_complain_at_the_word_they_mean(line: str, place: str, value: str) -> None:
    with pytest.raises(TableError) as caught:
        parse_table(line, targets=builtin_targets())
    assert (str(caught.value.place), caught.value.value) == (place, value)
    assert caught.value.cure
