"""Mangling and limits of names, as in dmsetup."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkloom.device_names import (
    LONGEST_NAME,
    DeviceNameError,
    MangleError,
    Mangling,
    ReservedNameError,
    check_name,
    check_new_name,
    check_uuid,
    mangle,
    read_name,
    show_name,
    unmangle,
)

PLAIN = "abcXYZ019#+-.:=@_"
any_bytes = st.binary(max_size=40).map(lambda raw: raw.decode("utf-8", "surrogateescape"))


@given(any_bytes)
def test_unmangling_undoes_mangling(text: str) -> None:
    assert unmangle(mangle(text)) == text


@given(any_bytes)
def test_a_mangled_name_has_only_characters_udev_likes_and_escapes(text: str) -> None:
    assert set(mangle(text)) <= set("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz#+-.:=@_\\")


@given(st.text(PLAIN + " é/%", max_size=30))
def test_auto_mode_takes_a_name_and_its_mangled_form_for_the_same(name: str) -> None:
    assert read_name(name, Mangling.AUTO) == name
    assert read_name(mangle(name), Mangling.AUTO) == name


@given(any_bytes)
def test_what_none_mode_shows_it_reads_back(name: str) -> None:
    assert read_name(show_name(name, Mangling.NONE), Mangling.NONE) == name


@pytest.mark.parametrize(
    ("text", "mode", "meant"),
    [
        ("my disk", Mangling.AUTO, "my disk"),
        (r"my\x20disk", Mangling.AUTO, "my disk"),
        (r"my\x20disk", Mangling.HEX, r"my\x20disk"),
        (r"my\x20disk", Mangling.NONE, "my disk"),
        (r"back\slash", Mangling.AUTO, r"back\slash"),
        ("", Mangling.AUTO, ""),
    ],
)
def test_a_word_means_this_name(text: str, mode: Mangling, meant: str) -> None:
    assert read_name(text, mode) == meant


@pytest.mark.parametrize("text", [r"mixed \x20", r"\x20 after", r"cut\x2", r"cut\x", r"no\xzz"])
def test_auto_mode_refuses_half_mangled_names_with_dmsetups_words(text: str) -> None:
    with pytest.raises(MangleError, match="contains mixed mangled and unmangled characters or it's already mangled"):
        read_name(text, Mangling.AUTO)


def test_auto_mode_refuses_names_mangled_twice() -> None:
    with pytest.raises(DeviceNameError, match="seems to be mangled more than once"):
        read_name(r"my\x5cx20disk", Mangling.AUTO)
    assert read_name(r"my\x5cx20disk", Mangling.NONE) == r"my\x20disk"


def test_names_are_limited_in_their_mangled_form() -> None:
    assert check_name("n" * LONGEST_NAME)
    with pytest.raises(DeviceNameError, match=r'^Name "n+" too long\.'):
        check_name("n" * (LONGEST_NAME + 1))
    assert check_name(" " * 31)
    with pytest.raises(MangleError, match=r'Mangled form of the name too long for " +"'):
        check_name(" " * 32)


def test_uuids_may_be_one_byte_longer_than_names() -> None:
    assert check_uuid("u" * 128)
    with pytest.raises(MangleError, match="Mangled form of the UUID too long"):
        check_uuid("u" * 129)


@pytest.mark.parametrize("name", ["", "a/b", "\0", "\udcff"])
def test_these_are_no_names(name: str) -> None:
    with pytest.raises(DeviceNameError):
        check_name(name)


@pytest.mark.parametrize("name", [".", "..", "control"])
def test_names_with_a_meaning_of_their_own_are_not_given(name: str) -> None:
    check_name(name)
    with pytest.raises(ReservedNameError):
        check_new_name(name)
