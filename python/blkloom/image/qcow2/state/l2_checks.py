"""Checks of an L2 table when it is read: its cluster contains no other metadata, and the clusters it refers to have
refcounts.

If a table refers to a cluster with refcount 0, the image is inconsistent: the cluster would be allocated a second time.
The same applies to a cluster past the end that the file had when it was opened, because it may have been allocated
since. Every table is checked when it is read, by any request, before anything is written near it. For an image that was
not closed, refcounts prove nothing until they have been corrected. One thread (the mapper's). May fail: OSError.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np

from blkloom.image.errors import CorruptImage
from blkloom.image.qcow2.format.geometry import L1Index
from blkloom.image.qcow2.format.tables import Layout, host_clusters
from blkloom.image.qcow2.state.overlap_check import Metadata
from blkloom.image.types import Words

if TYPE_CHECKING:
    from blkloom.image.qcow2.state.image import Image, L2Table
    from blkloom.image.qcow2.state.overlap_check import OverlapCheck
    from blkloom.image.qcow2.state.refcounts import Refcounts

_MOST_BLOCKS: Final = 16
"""Maximum number of refcount blocks read for one table; one or two suffice unless its clusters are scattered over a
large file.
"""


class L2Checks:
    """Checks each L2 table that a writable image reads from now on. wrong: called with what is found."""

    def __init__(
        self, image: Image, refcounts: Refcounts, overlaps: OverlapCheck, wrong: Callable[[CorruptImage], None]
    ) -> None:
        self._image = image
        me = weakref.proxy(self)  # a reference cycle would keep both in memory
        image.on_l2_read = lambda table: me.read(table)
        self._refcounts = refcounts
        self._overlaps = overlaps
        self._wrong = wrong
        self._layout: Final = Layout(image.geometry, image.header.version, image.header.has_data_file)
        self._end: Final = -(-image.storage.size() >> image.geometry.cluster_bits)
        self._met = np.zeros(image.l1.size, np.bool_)
        self._missing: dict[L1Index, int] = {}
        """For each table that names clusters past the end of the file, one of these clusters."""
        self.counts_hold = not image.needs_repair
        """Whether clusters with references must have refcounts."""
        self.found: CorruptImage | None = None
        """The first error."""

    def missing(self, index: L1Index, hosts: Words) -> int | None:
        """A host cluster that a table names and that the file did not have when the table was first read."""
        if not self._met[index]:
            return int(hosts.max()) if hosts.size and int(hosts.max()) >= self._end else None
        cluster = self._missing.get(index)
        return cluster if cluster is not None and (hosts == np.uint64(cluster)).any() else None

    def met(self, index: L1Index) -> None:
        """Records a table as checked: it is not checked again when it is read again."""
        self._met[index] = True

    def is_met(self, index: L1Index) -> bool:
        """Whether the table was checked."""
        return bool(self._met[index])

    def read(self, table: L2Table) -> None:
        """Called when the image has read a table from the file."""
        if self._met[table.index]:
            return
        self._met[table.index] = True
        try:
            self.check(table.index, int(table.offset), table.entries)
        except CorruptImage as error:
            self.found = self.found or error
            self._wrong(error)

    def check(self, index: L1Index, offset: int, entries: Words) -> None:
        """Checks the table at `offset`, which has these entries in the file. Raises CorruptImage, OSError."""
        bits = self._layout.geometry.cluster_bits
        self._overlaps.writes(Metadata.L2, offset >> bits, f"L2 table {index}", in_place=False)
        hosts = host_clusters(self._layout, entries)
        named = np.append(hosts, np.uint64(offset >> bits))
        there = named < np.uint64(-(-self._image.storage.size() >> bits))
        if not there.all():  # a request that needs one of these clusters finds the error
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
