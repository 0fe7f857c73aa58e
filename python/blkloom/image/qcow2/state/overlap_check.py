"""Overlap check: writes, allocations and frees never touch other metadata, even with wrong refcounts and tables.

All changes of an image file are checked here first, as in QEMU's qcow2_pre_write_overlap_check: `allocation` before
clusters are allocated, `data` before guest data is written to an existing cluster, `frees` before clusters are freed,
`writes`, `structures` and `bitmap_writes` before metadata is changed in place. `allocation` uses all current metadata.
The others use the metadata that the image had when it was opened, without the clusters allocated since: newer metadata
is in clusters that were free. One thread (the mapper's). May fail: CorruptImage, OSError.

Source: QEMU docs/interop/qcow2; QEMU's overlap checks, without those of inactive L2 tables.
"""

from __future__ import annotations

import weakref
from enum import IntEnum
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from blkloom.image.errors import CorruptImage
from blkloom.image.qcow2.format.header import ExtensionKind
from blkloom.image.qcow2.format.tables import OFFSET_MASK
from blkloom.image.types import Words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blkloom.image.qcow2.format.snapshots import Snapshot
    from blkloom.image.qcow2.state.bitmaps import Bitmaps
    from blkloom.image.qcow2.state.image import Image
    from blkloom.image.qcow2.state.refcounts import Refcounts

_PIECE: Final = 1 << 20


class Metadata(IntEnum):
    """Kinds of metadata that a session changes."""

    HEADER = 0
    L1 = 1
    REFCOUNT_TABLE = 2
    REFCOUNT_BLOCK = 3
    L2 = 4


_NAMES: Final = ("the header", "the L1 table", "the refcount table", "a refcount block", "an L2 table")
_FIXED_NAME: Final = "a snapshot's or bitmap's table"


