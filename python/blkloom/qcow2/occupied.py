"""Where metadata lies, so that neither allocation nor the guest's data is ever put over it, whatever counts and tables
say.

`at` is asked before clusters are handed out and sees what is true now. `collides` is asked for data that the tables
name, and compares with what was true when the image was opened, less what has been handed out since: metadata made
later lies in clusters that were free. One thread (the mapper's). May fail: CorruptImage, OSError.

Source: QEMU docs/interop/qcow2; QEMU's own overlap checks, without those of inactive L2 tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from blkloom.qcow2.tables import OFFSET_MASK
from blkloom.qcow2.types import Words

if TYPE_CHECKING:
    from blkloom.qcow2.bitmaps import Bitmaps
    from blkloom.qcow2.image import Image
    from blkloom.qcow2.refcounts import Refcounts
    from blkloom.qcow2.snapshots import Snapshot


class Occupied:
    """The metadata of one writable image."""

    def __init__(
        self, image: Image, refcounts: Refcounts, snapshots: list[Snapshot], bitmaps: Bitmaps, bitmap_directory: Words
    ) -> None:
        """bitmap_directory: the clusters it takes."""
        self._image = image
        self._refcounts = refcounts
        bits = image.geometry.cluster_bits
        header = image.header
        parts = [
            _run(header.snapshot_offset, sum(snapshot.length for snapshot in snapshots), bits),
            *(_run(snapshot.l1_offset, snapshot.l1_size * 8, bits) for snapshot in snapshots),
            bitmaps.clusters(),
            bitmap_directory,
        ]
        self._fixed: Final = np.unique(np.concatenate(parts))
        """Nothing a session changes."""
        self._known: Words | None = None

    def at(self, first: int, count: int) -> str:
        """Names metadata in `count` clusters from `first` on, "" for none; they are about to be handed out."""
        table = self._refcounts.table_offset >> self._image.geometry.cluster_bits
        if table < first + count and table + self._refcounts.table_clusters > first:
            return "the refcount table"
        blocks = self._refcounts.block_clusters()
        if np.any((blocks >= first) & (blocks < first + count)):
            return "a refcount block"
        low = int(np.searchsorted(self._fixed, first))
        if low < self._fixed.size and int(self._fixed[low]) < first + count:
            return "a snapshot's or bitmap's table"
        if what := self._image.metadata_in(first, count):
            return what
        if self._known is not None:
            low, high = np.searchsorted(self._known, [first, first + count]).tolist()
            if low < high:
                self._known = np.delete(self._known, np.s_[low:high])
        return ""

    def collides(self, hosts: Words) -> NDArray[np.bool_]:
        """Which of the host clusters (numbers) hold metadata too."""
        if self._known is None:
            self._known = self._all()
        places = np.searchsorted(self._known, hosts)
        places[places == self._known.size] = 0
        found: NDArray[np.bool_] = self._known[places] == hosts
        return found

    def metadata(self) -> Words:
        """All clusters with metadata but L2 tables, as it is now."""
        header, bits = self._image.header, self._image.geometry.cluster_bits
        parts = [
            np.zeros(1, np.uint64),
            _run(header.l1_offset, header.l1_size * 8, bits),
            _run(self._refcounts.table_offset, self._refcounts.table_clusters << bits, bits),
            self._refcounts.block_clusters(),
            self._fixed,
        ]
        return np.concatenate(parts)

    def _all(self) -> Words:
        tables = self._image.l1 & np.uint64(OFFSET_MASK)
        clusters = tables[tables != 0] >> np.uint64(self._image.geometry.cluster_bits)
        return np.unique(np.concatenate([self.metadata(), clusters]))


def _run(offset: int, length: int, cluster_bits: int) -> Words:
    """The clusters that a range of the file touches."""
    first = offset >> cluster_bits
    return np.arange(first, first + (-(-length >> cluster_bits)) if length else first, dtype=np.uint64)
