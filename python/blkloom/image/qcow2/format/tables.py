"""Entries of L1 and L2 tables, decoded for a whole table at once with NumPy.

Tables are kept as in the file, but in the byte order of the machine (`decode`, `encode`). `classify` returns, for a run
of clusters, the kind and offset of each *unit* (cluster, or subcluster). Pure; any thread. Nothing raises: an
inconsistent entry has the kind INVALID, and affects only its own units.

Source: QEMU docs/interop/qcow2, "Cluster mapping" and "Extended L2 Entries".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from blkloom.image.qcow2.format.geometry import SUBCLUSTERS, Geometry
from blkloom.image.types import HostOffset, Words

COPIED: Final = 1 << 63
"""The cluster (or L2 table) has one reference: writing needs no copy."""
COMPRESSED: Final = 1 << 62
ALL_ZERO: Final = 1
"""Standard cluster that reads as zeros; only version 3 without extended L2 entries."""
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
"""Bits 9 - 55: the host offset in entries of L1 tables and of standard clusters."""

ALL_ALLOCATED: Final = np.uint64(0xFFFF_FFFF)
"""Subcluster bitmap: all allocated."""
ALL_ZEROS: Final = np.uint64(0xFFFF_FFFF_0000_0000)
"""Subcluster bitmap: all read as zeros."""

L1_RESERVED: Final = ~(COPIED | OFFSET_MASK) & (1 << 64) - 1

_COPIED: Final = np.uint64(COPIED)
_COMPRESSED: Final = np.uint64(COMPRESSED)
_ALL_ZERO: Final = np.uint64(ALL_ZERO)
OFFSET_WORD: Final = np.uint64(OFFSET_MASK)
_RESERVED: Final = np.uint64(~(COPIED | COMPRESSED | OFFSET_MASK | ALL_ZERO) & (1 << 64) - 1)
_NONE: Final = np.uint64(0)
_LOW_HALF: Final = np.uint64(0xFFFF_FFFF)
_HALF: Final = np.uint64(32)
_SECOND, _THIRD, _FOURTH = np.uint8(1), np.uint8(2), np.uint8(3)


class Kind(IntEnum):
    """Kind of a unit."""

    UNALLOCATED = 0
    """The layer below is visible; without a backing file, zeros."""
    ZERO = 1
    """Zeros, for any layer below. An allocated unit has a host cluster, which is not read."""
    DATA = 2
    COMPRESSED = 3
    """Part of a compressed cluster."""
    INVALID = 4
    """The entry is inconsistent."""


# Plain numbers: the lookup of an enum member is slower than the comparison of a few entries.
_DATA: Final = int(Kind.DATA)
_INVALID: Final = int(Kind.INVALID)


@dataclass(frozen=True, slots=True)
class Layout:
    """Properties of an image that decide the meaning of entries. data_file: data is in another file, at the guest's own
    offsets.
    """

    geometry: Geometry
    version: int
    data_file: bool


@dataclass(slots=True)
class Units:
    """Neighbouring units. kinds: a `Kind` for each. offsets: the host offset (bytes) of each unit with a host cluster,
    for every kind, else 0; for COMPRESSED, the L2 entry itself. copied: the entry's COPIED bit.
    """

    kinds: NDArray[np.uint8]
    offsets: Words
    copied: NDArray[np.bool_]


def decode(raw: bytes) -> Words:
    """Words of a table from its bytes in a file, as a new array."""
    return np.frombuffer(raw, ">u8").astype(np.uint64)


def encode(words: Words) -> bytes:
    """Bytes of a table for the file."""
    return words.astype(">u8").tobytes()


def classify(
    entries: Words,
    bitmaps: Words | None,
    geometry: Geometry,
    *,
    version: int,
    data_file: bool = False,
    end: int | None = None,
) -> Units:
    """Kinds and offsets of the units of the clusters that `entries` describe.

    entries: L2 entries of neighbouring clusters. bitmaps: their subcluster allocation bitmaps, if the geometry is
    extended. data_file: guest data is in an external data file, so that a host offset may be 0. end: bytes of the file
    with the data; an entry must not refer past it. None: there is no such limit.
    """
    compressed = (entries & _COMPRESSED) != _NONE
    offsets = entries & OFFSET_WORD
    copied = entries >= _COPIED
    backed = offsets != _NONE
    if data_file:
        backed |= copied
    bad = (entries & (_RESERVED | np.uint64(geometry.cluster - 1 & OFFSET_MASK))) != _NONE
    zero = (entries & _ALL_ZERO) != _NONE
    if bitmaps is None:
        # Four bits of an entry decide its kind: combined to one number, which indexes a table of 16.
        code = backed.view(np.uint8) | zero.view(np.uint8) << _SECOND
        code |= bad.view(np.uint8) << _THIRD | compressed.view(np.uint8) << _FOURTH
        kinds = _MEANINGS[version >= 3, data_file][code]
        if end is not None and int(offsets.max(initial=0)) >= end:
            kinds[(kinds == _DATA) & (offsets >= np.uint64(end))] = _INVALID
        if compressed.any():
            np.copyto(offsets, entries, where=compressed)
            if end is not None:
                kinds[_compressed_past(end, entries, compressed, geometry)] = _INVALID
        return Units(kinds, offsets, copied)
    kinds = _subclusters(bitmaps, backed)
    kinds[bad | zero] = Kind.INVALID
    # All bits of a compressed cluster's descriptor have another meaning; none of the checks above applies.
    kinds[compressed] = Kind.INVALID if data_file else Kind.COMPRESSED
    steps = np.arange(SUBCLUSTERS, dtype=np.uint64) * np.uint64(geometry.unit)
    places = np.where(backed[:, None], offsets[:, None] + steps, _NONE)
    if end is not None:
        kinds[(kinds == _DATA) & (places >= np.uint64(end))] = _INVALID
        kinds[_compressed_past(end, entries, compressed, geometry)] = _INVALID
    places[compressed] = entries[compressed, None]
    return Units(kinds.reshape(-1), places.reshape(-1), np.repeat(copied, SUBCLUSTERS))


def contradiction(
    entry: int, bitmap: int | None, geometry: Geometry, *, version: int, data_file: bool, end: int | None
) -> str:
    """A description of the inconsistency of an L2 entry that `classify` calls INVALID, or that must not be written to;
    "" for none. Arguments as for `classify`.
    """
    if entry & COMPRESSED:
        place = compressed_place(entry, geometry.cluster_bits)[0]
        if data_file:
            return "of a compressed cluster, in an image with an external data file"
        return f"of data at {place:#x}, past the end of the file" if end is not None and place >= end else ""
    place = HostOffset(entry & OFFSET_MASK)
    if entry & int(_RESERVED):
        return "with reserved bits set"
    if place % geometry.cluster:
        return f"of data at {place:#x}, which is no multiple of {geometry.cluster}"
    if entry & ALL_ZERO and bitmap is not None:
        return "with the zero bit set, in an image with subclusters"
    if entry & ALL_ZERO and version < 3:
        return "with the zero bit set, in an image of version 2"
    allocated, zero = (bitmap or 0) & 0xFFFF_FFFF, (bitmap or 0) >> SUBCLUSTERS
    if allocated & zero:
        return f"with subclusters both allocated and zeros (bitmap {bitmap:#x})"
    if allocated and not place and not (data_file and entry & COPIED):
        return f"with subclusters allocated nowhere (bitmap {bitmap:#x})"
    last = place + (allocated.bit_length() - 1) * geometry.unit if allocated else place
    if (place or (data_file and entry & COPIED)) and end is not None and last >= end:
        return f"of data at {last:#x}, past the end of the file"
    return ""


def _compressed_past(end: int, entries: Words, compressed: NDArray[np.bool_], geometry: Geometry) -> NDArray[np.bool_]:
    """Which of the entries are compressed clusters that begin past the end of the file."""
    past = compressed.copy()
    past[compressed] = compressed_places(entries[compressed], geometry.cluster_bits)[0] >= np.uint64(end)
    return past


def _subclusters(bitmaps: Words, backed: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Kinds according to the bitmaps alone: shape (n, 32)."""
    code = _bits(bitmaps & _LOW_HALF).view(np.uint8)
    code |= _bits(bitmaps >> _HALF).view(np.uint8) << _SECOND
    code |= backed.view(np.uint8)[:, None] << _THIRD
    return _SUBCLUSTER_MEANINGS[code]


