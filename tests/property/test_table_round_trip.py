r"""Tables with arbitrary names round-trip through text, or are refused.

`slow_words` is the oracle: the rules of dmsetup and of the kernel for a line, one byte at a time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import ClassVar

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from msgspec import structs

from blkloom.errors import Place, TableError
from blkloom.table import ConciseDevice, Segment, Table, format_concise, format_table, parse_concise, parse_table
from blkloom.table.syntax import Syntax, integer
from blkloom.targets.error import Error
from blkloom.targets.linear import Linear
from blkloom.targets.loop import Loop
from blkloom.targets.ram import Ram
from blkloom.targets.registry import all_targets
from blkloom.targets.spec import TargetSpec
from blkloom.targets.zero import Zero
from blkloom.units import DEVICE_LIMIT, SECTOR, Bytes, Sectors
from words_target import Blank, Words


class Number(Blank):
    number: int

    name: ClassVar[str] = "number"
    arguments: ClassVar[Syntax] = (integer("number"),)


TARGETS = all_targets([Words, Number])
TRICKY = " \t\v\f\r\\#,;'\"=\x01\x7f\u00a0\u2028\u00e4\U0001f9f5\udcff\udc80ab01"
MUST_ESCAPE = " \t\v\f\r\\#\x7f" + "".join(map(chr, [*range(1, 9), *range(14, 32)]))
PROTECTED_END = re.compile(r"(?<!\\)(?:\\\\)*\\[ \t\r]+$")  # white space with an escape before it

# Every name a file can have: bytes but NUL, and the newline that only a table's line end cannot be.
file_names = st.one_of(
    st.binary(min_size=1, max_size=20).map(lambda name: os.fsdecode(name.translate(None, b"\0\n") or b"x")),
    st.text(st.sampled_from(TRICKY), min_size=1, max_size=20),
    st.text(st.characters(exclude_characters="\0\n", exclude_categories=["Cs"]), min_size=1, max_size=20),
)
loops = st.builds(
    Loop,
    path=file_names,
    offset=st.integers(0, 1 << 40).map(lambda sectors: Bytes(sectors * SECTOR)),
    way=st.sampled_from(("", "direct_io", "direct_io=require", "block_map", "block_map=try")),
    reading=st.sampled_from(("", "read_only", "read_only=auto")),
    block_size=st.sampled_from(("", "block_size=512", "block_size=4096")),
).flatmap(
    lambda loop: (
        st.sampled_from(("", "immutable=off")).map(lambda immutable: structs.replace(loop, immutable=immutable))
        if loop.way.startswith("block_map")
        else st.sampled_from(("", "round_up")).map(lambda round_up: structs.replace(loop, round_up=round_up))
    )
)
targets = st.one_of(
    loops,
    st.builds(Words, st.lists(file_names, max_size=4).map(tuple)),
    st.builds(Number, st.integers(0, DEVICE_LIMIT - 1)),
    st.builds(Zero),
    st.builds(Error),
)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    if draw(st.integers(0, 9)) == 0:
        singleton = Ram(huge_pages=draw(st.booleans()), preallocate=draw(st.booleans()))
        return Table((Segment(Sectors(0), Sectors(draw(st.integers(1, 1 << 40))), singleton),))
    segments = []
    at = 0
    for target in draw(st.lists(targets, min_size=1, max_size=6)):
        length = draw(st.one_of(st.integers(1, 64), st.integers(1, 1 << 51)))
        segments.append(Segment(Sectors(at), Sectors(length), target))
        at += length
    return Table(tuple(segments))


labels = st.text(
    st.one_of(
        st.sampled_from(" ,;\\ab\udcff"),
        st.characters(min_codepoint=32, exclude_characters="\x7f", exclude_categories=["Cs"]),
    ),
    max_size=10,
)
concise_devices = st.builds(
    ConciseDevice,
    name=labels.filter(bool),
    uuid=labels,
    minor=st.one_of(st.none(), st.integers(0, (1 << 20) - 1)),
    read_only=st.booleans(),
    table=tables(),
)

# Text that gets far into the parsers before anything is wrong with it.
WORDS = "0 8 16 zero ram words number linear striped loop /a - direct_io # , ; \\ a,,,rw, ,u,3,ro,"
PIECES = [
    *WORDS.split(" "),
    *(" ", "  ", "\n", "\t", "\r\n", "0 8 ", "8 8 ", "words ", "loop ", "0 8 words ", "0 8 number "),
    *("\0", "\x1b", "\ud800", "\udc80", "\u0660", "\u00a0", "1" * 5000),
]
table_like = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=14).map("".join)

blanks = st.text(st.sampled_from(" \t\v\f\r"), min_size=1, max_size=3)
margins = st.one_of(st.just(""), blanks)
comments = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=8).map("#{}".format)
endings = st.one_of(st.just(""), blanks, st.builds("{}{}".format, blanks, comments))
fillers = st.lists(st.builds("{}{}\n".format, margins, st.one_of(st.just(""), comments)), max_size=2).map("".join)


@st.composite
def sloppily_written(draw: st.DrawFn, table: Table) -> str:
    """The table as a person may write it: any spacing, comments, and more escapes than it needs."""

    def escaped(word: str) -> str:
        more = draw(st.sets(st.sampled_from(word)))
        return "".join(f"\\{letter}" if letter in more or letter in MUST_ESCAPE else letter for letter in word)

    lines = []
    for segment in table.segments:
        zeros = draw(st.sampled_from(["", "0", "000"]))
        head = [f"{zeros}{segment.start}", f"{zeros}{segment.length}", segment.target.name]
        line = draw(margins)
        line += "".join(word + draw(blanks) for word in [*head, *map(escaped, segment.target.format())])
        lines.append(draw(fillers) + line + draw(endings))
    return "\n".join(lines) + "\n" + draw(fillers)


def complaint(read: Callable[[], object]) -> TableError | None:
    """What `read` raises, if that is a TableError."""
    try:
        read()
    except TableError as error:
        return error
    return None


def assert_complete(error: TableError, text: str) -> None:
    assert error.place.source == "fuzz"
    line = text.split("\n")[error.place.line - 1]
    assert 1 <= error.place.column <= len(line) + 1
    assert error.what
    assert error.cure
    assert str(error).startswith(str(error.place))


@given(tables())
@example(Table((Segment(Sectors(0), Sectors(8), Loop("/ends in a space ")),)))
@example(Table((Segment(Sectors(0), Sectors(8), Loop("/ends in a backslash\\")),)))
@example(Table((Segment(Sectors(0), Sectors(8), Words(("#", "\\#", "\r", " "))),)))
def test_a_printed_table_parses_to_the_same_table(table: Table) -> None:
    assert parse_table(format_table(table), targets=TARGETS) == table


@given(tables())
def test_a_printed_table_survives_being_bytes_in_a_file(table: Table) -> None:
    text = format_table(table)
    # A pair of escaped bytes that together are UTF-8 is one character after the trip: same bytes.
    assert os.fsencode(format_table(parse_table(os.fsdecode(os.fsencode(text)), targets=TARGETS))) == os.fsencode(text)


@given(st.data(), tables())
def test_however_a_table_was_written_it_prints_the_same(data: st.DataObject, table: Table) -> None:
    text = data.draw(sloppily_written(table))
    assert parse_table(text, targets=TARGETS) == table
    assert format_table(parse_table(text, targets=TARGETS)) == format_table(table)


@given(st.lists(st.text(st.sampled_from("\0\na\ud800\udfff \\")), max_size=3))
def test_any_words_round_trip_or_are_refused(words: list[str]) -> None:
    table = Table((Segment(Sectors(0), Sectors(8), Words(tuple(words))),))
    try:
        text = format_table(table)
    except TableError:
        assert any(not word or set(word) & set("\0\n\ud800\udfff") for word in words)
    else:
        assert parse_table(text, targets=TARGETS) == table


@given(st.one_of(st.text(), table_like))
@example("0 8 words \\")
@example("0 8 words \\\n")
def test_arbitrary_text_raises_nothing_but_table_errors(text: str) -> None:
    if error := complaint(lambda: parse_table(text, targets=TARGETS, source="fuzz")):
        assert_complete(error, text)


@given(st.one_of(st.text(), table_like, st.text(st.sampled_from("a,; \n\\08words"), max_size=40)))
@example("a,,,,0 8 words \\")
def test_arbitrary_concise_text_raises_nothing_but_table_errors(text: str) -> None:
    if error := complaint(lambda: parse_concise(text, targets=TARGETS, source="fuzz")):
        assert_complete(error, text)


@given(st.lists(concise_devices, min_size=1, max_size=3, unique_by=lambda device: device.name))
def test_the_printed_concise_form_parses_to_the_same_devices(devices: list[ConciseDevice]) -> None:
    text = format_concise(devices)
    assert parse_concise(text, targets=TARGETS) == devices
    assert parse_concise(text + "\n", targets=TARGETS) == devices
    assert format_concise(parse_concise(text, targets=TARGETS)) == text


@given(st.lists(concise_devices, min_size=1, max_size=3, unique_by=lambda device: device.name))
def test_dmsetup_would_part_the_printed_concise_form_alike(devices: list[ConciseDevice]) -> None:
    assert slow_concise(format_concise(devices)) == [
        [
            device.name,
            device.uuid,
            "" if device.minor is None else str(device.minor),
            "ro" if device.read_only else "rw",
            format_table(device.table),
        ]
        for device in devices
    ]


@given(st.text(st.sampled_from(" \t\r#\\ab/,;\u00e4"), max_size=30))
def test_arguments_are_parted_as_dmsetup_and_the_kernel_part_them(arguments: str) -> None:
    assume("\\#" not in arguments)  # ours alone: dmsetup has no way to write a '#'
    assume(not PROTECTED_END.search(arguments))  # dmsetup trims it nevertheless
    line = f"0 8 words {arguments}"
    expected = slow_words(os.fsencode(line))
    if error := complaint(lambda: parse_table(line, targets=TARGETS)):
        # A backslash at the very end is a backslash to the kernel; to us it is a slip.
        assert error.value == "\\"
        assert expected[-1].endswith(b"\\")
    else:
        words = parse_table(line, targets=TARGETS).segments[0].target.words
        assert list(map(os.fsencode, words)) == expected


@pytest.mark.parametrize("name", ["words", "loop", "linear", "zero"])
@given(st.lists(file_names, max_size=5))
def test_every_target_takes_or_refuses_any_words(name: str, words: list[str]) -> None:
    line = f"0 8 {name} " + format_table(Table((Segment(Sectors(0), Sectors(8), Words(tuple(words))),)))[10:]
    try:
        table = parse_table(line, targets=TARGETS)
    except TableError:
        assert name != "words"
    else:
        assert isinstance(table.segments[0].target, Words | Loop | Linear | Zero)
        assert parse_table(format_table(table), targets=TARGETS) == table


def test_the_lookup_of_a_caller_needs_no_more_than_find() -> None:
    class Only:
        def find(self, name: str, *, place: Place | None = None) -> type[TargetSpec]:
            return Words

    assert parse_table("0 8 anything", targets=Only()).segments[0].target == Words()


def slow_words(line: bytes) -> list[bytes]:
    """dmsetup: trim both ends, take three words, cut at '#'. Kernel: split, undo escapes."""
    space = b" \t\n\v\f\r"
    line = line.strip(space)
    for _ in range(3):
        while line and line[0] not in space:
            line = line[1:]
        line = line.lstrip(space)
    line = line.partition(b"#")[0]
    words = []
    at = 0
    while True:
        while at < len(line) and line[at] in space:
            at += 1
        if at == len(line):
            return words
        word = b""
        while at < len(line) and line[at] not in space:
            if line[at] == ord("\\") and at + 1 < len(line):
                at += 1
            word += line[at : at + 1]
            at += 1
        words.append(word)


def slow_concise(text: str) -> list[list[str]]:
    """dmsetup's walk over a concise form: five fields a device, commas in the fifth are newlines."""
    devices: list[list[str]] = []
    fields = [""]
    at = 0
    while at < len(text):
        character = text[at]
        last = at + 1 == len(text)
        if character == "\\":
            assert not last
            fields[-1] += text[at + 1]
            at += 2
        elif character == ",":
            at += 1
            if len(fields) == 5:
                fields[-1] += "\n"
            else:
                fields.append("")
                while at < len(text) and text[at] in " \t\n\v\f\r":
                    at += 1
        elif character == ";" or last:
            fields[-1] += character if character != ";" else ""
            assert len(fields) == 5
            devices.append(fields)
            fields = [""]
            at += 1
            while at < len(text) and text[at] in " \t\n\v\f\r":
                at += 1
        else:
            fields[-1] += character
            at += 1
    assert fields == [""], "dmsetup overlooked the end"
    return devices
