"""What a write to a cluster takes: NumPy over a slice of an L2 table, no I/O and no state. Pure; any thread.

Source: QEMU docs/interop/qcow2, "Cluster mapping" and "Extended L2 Entries".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from blkloom.qcow2.tables import COMPRESSED, OFFSET_MASK, Kind, classify, compressed_places
from blkloom.qcow2.types import SUBCLUSTERS, Geometry, Words

READY: Final = 0
"""Data may be written where it is."""
ZEROS: Final = 1
"""It has no place of its own, and reads as zeros: any zeroed host cluster will do, and nothing need be copied."""
IN_PLACE: Final = 2
"""It has a place of its own that does not hold all of what it reads as: zeros, or subclusters missing."""
COPY: Final = 3
"""It needs another place, and part of its contents there."""
BAD: Final = 4
"""The entry contradicts itself, or the end of the file."""

ALL_ALLOCATED: Final = np.uint64(0xFFFF_FFFF)
"""Subcluster bitmap: all allocated."""
ALL_ZEROS: Final = np.uint64(0xFFFF_FFFF_0000_0000)
"""Subcluster bitmap: all read as zeros."""
_COMPRESSED: Final = np.uint64(COMPRESSED)
_OFFSET: Final = np.uint64(OFFSET_MASK)
_NONE: Final = np.uint64(0)
_ZEROS: Final = np.uint8(ZEROS)
_COPY: Final = np.uint8(COPY)
# Plain numbers: looking an enum's member up costs more than comparing a window of clusters with it.
_UNALLOCATED: Final = int(Kind.UNALLOCATED)
_ZERO: Final = int(Kind.ZERO)
_DATA: Final = int(Kind.DATA)
_COMPRESSED_KIND: Final = int(Kind.COMPRESSED)
_INVALID: Final = int(Kind.INVALID)


@dataclass(frozen=True, slots=True)
class Layout:
    """What matters of an image here. data_file: data lies in another file, at the guest's own offsets."""

    geometry: Geometry
    version: int
    data_file: bool


def place(
    layout: Layout,
    entries: Words,
    bitmaps: Words | None,
    touched: NDArray[np.bool_] | None,
    zeros_below: NDArray[np.bool_] | None,
    end: int | None = None,
) -> NDArray[np.uint8]:
    """READY, ZEROS, IN_PLACE, COPY or BAD, a cluster.

    bitmaps, touched: extended images only; touched, of shape (clusters, 32), says which subclusters are written.
    zeros_below: for each unit, whether it would read as zeros were it unallocated (None: all would). end: as for
    `classify`; no write may make the file grow over data that it should hold already.
    """
    if bitmaps is None and not entries.any():  # the usual case of an image that fills up
        return np.full(entries.size, ZEROS, np.uint8) if zeros_below is None else np.where(zeros_below, _ZEROS, _COPY)
    units = classify(entries, bitmaps, layout.geometry, version=layout.version, data_file=layout.data_file, end=end)
    kinds = units.kinds
    found = np.full(entries.size, COPY, np.uint8)
    zero = kinds == _ZERO
    nothing = kinds == _UNALLOCATED
    reads_zero = zero | (nothing if zeros_below is None else nothing & zeros_below)
    if bitmaps is None:
        own = units.copied | (units.offsets != _NONE) if layout.data_file else units.copied & (units.offsets != _NONE)
        found[reads_zero] = ZEROS
        found[own & (kinds == _DATA)] = READY
        found[own & zero] = IN_PLACE
        found[kinds == _INVALID] = BAD
        if end is not None and zero.any():
            found[zero & (units.offsets >= np.uint64(end))] = BAD
        return found
    assert touched is not None, "extended images say which subclusters"
    shape = (-1, SUBCLUSTERS)
    kinds = kinds.reshape(shape)
    hosted = (entries & _OFFSET) != _NONE
    copied = units.copied.reshape(shape)[:, 0]
    own = hosted | copied if layout.data_file else hosted & copied
    own &= kinds[:, 0] != _COMPRESSED_KIND
    found[reads_zero.reshape(shape).all(axis=1)] = ZEROS
    found[own] = IN_PLACE
    found[own & ~(touched & (kinds != _DATA)).any(axis=1)] = READY
    found[(kinds == _INVALID).any(axis=1)] = BAD
    if end is not None:
        found[((entries & _OFFSET) >= np.uint64(end)) & (kinds[:, 0] != _COMPRESSED_KIND)] = BAD
    return found


def touched_by(low: int, high: int, first: int, count: int) -> NDArray[np.bool_]:
    """Which subclusters of `count` clusters from `first` on the units [low, high) are: shape (count, 32)."""
    touched = np.zeros(count * SUBCLUSTERS, np.bool_)
    touched[max(0, low - first * SUBCLUSTERS) : max(0, high - first * SUBCLUSTERS)] = True
    return touched.reshape(count, SUBCLUSTERS)


def host_clusters(layout: Layout, entries: Words) -> Words:
    """The host clusters of the image file that the entries refer to, once for each reference."""
    compressed = (entries & _COMPRESSED) != _NONE
    bits = np.uint64(layout.geometry.cluster_bits)
    plain = entries[~compressed] & _OFFSET
    found = np.zeros(0, np.uint64) if layout.data_file else plain[plain != _NONE] >> bits
    if compressed.any():
        offsets, lengths = compressed_places(entries[compressed], layout.geometry.cluster_bits)
        first, last = offsets >> bits, (offsets + lengths - np.uint64(1)) >> bits
        spans = (last - first + np.uint64(1)).astype(np.int64)
        within = np.arange(int(spans.sum())) - np.repeat(np.cumsum(spans) - spans, spans)
        found = np.concatenate([found, np.repeat(first, spans) + within.astype(np.uint64)])
    return found


def runs_alike(values: NDArray[Any]) -> Iterator[tuple[int, int, int]]:
    """(value, from, to) of neighbours that are equal."""
    cuts = (np.flatnonzero(np.diff(values)) + 1).tolist()
    for low, high in zip([0, *cuts], [*cuts, values.size], strict=True):
        yield int(values[low]), low, high


def joined(runs: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The same, each run as long as it can be."""
    length, flags = 0, 0
    for more, value in runs:
        if length and value != flags:
            yield length, flags
            length = 0
        length, flags = length + more, value
    if length:
        yield length, flags
