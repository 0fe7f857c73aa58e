"""Write classification: determines what a write to each of several clusters needs, with NumPy on a slice of an L2
table. Pure; any thread.

Source: QEMU docs/interop/qcow2, "Cluster mapping" and "Extended L2 Entries".
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from blkloom.image.qcow2.format.geometry import SUBCLUSTERS
from blkloom.image.qcow2.format.tables import COMPRESSED, OFFSET_WORD, Kind, Layout, classify
from blkloom.image.types import Words

READY: Final = 0
"""The cluster may be written in place."""
ZEROS: Final = 1
"""Unallocated, and reads as zeros: any zeroed host cluster can be used, without a copy."""
IN_PLACE: Final = 2
"""Allocated, but the host cluster does not have all of the contents that it reads as: zeros, or missing subclusters."""
COPY: Final = 3
"""Needs another host cluster, with a part of its contents."""
BAD: Final = 4
"""The entry is inconsistent, by itself or with the size of the file."""

_COMPRESSED: Final = np.uint64(COMPRESSED)
_NONE: Final = np.uint64(0)
_ZEROS: Final = np.uint8(ZEROS)
_COPY: Final = np.uint8(COPY)
# Plain numbers: the lookup of an enum member is slower than the comparison of a window of clusters.
_UNALLOCATED: Final = int(Kind.UNALLOCATED)
_ZERO: Final = int(Kind.ZERO)
_DATA: Final = int(Kind.DATA)
_COMPRESSED_KIND: Final = int(Kind.COMPRESSED)
_INVALID: Final = int(Kind.INVALID)


def classify_writes(
    layout: Layout,
    entries: Words,
    bitmaps: Words | None,
    touched: NDArray[np.bool_] | None,
    zeros_below: NDArray[np.bool_] | None,
    end: int | None = None,
) -> NDArray[np.uint8]:
    """READY, ZEROS, IN_PLACE, COPY or BAD for each cluster.

    bitmaps, touched: extended images only; touched, of shape (clusters, 32), says which subclusters are written.
    zeros_below: for each unit, whether it would read as zeros if it were unallocated (None: all would). end: as for
    `classify`; no write may extend the file past data that it should already have.
    """
    if bitmaps is None and not entries.any():  # the usual case while an image fills up
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
    hosted = (entries & OFFSET_WORD) != _NONE
    copied = units.copied.reshape(shape)[:, 0]
    own = hosted | copied if layout.data_file else hosted & copied
    own &= kinds[:, 0] != _COMPRESSED_KIND
    found[reads_zero.reshape(shape).all(axis=1)] = ZEROS
    found[own] = IN_PLACE
    found[own & ~(touched & (kinds != _DATA)).any(axis=1)] = READY
    found[(kinds == _INVALID).any(axis=1)] = BAD
    if end is not None:
        found[((entries & OFFSET_WORD) >= np.uint64(end)) & (kinds[:, 0] != _COMPRESSED_KIND)] = BAD
    return found


def touched_by(low: int, high: int, first: int, count: int) -> NDArray[np.bool_]:
    """Which subclusters of `count` clusters from `first` on are in units [low, high): shape (count, 32)."""
    touched = np.zeros(count * SUBCLUSTERS, np.bool_)
    touched[max(0, low - first * SUBCLUSTERS) : max(0, high - first * SUBCLUSTERS)] = True
    return touched.reshape(count, SUBCLUSTERS)
