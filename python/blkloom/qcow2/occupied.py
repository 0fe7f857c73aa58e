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
    from collections.abc import Iterator

    from blkloom.qcow2.bitmaps import Bitmaps
    from blkloom.qcow2.image import Image
    from blkloom.qcow2.refcounts import Refcounts
    from blkloom.qcow2.snapshots import Snapshot

_PIECE: Final = 1 << 20


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
        runs = [
            _run(header.snapshot_offset, sum(snapshot.length for snapshot in snapshots), bits),
            *(_run(snapshot.l1_offset, snapshot.l1_size * 8, bits) for snapshot in snapshots),
        ]
        self._fixed: Final = _Runs(runs, np.concatenate([bitmaps.clusters(), bitmap_directory]))
        """Nothing a session changes. As runs, for an image may name as many and as long ones as it likes."""
        self._known: Words | None = None

    def at(self, first: int, count: int) -> str:
        """Names metadata in `count` clusters from `first` on, "" for none; they are about to be handed out."""
        table = self._refcounts.table_offset >> self._image.geometry.cluster_bits
        if table < first + count and table + self._refcounts.table_clusters > first:
            return "the refcount table"
        blocks = self._refcounts.block_clusters()
        if np.any((blocks >= first) & (blocks < first + count)):
            return "a refcount block"
        if self._fixed.touch(first, count):
            return "a snapshot's or bitmap's table"
        if what := self._image.metadata_in(first, count):
            return what
        if self._known is not None:
            bounds = np.array([first, first + count], np.uint64)  # of another type, all would be converted
            low, high = np.searchsorted(self._known, bounds).tolist()
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
        if self._fixed:
            found |= self._fixed.hold(hosts)
        return found

    def metadata(self) -> Iterator[Words]:
        """All clusters with metadata but L2 tables, as it is now."""
        yield self._changing()
        yield from self._fixed.clusters()

    def _changing(self) -> Words:
        header, bits = self._image.header, self._image.geometry.cluster_bits
        l1 = _run(header.l1_offset, header.l1_size * 8, bits)
        table = _run(self._refcounts.table_offset, self._refcounts.table_clusters << bits, bits)
        runs = [np.arange(*run, dtype=np.uint64) for run in ((0, 1), l1, table)]
        return np.concatenate([*runs, self._refcounts.block_clusters()])

    def _all(self) -> Words:
        tables = self._image.l1 & np.uint64(OFFSET_MASK)
        clusters = tables[tables != 0] >> np.uint64(self._image.geometry.cluster_bits)
        return np.unique(np.concatenate([self._changing(), clusters]))


class _Runs:
    """Runs of clusters, sorted, and none touches another. runs: (first, end) each. singles: of one cluster each."""

    def __init__(self, runs: list[tuple[int, int]], singles: Words) -> None:
        pairs = np.array([run for run in runs if run[0] < run[1]], np.uint64).reshape(-1, 2)
        starts = np.concatenate([pairs[:, 0], singles])
        ends = np.concatenate([pairs[:, 1], singles + np.uint64(1)])
        order = np.argsort(starts)
        starts, ends = starts[order], np.maximum.accumulate(ends[order])
        begins = np.ones(starts.size, np.bool_)
        begins[1:] = starts[1:] > ends[:-1]
        self._starts = starts[begins]
        self._ends = ends[np.append(begins[1:], True)] if starts.size else ends

    def __bool__(self) -> bool:
        return bool(self._starts.size)

    def touch(self, first: int, count: int) -> bool:
        """Whether any of `count` clusters from `first` on is in one."""
        at = int(np.searchsorted(self._ends, np.uint64(first), side="right"))
        return at < self._starts.size and int(self._starts[at]) < first + count

    def hold(self, clusters: Words) -> NDArray[np.bool_]:
        """Which of the clusters are in one."""
        at = np.searchsorted(self._ends, clusters, side="right")
        found: NDArray[np.bool_] = at < self._starts.size
        found[found] = self._starts[at[found]] <= clusters[found]
        return found

    def clusters(self) -> Iterator[Words]:
        """All of them, a piece at a time."""
        for first, end in zip(self._starts.tolist(), self._ends.tolist(), strict=True):
            for low in range(first, end, _PIECE):
                yield np.arange(low, min(low + _PIECE, end), dtype=np.uint64)


def _run(offset: int, length: int, cluster_bits: int) -> tuple[int, int]:
    """(first, end) of the clusters that a range of the file touches."""
    first = offset >> cluster_bits
    return first, first + (-(-length >> cluster_bits))
