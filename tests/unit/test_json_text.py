"""Messages and states can contain file names that are not UTF-8, and refuse text that cannot be a name."""

from __future__ import annotations

import os

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkloom.json_text import decode, encode


class Inner(msgspec.Struct, tag="inner"):
    path: str
    number: int = 0


class Outer(msgspec.Struct, omit_defaults=True):
    inner: Inner
    paths: dict[str, list[str]]


DECODER = msgspec.json.Decoder(Outer)
NAMES = st.binary(max_size=20).map(os.fsdecode)


@given(NAMES, st.integers(-(1 << 63), (1 << 63) - 1), st.dictionaries(NAMES, st.lists(NAMES)))
def test_a_message_is_read_as_it_was_written(path: str, number: int, paths: dict[str, list[str]]) -> None:
    message = Outer(Inner(path, number), paths)
    line = encode(message)
    assert b"\n" not in line
    assert decode(line, DECODER) == message


def test_surrogates_that_stand_for_no_byte_are_refused_on_both_sides() -> None:
    with pytest.raises(UnicodeEncodeError):
        encode(Outer(Inner("\ud800"), {}))
    with pytest.raises(msgspec.DecodeError):
        decode(b'{"inner": {"type": "inner", "path": "\\ud800"}, "paths": {}}', DECODER)


@pytest.mark.parametrize(
    "line", [b'{"inner": "\\udcff"', b"\\udcff", b'{"inner": NaN, "paths": "\\udcff"}', b"[" * 99999 + b'"\\udcff"']
)
def test_what_is_no_json_stays_none(line: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode(line, DECODER)


def test_a_value_of_another_type_is_told_as_ever() -> None:
    with pytest.raises(msgspec.ValidationError):
        decode(b'{"inner": 1, "paths": {"\\udcff": []}}', DECODER)