def _meaning(code: int, *, version_3: bool, data_file: bool) -> Kind:
    """Kind of an entry. code: backed (1), zero (2), bad (4), compressed (8)."""
    if code & 8:
        return Kind.INVALID if data_file else Kind.COMPRESSED
    if code & 4 or (code & 2 and not version_3):
        return Kind.INVALID
    return Kind.ZERO if code & 2 else Kind.DATA if code & 1 else Kind.UNALLOCATED


_MEANINGS: Final = {
    (version_3, data_file): np.array(
        [_meaning(code, version_3=version_3, data_file=data_file) for code in range(16)], np.uint8
    )
    for version_3 in (False, True)
    for data_file in (False, True)
}
_SUBCLUSTER_MEANINGS: Final = np.array(
    [
        # allocated (1), zero (2), backed by a host cluster (4)
        Kind.UNALLOCATED,
        Kind.INVALID,
        Kind.ZERO,
        Kind.INVALID,
        Kind.UNALLOCATED,
        Kind.DATA,
        Kind.ZERO,
        Kind.INVALID,
    ],
    np.uint8,
)


def _bits(halves: Words) -> NDArray[np.bool_]:
    """32 bits a word, bit 0 first: shape (n, 32)."""
    little = halves.astype("<u4").view(np.uint8).reshape(-1, 4)
    return np.unpackbits(little, axis=1, bitorder="little").view(np.bool_)