class OverlapCheck:
    """Overlap check of one writable image."""

    def __init__(self, image: Image, refcounts: Refcounts, snapshots: list[Snapshot], bitmaps: Bitmaps) -> None:
        self._image = image
        self._refcounts = refcounts
        me = weakref.proxy(self)  # a reference cycle would keep both in memory
        refcounts.before_change = lambda number, cluster: me.writes(
            Metadata.REFCOUNT_BLOCK, cluster, f"refcount block {number}"
        )
        self._bits: Final = image.geometry.cluster_bits
        header = image.header
        runs = [
            _run(header.snapshot_offset, sum(snapshot.length for snapshot in snapshots), self._bits),
            *(_run(snapshot.l1_offset, snapshot.l1_size * 8, self._bits) for snapshot in snapshots),
        ]
        self._directory: Final = _directory_clusters(header.extension(ExtensionKind.BITMAPS), self._bits)
        self._bitmaps: Final = bitmaps
        self._snapshots: Final = _Runs(runs, np.zeros(0, np.uint64))
        self._fixed: Final = _Runs(runs, np.concatenate([bitmaps.clusters(bitmaps.all), self._directory]))
        """Metadata that does not move in a session. Stored as runs, because an image may have many and long ones."""
        self._known: tuple[Words, NDArray[np.uint8]] | None = None
        self._passed: set[tuple[Metadata, int]] = set()
        """Changes in place that `writes` has allowed. They stay allowed, because known metadata only decreases."""

    def allocation(self, first: int, count: int) -> str:
        """Name of the metadata in `count` clusters from `first` on, which are about to be allocated; "" for none."""
        table = self._refcounts.table_offset >> self._bits
        if table < first + count and table + self._refcounts.table_clusters > first:
            return _NAMES[Metadata.REFCOUNT_TABLE]
        blocks = self._refcounts.block_clusters()
        if np.any((blocks >= first) & (blocks < first + count)):
            return _NAMES[Metadata.REFCOUNT_BLOCK]
        if self._fixed.touch(first, count):
            return _FIXED_NAME
        if what := self._image.metadata_in(first, count):
            return what
        if self._known is not None:
            clusters, kinds = self._known
            bounds = np.array([first, first + count], np.uint64)  # with another type, all would be converted
            low, high = np.searchsorted(clusters, bounds).tolist()
            if low < high:
                self._known = np.delete(clusters, np.s_[low:high]), np.delete(kinds, np.s_[low:high])
        return ""

    def data(self, hosts: Words) -> NDArray[np.bool_]:
        """Which of the host clusters (numbers) of guest data also contain metadata."""
        clusters, _ = self._metadata()
        places = np.searchsorted(clusters, hosts)
        places[places == clusters.size] = 0
        found: NDArray[np.bool_] = clusters[places] == hosts
        if self._fixed:
            found |= self._fixed.hold(hosts)
        return found

    def frees(self, clusters: Words) -> None:
        """Checks clusters whose refcount has become 0, before they are allocated again. Raises CorruptImage if they
        contain metadata.
        """
        for cluster in clusters[self.data(clusters)].tolist():
            if what := self.allocation(cluster, 1):  # moved metadata is not there any more
                raise self._prevented(cluster, "a cluster that is given back", what)

    def writes(self, kind: Metadata, cluster: int, what: str, *, in_place: bool = True) -> None:
        """Checks the cluster of `what`, metadata of that kind, before it is changed; not `in_place`: before it is
        copied and its cluster freed. Raises CorruptImage if the cluster also contains other metadata.
        """
        if in_place and (kind, cluster) in self._passed:
            return
        clusters, kinds = self._metadata()
        bounds = np.array([cluster, cluster + 1], np.uint64)
        low, high = np.searchsorted(clusters, bounds).tolist()
        others = kinds[low:high][kinds[low:high] != kind]
        if others.size:
            raise self._prevented(cluster, what, _NAMES[others[0]])
        if high - low > 1 and in_place:
            raise self._prevented(cluster, what, f"another {_NAMES[kind].split(' ', 1)[1]}")
        if self._fixed.touch(cluster, 1):
            raise self._prevented(cluster, what, _FIXED_NAME)
        if in_place:
            self._passed.add((kind, cluster))

    def moved(self, kind: Metadata, cluster: int) -> None:
        """Records that metadata of that kind, in one cluster, has moved."""
        clusters, kinds = self._metadata()
        bounds = np.array([cluster, cluster + 1], np.uint64)
        low, high = np.searchsorted(clusters, bounds).tolist()
        mine = low + np.flatnonzero(kinds[low:high] == kind)[:1]
        self._known = np.delete(clusters, mine), np.delete(kinds, mine)

    def structures(self) -> None:
        """Checks header, L1 table and refcount table before they are changed. Raises CorruptImage if they overlap other
        metadata.
        """
        clusters, kinds = self._metadata()
        mine = kinds <= Metadata.REFCOUNT_TABLE
        more_than_once = clusters[1:][clusters[1:] == clusters[:-1]]
        wrong = np.isin(clusters[mine], more_than_once) | self._fixed.hold(clusters[mine])
        if wrong.any():
            at = int(wrong.argmax())
            self.writes(Metadata(int(kinds[mine][at])), int(clusters[mine][at]), _NAMES[kinds[mine][at]])

    def bitmap_writes(self) -> None:
        """Checks the bitmap directory, and the tables and bits of bitmaps in memory, before they are changed. Raises
        CorruptImage if they overlap other metadata.
        """
        every = np.concatenate([self._bitmaps.clusters(self._bitmaps.all), self._directory])
        if not every.size:
            return
        clusters, kinds = self._metadata()
        mine = np.unique(np.concatenate([self._bitmaps.clusters(self._bitmaps.tracked), self._directory]))
        places = np.searchsorted(clusters, mine)
        places[places == clusters.size] = 0
        if (wrong := clusters[places] == mine).any():
            at = int(wrong.argmax())
            raise self._prevented(int(mine[at]), "a bitmap's table or bits", _NAMES[kinds[places[at]]])
        named, times = np.unique(every, return_counts=True)
        wrong = self._snapshots.hold(mine) | np.isin(mine, named[times > 1])
        if wrong.any():
            raise self._prevented(int(mine[int(wrong.argmax())]), "a bitmap's table or bits", _FIXED_NAME)

    def changing(self) -> list[Words]:
        """Clusters of metadata that may move, except L2 tables, at the moment."""
        return [part for part, _ in self._changing()]

    def fixed(self) -> Iterator[Words]:
        """Clusters of metadata that does not move in a session."""
        return self._fixed.clusters()

    def _changing(self) -> list[tuple[Words, Metadata]]:
        header = self._image.header
        l1 = _run(header.l1_offset, header.l1_size * 8, self._bits)
        table = _run(self._refcounts.table_offset, self._refcounts.table_clusters << self._bits, self._bits)
        return [
            (np.zeros(1, np.uint64), Metadata.HEADER),
            (np.arange(*l1, dtype=np.uint64), Metadata.L1),
            (np.arange(*table, dtype=np.uint64), Metadata.REFCOUNT_TABLE),
            (self._refcounts.block_clusters(), Metadata.REFCOUNT_BLOCK),
        ]

    def _metadata(self) -> tuple[Words, NDArray[np.uint8]]:
        """Clusters with metadata, sorted, with its kind; a cluster of several kinds occurs several times."""
        if self._known is None:
            tables = self._image.l1 & np.uint64(OFFSET_MASK)
            l2 = tables[tables != 0] >> np.uint64(self._bits)
            parts = [*self._changing(), (l2, Metadata.L2)]
            clusters = np.concatenate([part for part, _ in parts])
            kinds = np.repeat(np.array([kind for _, kind in parts], np.uint8), [part.size for part, _ in parts])
            order = np.argsort(clusters, kind="stable")
            self._known = clusters[order], kinds[order]
        return self._known

    def _prevented(self, cluster: int, what: str, other: str = "") -> CorruptImage:
        return CorruptImage(
            f"preventing invalid write on metadata: {what} at {cluster << self._bits:#x} overlaps with"
            f" {other or self._name(cluster)}",
            path=self._image.path,
        )

    def _name(self, cluster: int) -> str:
        """Name of the metadata in a cluster."""
        clusters, kinds = self._metadata()
        at = int(np.searchsorted(clusters, np.uint64(cluster)))
        known = at < clusters.size and int(clusters[at]) == cluster
        return _NAMES[kinds[at]] if known else _FIXED_NAME


