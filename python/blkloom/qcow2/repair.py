"""What refers to clusters: puts refcounts right from that, which an image needs that was not closed while they were
lazy, and finds out whether the file was cut short.

Every table is read once, however often it is referred to. After `rebuild` each count is exact, so what a crash leaked
is free again; refcount blocks that never reached the disk are made anew. One thread, before anybody writes; `check_end`
before clusters are handed out. May fail: CorruptImage (what refers past the end of the file), ResourceError (too much
to be counted), OSError.

Source: QEMU docs/interop/qcow2, "Dirty bit".
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from blkloom.errors import ResourceError
from blkloom.qcow2.placing import Layout, host_clusters
from blkloom.qcow2.tables import OFFSET_MASK, decode
from blkloom.qcow2.types import HostOffset, Words

if TYPE_CHECKING:
    from blkloom.qcow2.image import Image
    from blkloom.qcow2.overlap_check import OverlapCheck
    from blkloom.qcow2.refcounts import Refcounts
    from blkloom.qcow2.snapshots import Snapshot

_log = logging.getLogger(__name__)

_OFFSET: Final = np.uint64(OFFSET_MASK)
_ENOUGH: Final = 1 << 22
"""References collected before they are counted."""

_ARRAY: Final = 16
"""References that take as much memory as an empty array of them."""

_MOST_CLUSTERS: Final = 1 << 27
_L1_LIMIT: Final = 256 << 20

_HELD: Final = 64 << 20
"""Bytes of counts kept before they are written, and of new blocks."""


def rebuild(
    image: Image, refcounts: Refcounts, overlaps: OverlapCheck, snapshots: list[Snapshot], write: Callable[[], None]
) -> int:
    """Makes all counts exact on disk, with blocks and a table for clusters that have no counts at all. write: of the
    refcounts, in order, and durably. Returns how many clusters had another count.
    """
    numbers, counts = _count(_references(image, overlaps, snapshots))
    limit = -(-image.storage.size() >> image.geometry.cluster_bits)
    if numbers.size and int(numbers[-1]) >= limit:
        raise image.corrupt(f"cluster {int(numbers[-1])} is referred to, and the file has {limit}")
    blocks = np.unique(numbers // np.uint64(refcounts.per_block)).tolist()
    if missing := [index for index in blocks if not refcounts.described(index * refcounts.per_block)]:
        if len(missing) * refcounts.block_memory > _HELD:
            raise image.corrupt(f"{len(missing)} refcount blocks are missing, {missing[0]} first")
        refcounts.describe_all(missing, limit)
        numbers, counts = _count(_references(image, overlaps, snapshots))
    changed = 0
    for index in np.flatnonzero(refcounts.table).tolist():
        first = index * refcounts.per_block
        bounds = np.array([first, first + refcounts.per_block], np.uint64)  # of another type, all would be converted
        low, high = np.searchsorted(numbers, bounds).tolist()
        wanted = np.zeros(refcounts.per_block, np.uint64)
        wanted[(numbers[low:high] - np.uint64(first)).astype(np.int64)] = counts[low:high]
        changed += refcounts.put(index, wanted)
        if refcounts.held > _HELD:
            # The image is dirty, so they may be on disk as they are; `write` syncs.
            refcounts.write_blocks()
            refcounts.blocks_written()
    write()
    if changed:
        _log.warning("%s: was not closed; %d refcounts put right", image.path, changed)
    return changed


def check_end(image: Image, refcounts: Refcounts, overlaps: OverlapCheck, snapshots: list[Snapshot]) -> None:
    """Raises CorruptImage if anything refers to what is past the end of the file, which then was cut short. All tables
    are read where counts say that clusters there are in use; after a crash those may be leaked.
    """
    bits, size = image.geometry.cluster_bits, image.storage.size()
    limit = -(-size >> bits)
    if not refcounts.counts_past(limit):
        return
    for clusters, _ in _references(image, overlaps, snapshots):
        if clusters.size and (highest := int(clusters.max())) >= limit:
            raise image.corrupt(f"{highest << bits:#x} is referred to, past the end of the file, which was cut short")


def _references(image: Image, overlaps: OverlapCheck, snapshots: list[Snapshot]) -> Iterator[tuple[Words, Words | int]]:
    """(host clusters, how often each, or all, are referred to). A cluster may come again."""
    for part in overlaps.metadata():
        yield part, 1
    layout = Layout(image.geometry, image.header.version, image.header.has_data_file)
    bits, cluster = image.geometry.cluster_bits, image.geometry.cluster
    size = image.storage.size()
    offsets, times = np.unique(np.concatenate(_l2_offsets(image, snapshots)), return_counts=True)
    yield offsets >> np.uint64(bits), times.astype(np.uint64)
    data = 0  # what lies between a table and that is a hole
    for offset, count in zip(offsets.tolist(), times.tolist(), strict=True):
        if offset % cluster or offset >= size:
            raise image.corrupt(f"an L1 entry leads to {offset:#x}, which is no place of an L2 table")
        if offset >= data:
            data = next(image.storage.data_runs(HostOffset(offset), size - offset), (size, size))[0]
        if offset + cluster <= data:
            continue  # a hole: none of it refers to anything
        words = decode(image.storage.read(HostOffset(offset), cluster))
        hosts = host_clusters(layout, words[:: 2 if image.geometry.extended else 1])
        if hosts.size:
            yield hosts, count


def _l2_offsets(image: Image, snapshots: list[Snapshot]) -> list[Words]:
    """Of all L2 tables, once for each L1 entry that leads there."""
    if (length := sum(snapshot.l1_size * 8 for snapshot in snapshots)) > _L1_LIMIT:
        raise image.corrupt(f"L1 tables of {len(snapshots)} snapshots take {length} bytes, too many to be counted here")
    tables = [image.l1, *(decode(image.storage.read(s.l1_offset, s.l1_size * 8)) for s in snapshots)]
    offsets = [table & _OFFSET for table in tables]
    return [part[part != 0] for part in offsets]


def _count(references: Iterator[tuple[Words, Words | int]]) -> tuple[Words, Words]:
    """Sorted clusters, and how often each is referred to."""
    numbers, counts = np.zeros(0, np.uint64), np.zeros(0, np.uint64)
    waiting: list[tuple[Words, Words | int]] = []

    def merge() -> tuple[Words, Words]:
        new = [numbers, *(part for part, _ in waiting)]
        times = [counts, *(np.broadcast_to(np.uint64(count), part.shape) for part, count in waiting)]
        every, where = np.unique(np.concatenate(new), return_inverse=True)
        sums = np.zeros(every.size, np.uint64)
        np.add.at(sums, where, np.concatenate(times))
        return every, sums

    size = 0
    for part, count in references:
        waiting.append((part, count))
        size += part.size + _ARRAY
        if size > _ENOUGH:
            numbers, counts = merge()
            if numbers.size > _MOST_CLUSTERS:
                raise ResourceError(
                    f"more than {_MOST_CLUSTERS} clusters are in use, too many to be counted here",
                    errno=errno.EFBIG,
                    cure="repair the image with qemu-img check -r all",
                )
            waiting.clear()
            size = 0
    return merge()