def subcluster_bits(flags: NDArray[np.bool_]) -> Words:
    """The inverse of `_bits`: bools of shape (n, 32) as the low halves of words."""
    packed = np.packbits(flags, axis=1, bitorder="little")
    return np.ascontiguousarray(packed).view("<u4").reshape(-1).astype(np.uint64)


def compressed_place(entry: int, cluster_bits: int) -> tuple[HostOffset, int]:
    """Location of the compressed data of an L2 entry: its first byte, and its maximum length in bytes."""
    shift = 62 - (cluster_bits - 8)
    offset = entry & (1 << shift) - 1
    sectors = (entry >> shift & (1 << cluster_bits - 8) - 1) + 1
    return HostOffset(offset), sectors * 512 - offset % 512


def compressed_places(entries: Words, cluster_bits: int) -> tuple[Words, Words]:
    """`compressed_place` of many entries: offsets and lengths."""
    shift = 62 - (cluster_bits - 8)
    offsets = entries & np.uint64((1 << shift) - 1)
    sectors = (entries >> np.uint64(shift) & np.uint64((1 << cluster_bits - 8) - 1)) + np.uint64(1)
    return offsets, sectors * np.uint64(512) - offsets % np.uint64(512)


def host_clusters(layout: Layout, entries: Words) -> Words:
    """The host clusters of the image file that the entries refer to, once for each reference."""
    compressed = (entries & _COMPRESSED) != _NONE
    bits = np.uint64(layout.geometry.cluster_bits)
    plain = entries[~compressed] & OFFSET_WORD
    found = np.zeros(0, np.uint64) if layout.data_file else plain[plain != _NONE] >> bits
    if compressed.any():
        offsets, lengths = compressed_places(entries[compressed], layout.geometry.cluster_bits)
        first, last = offsets >> bits, (offsets + lengths - np.uint64(1)) >> bits
        spans = (last - first + np.uint64(1)).astype(np.int64)
        within = np.arange(int(spans.sum())) - np.repeat(np.cumsum(spans) - spans, spans)
        found = np.concatenate([found, np.repeat(first, spans) + within.astype(np.uint64)])
    return found