class _Runs:
    """Sorted runs of clusters with gaps between them. runs: (first, end) of each. singles: runs of one cluster."""

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
        """Whether any of `count` clusters from `first` on is in a run."""
        at = int(np.searchsorted(self._ends, np.uint64(first), side="right"))
        return at < self._starts.size and int(self._starts[at]) < first + count

    def hold(self, clusters: Words) -> NDArray[np.bool_]:
        """Which of the clusters are in a run."""
        at = np.searchsorted(self._ends, clusters, side="right")
        found: NDArray[np.bool_] = at < self._starts.size
        found[found] = self._starts[at[found]] <= clusters[found]
        return found

    def clusters(self) -> Iterator[Words]:
        """All clusters, in pieces."""
        for first, end in zip(self._starts.tolist(), self._ends.tolist(), strict=True):
            for low in range(first, end, _PIECE):
                yield np.arange(low, min(low + _PIECE, end), dtype=np.uint64)


def _run(offset: int, length: int, cluster_bits: int) -> tuple[int, int]:
    """(first, end) of the clusters that a range of the file touches."""
    first = offset >> cluster_bits
    return first, first + (-(-length >> cluster_bits))


def _directory_clusters(extension: bytes | None, cluster_bits: int) -> Words:
    """Host clusters of the bitmap directory that a header extension names."""
    if extension is None or len(extension) < 24:
        return np.zeros(0, np.uint64)
    size, offset = int.from_bytes(extension[8:16], "big"), int.from_bytes(extension[16:24], "big") & OFFSET_MASK
    first = offset >> cluster_bits
    return np.arange(first, first + min(-(-size >> cluster_bits), 1 << 20), dtype=np.uint64)
