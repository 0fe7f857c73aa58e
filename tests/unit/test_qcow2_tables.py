"""Decoding of whole L2 tables, compared with the specification applied to one entry at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from blkloom.image.qcow2.format.geometry import Geometry
from blkloom.image.qcow2.format.tables import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    Kind,
    classify,
    compressed_place,
    compressed_places,
    contradiction,
    decode,
    encode,
    subcluster_bits,
)

RESERVED = ~(COPIED | COMPRESSED | OFFSET_MASK | 1) & (1 << 64) - 1
WORDS = st.integers(0, 2**64 - 1) | st.sampled_from(
    [0, 1, COPIED, COPIED | 1, COPIED | 0x10000, COPIED | 0x10001, 0x10000, 0x10200, COMPRESSED | 0x12345, 1 << 57]
)
BITMAPS = st.integers(0, 2**64 - 1) | st.sampled_from([0, 0xFFFFFFFF, 0xFFFFFFFF << 32, 1, 1 << 32, 1 << 32 | 1])


def slowly(entry: int, geometry: Geometry, version: int, data_file: bool) -> tuple[Kind, int]:
    """The kind of a standard cluster and its host offset, as the specification has it."""
    if entry & COMPRESSED:
        return (Kind.INVALID if data_file else Kind.COMPRESSED), entry
    offset = entry & OFFSET_MASK
    allocated = offset != 0 or (data_file and bool(entry & COPIED))
    if entry & RESERVED or offset % geometry.cluster or (entry & 1 and version < 3):
        return Kind.INVALID, offset
    if entry & 1:
        return Kind.ZERO, offset
    return (Kind.DATA if allocated else Kind.UNALLOCATED), offset


def slowly_extended(entry: int, bitmap: int, geometry: Geometry, data_file: bool) -> list[tuple[Kind, int]]:
    """The same of a cluster's subclusters."""
    kind, offset = slowly(entry, geometry, 3, data_file)
    if entry & COMPRESSED:
        return [(kind, entry)] * 32
    backed = offset != 0 or (data_file and bool(entry & COPIED))
    found = []
    for number in range(32):
        allocated, zero = bitmap >> number & 1, bitmap >> (number + 32) & 1
        if kind is Kind.INVALID or entry & 1 or (allocated and (zero or not backed)):
            here = Kind.INVALID
        else:
            here = Kind.ZERO if zero else Kind.DATA if allocated else Kind.UNALLOCATED
        found.append((here, offset + number * geometry.unit if backed else 0))
    return found


@given(st.lists(WORDS, min_size=1, max_size=20), st.integers(9, 21), st.sampled_from([2, 3]), st.booleans())
def test_standard_entries_are_what_the_specification_says(
    words: list[int], bits: int, version: int, data_file: bool
) -> None:
    geometry = Geometry(bits)
    found = classify(np.array(words, np.uint64), None, geometry, version=version, data_file=data_file)
    expected = [slowly(word, geometry, version, data_file) for word in words]
    assert [Kind(kind) for kind in found.kinds] == [kind for kind, _ in expected]
    assert found.offsets.tolist() == [offset for _, offset in expected]
    assert found.copied.tolist() == [bool(word & COPIED) for word in words]


@given(st.lists(st.tuples(WORDS, BITMAPS), min_size=1, max_size=8), st.integers(14, 21), st.booleans())
def test_extended_entries_are_what_the_specification_says(
    pairs: list[tuple[int, int]], bits: int, data_file: bool
) -> None:
    geometry = Geometry(bits, extended=True)
    entries, bitmaps = (np.array(column, np.uint64) for column in zip(*pairs, strict=True))
    found = classify(entries, bitmaps, geometry, version=3, data_file=data_file)
    expected = [unit for pair in pairs for unit in slowly_extended(*pair, geometry, data_file)]
    assert [Kind(kind) for kind in found.kinds] == [kind for kind, _ in expected]
    assert found.offsets.tolist() == [offset for _, offset in expected]


@given(WORDS, st.none() | BITMAPS, st.integers(14, 21), st.booleans(), st.none() | st.integers(0, 1 << 20))
@example(entry=COPIED, bitmap=None, bits=16, data_file=True, end=0)
def test_what_is_wrong_with_an_entry_is_said_of_those_that_are_invalid(
    entry: int, bitmap: int | None, bits: int, data_file: bool, end: int | None
) -> None:
    geometry = Geometry(bits, extended=bitmap is not None)
    bitmaps = None if bitmap is None else np.array([bitmap], np.uint64)
    found = classify(np.array([entry], np.uint64), bitmaps, geometry, version=3, data_file=data_file, end=end)
    said = contradiction(entry, bitmap, geometry, version=3, data_file=data_file, end=end)
    wrong = bool((found.kinds == Kind.INVALID).any())
    assert bool(said) == wrong or ("past the end" in said and not wrong), "a place past the end that is not read"


@pytest.mark.parametrize(("end", "kind"), [(0x10000, Kind.INVALID), (0x10001, Kind.DATA), (None, Kind.DATA)])
def test_data_that_begins_past_the_end_of_its_file_is_invalid(end: int | None, kind: Kind) -> None:
    entries = np.array([COPIED | 0x10000, COMPRESSED | 0x10000], np.uint64)
    found = classify(entries, None, Geometry(16), version=3, end=end)
    assert found.kinds.tolist() == [kind, Kind.INVALID if kind is Kind.INVALID else Kind.COMPRESSED]
    assert classify(np.array([COPIED | 0x10000 | 1], np.uint64), None, Geometry(16), version=3, end=end).kinds == [
        Kind.ZERO
    ]


@given(st.lists(st.integers(0, 2**64 - 1), max_size=20))
def test_tables_are_big_endian_in_the_file(words: list[int]) -> None:
    raw = b"".join(word.to_bytes(8, "big") for word in words)
    assert decode(raw).tolist() == words
    assert encode(decode(raw)) == raw


@given(st.lists(st.lists(st.booleans(), min_size=32, max_size=32), min_size=1, max_size=4))
def test_subcluster_flags_become_the_low_half_of_a_word(flags: list[list[bool]]) -> None:
    expected = [sum(flag << number for number, flag in enumerate(row)) for row in flags]
    assert subcluster_bits(np.array(flags, np.bool_)).tolist() == expected


@pytest.mark.parametrize(("bits", "offset", "sectors"), [(16, 0x12345, 3), (9, 0x1FFFF, 2), (21, 0x600, 8192)])
def test_compressed_descriptors_give_the_bytes_that_are_theirs(bits: int, offset: int, sectors: int) -> None:
    entry = COMPRESSED | offset | (sectors - 1) << 62 - (bits - 8)
    assert compressed_place(entry, bits) == (offset, sectors * 512 - offset % 512)
    offsets, lengths = compressed_places(np.array([entry], np.uint64), bits)
    assert (int(offsets[0]), int(lengths[0])) == compressed_place(entry, bits)
