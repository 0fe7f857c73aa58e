"""Checks of an L2 table when it is first read: it lies where no other metadata is, and what it names is counted.

A cluster that a table names and that counts 0 is a contradiction, for it would be handed out a second time. So is one
that the file did not have when it was opened, for that may have been handed out meanwhile. It is found when the table
is met, whichever request that is, before anything is written near it. Counts of an image that was not closed are no
evidence until they have been put right. One thread (the mapper's).
May fail: OSError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np

from blkloom.qcow2.errors import CorruptImage
from blkloom.qcow2.overlap_check import Metadata
from blkloom.qcow2.placing import Layout, host_clusters
from blkloom.qcow2.types import L1Index, Words

if TYPE_CHECKING:
    from blkloom.qcow2.image import Image, L2Table
    from blkloom.qcow2.overlap_check import OverlapCheck
    from blkloom.qcow2.refcounts import Refcounts

_MOST_BLOCKS: Final = 16
"""Refcount blocks read for one table; one or two do unless its clusters lie all over a large file."""


class L2Checks:
    """The L2 tables of a writable image, which asks from now on. wrong: called with what is found."""

    def __init__(
        self, image: Image, refcounts: Refcounts, overlaps: OverlapCheck, wrong: Callable[[CorruptImage], None]
    ) -> None:
        self._image = image
        self._refcounts = refcounts
        self._overlaps = overlaps
        self._wrong = wrong
        self._layout: Final = Layout(image.geometry, image.header.version, image.header.has_data_file)
        self._end: Final = -(-image.storage.size() >> image.geometry.cluster_bits)
        self._met = np.zeros(image.l1.size, np.bool_)
        self._missing: dict[L1Index, int] = {}
        """Of tables that name clusters past the end of the file, one of these."""
        self.counts_hold = not image.needs_repair
        """Whether what is named must be counted."""
        self.found: CorruptImage | None = None
        """What was found wrong first."""

    def missing(self, index: L1Index, hosts: Words) -> int | None:
        """Of the host clusters that a table names, one that the file did not have when the table was first read."""
        if not self._met[index]:
            return int(hosts.max()) if hosts.size and int(hosts.max()) >= self._end else None
        cluster = self._missing.get(index)
        return cluster if cluster is not None and (hosts == np.uint64(cluster)).any() else None

    def met(self, index: L1Index) -> None:
        """The table is known: it need not be checked when it is read again."""
        self._met[index] = True

    def is_met(self, index: L1Index) -> bool:
        """Whether the table is known."""
        return bool(self._met[index])

    def read(self, table: L2Table) -> None:
        """The image has read a table from the file."""
        if self._met[table.index]:
            return
        self._met[table.index] = True
        try:
            self.check(table.index, int(table.offset), table.entries)
        except CorruptImage as error:
            self.found = self.found or error
            self._wrong(error)

    def check(self, index: L1Index, offset: int, entries: Words) -> None:
        """The table at `offset` has these entries, as it stands in the file. Raises CorruptImage, OSError."""
        bits = self._layout.geometry.cluster_bits
        self._overlaps.writes(Metadata.L2, offset >> bits, f"L2 table {index}", in_place=False)
        hosts = host_clusters(self._layout, entries)
        named = np.append(hosts, np.uint64(offset >> bits))
        there = named < np.uint64(-(-self._image.storage.size() >> bits))
        if not there.all():  # whichever request needs one of these finds that
            self._missing[index] = int(named[int(there.argmin())])
            named = named[there]
        new = named >= np.uint64(self._end)
        if new.any():
            cluster = int(named[int(new.argmax())]) << bits
            raise self._image.corrupt(
                f"L2 table {index} names {cluster:#x}, which is past the end the file had when opened"
            )
        if not self.counts_hold or not named.size:
            return
        unused = self._refcounts.unused(named, _MOST_BLOCKS)
        if unused.any():
            cluster = int(named[int(unused.argmax())])
            what = "lies in" if cluster == offset >> bits else "names"
            raise self._image.corrupt(
                f"L2 table {index} {what} the cluster at {cluster << bits:#x}, which is free by its refcount"
            )
