r"""dmsetup's concise form: several devices on one line."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from blkloom.errors import TableError
from blkloom.table import ConciseDevice, Table, format_concise, parse_concise, parse_table
from blkloom.targets.registry import Targets, builtin_targets
from words_target import Words

TARGETS = Targets([Words])


def table(text: str) -> Table:
    return parse_table(text, targets=TARGETS)


def devices(text: str) -> list[ConciseDevice]:
    return parse_concise(text, targets=TARGETS)


def test_the_examples_of_the_manual_page() -> None:
    small = "test-linear-small,,,ro, 0 2097152 linear /dev/loop0 0, 2097152 2097152 linear /dev/loop1 0"
    (device,) = parse_concise(small, targets=builtin_targets())
    assert (device.name, device.uuid, device.minor, device.read_only) == ("test-linear-small", "", None, True)
    assert [segment.start for segment in device.table.segments] == [0, 2097152]
    two = (
        "test-linear-small,,,, 0 2097152 linear /dev/loop0 0; test-linear-large,,,,"
        " 0 2097152 linear /dev/loop1 0, 2097152 2097152 linear /dev/loop2 0"
    )
    first, second = parse_concise(two, targets=builtin_targets())
    assert (first.name, first.read_only, first.table.length) == ("test-linear-small", False, 2097152)
    assert (second.name, second.read_only, second.table.length) == ("test-linear-large", False, 4194304)


def test_a_line_that_goes_on_after_a_backslash_is_read_from_a_file_too() -> None:
    text = "a,,,ro,\\\n 0 8 words x,\\\n 8 8 words\n"
    assert devices(text) == [ConciseDevice("a", "", None, True, table("0 8 words x\n8 8 words"))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a,,,,0 8 words", ConciseDevice("a", "", None, False, table("0 8 words"))),
        ("a,,,rw,0 8 words;", ConciseDevice("a", "", None, False, table("0 8 words"))),
        (" a, u,\t0,\n ro,  0 8 words ;\n", ConciseDevice("a", "u", 0, True, table("0 8 words"))),
        ("a ,,,,0 8 words", ConciseDevice("a ", "", None, False, table("0 8 words"))),
        (r"\ a\,\;\\,\ ,,,0 8 words", ConciseDevice(" a,;\\", " ", None, False, table("0 8 words"))),
        (r"\a,,,r\o,0 8 words", ConciseDevice("a", "", None, True, table("0 8 words"))),
        ("a,,,,0 8 words x,8 8 words", ConciseDevice("a", "", None, False, table("0 8 words x\n8 8 words"))),
        ("a,,,,0 8 words,, # no,\n8 8 words\n", ConciseDevice("a", "", None, False, table("0 8 words\n8 8 words"))),
        ("a,,,,0 8 words \\,\\;", ConciseDevice("a", "", None, False, table("0 8 words ,;"))),
        # a table's escapes are looked at after the concise form's own
        (r"a,,,,0 8 words x\\ y", ConciseDevice("a", "", None, False, table(r"0 8 words x\ y"))),
        (r"a,,,,0 8 words x\ y", ConciseDevice("a", "", None, False, table("0 8 words x y"))),
        (r"a,,,,0 8 words x\\\\", ConciseDevice("a", "", None, False, table(r"0 8 words x\\"))),
        ("a,,,,0 8 words \\\\\\\x01", ConciseDevice("a", "", None, False, table("0 8 words \\\x01"))),
        (r"a,,,,0 8 words x\\\,", ConciseDevice("a", "", None, False, table(r"0 8 words x\,"))),
    ],
)
def test_one_device(text: str, expected: ConciseDevice) -> None:
    assert devices(text) == [expected]


def test_white_space_and_a_semicolon_may_end_the_text_and_part_devices() -> None:
    assert [device.name for device in devices("a,,,,0 8 words;\n b,,,,0 8 words\n;\n")] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "place", "value", "what"),
    [
        ("", "1:1", "", "no devices"),
        (" \n", "1:1", "", "no devices"),
        ("a,,,rw", "1:7", "a", "4 of 5 fields"),
        ("a,,,,0 8 words;;", "1:16", "", "1 of 5 fields"),
        ("a,,,,0 8 words;b", "1:17", "b", "1 of 5 fields"),
        (",,,,0 8 words", "1:1", "", "needs a name"),
        ("a\tb,,,,0 8 words", "1:1", "a\tb", "name cannot hold control"),
        ("a,u\0,,,0 8 words", "1:3", "u\0", "uuid cannot hold control"),
        ("a\ud800,,,,0 8 words", "1:1", "a\ud800", "name cannot hold control"),
        ("a,, x,,0 8 words", "1:5", "x", "minor is not"),
        ("a,,-1,,0 8 words", "1:4", "-1", "minor is not"),
        ("a,,1048576,,0 8 words", "1:4", "1048576", "minor is not"),
        ("a,,,rx,0 8 words", "1:5", "rx", "unknown flags"),
        ("a,,,RO,0 8 words", "1:5", "RO", "unknown flags"),
        ("a,,,,", "1:6", "", "the table is empty"),
        ("a,,,,0 8 words,9 8 words", "1:16", "9", "gap"),
        ("a,,,,0 8 words\n,8 8 nothing", "2:6", "nothing", "unknown target"),
        ("a,,,, 0 8 words \\,\\,\x01", "1:21", "\x01", "control character"),
        ("a,,,,0 8 words x\\", "1:17", "\\", "nothing follows the backslash"),
        ("a,,,,0 8 words x\\\\", "1:18", "\\", "nothing follows the backslash"),
        ("a,,,,0 8 words;\na,,,,0 8 words", "2:1", "a", "two devices have one name"),
    ],
)
def test_the_error_names_place_and_value(text: str, place: str, value: str, what: str) -> None:
    with pytest.raises(TableError, match=what) as caught:
        devices(text)
    assert (str(caught.value.place), caught.value.value) == (f"--concise:{place}", value)
    assert caught.value.cure


def test_printing_escapes_what_parts_the_form() -> None:
    device = ConciseDevice(" n,;\\", "u ", 3, True, table(r"0 8 words a\ b , ;" + "\n8 8 words"))
    text = format_concise([device])
    assert text == r"\ n\,\;\\,u ,3,ro,0 8 words a\\ b \, \;,8 8 words"
    assert devices(text) == [device]


def test_a_device_that_ends_in_an_escape_is_closed_for_dmsetup() -> None:
    device = ConciseDevice("a", "", None, False, table("0 8 words ,"))
    assert format_concise([device]) == r"a,,,rw,0 8 words \,;"


def test_what_no_concise_form_can_hold_is_refused_when_printed() -> None:
    good = ConciseDevice("a", "", None, False, table("0 8 words"))
    bad = [
        [],
        [good, good],
        [replace(good, name="")],
        [replace(good, name="a\n")],
        [replace(good, uuid="\x7f")],
        [replace(good, minor=-1)],
        [replace(good, minor=1 << 20)],
    ]
    for some in bad:
        with pytest.raises(TableError) as caught:
            format_concise(some)
        assert caught.value.cure
