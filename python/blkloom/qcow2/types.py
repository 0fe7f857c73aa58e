"""Address spaces and sizes of an image, told apart by type.

Pure. Source: QEMU docs/interop/qcow2, "General", "Cluster mapping" and "Extended L2 Entries".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NewType, TypeAlias

import numpy as np
from numpy.typing import NDArray

GuestOffset = NewType("GuestOffset", int)
"""Bytes from the start of the disk that the guest sees."""

HostOffset = NewType("HostOffset", int)
"""Bytes from the start of a file: the image, its data file, a raw backing file."""

L1Index = NewType("L1Index", int)
"""Which L2 table: the number of its entry in the L1 table."""

Words: TypeAlias = NDArray[np.uint64]
"""64-bit numbers of a table, in the machine's byte order."""

SUBCLUSTERS: Final = 32
"""Subclusters a cluster, where there are any."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """How an image cuts the guest's disk up. A *unit* is what can be mapped by itself: a subcluster of an image
    with extended L2 entries, else a cluster.
    """

    cluster_bits: int
    extended: bool = False

    @property
    def cluster(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def unit_bits(self) -> int:
        """A unit has `1 << unit_bits` bytes."""
        return self.cluster_bits - 5 if self.extended else self.cluster_bits

    @property
    def unit(self) -> int:
        """Bytes of a unit."""
        return 1 << self.unit_bits

    @property
    def units_a_cluster(self) -> int:
        """Units in a cluster."""
        return SUBCLUSTERS if self.extended else 1

    @property
    def l2_entries(self) -> int:
        """Clusters that one L2 table describes."""
        return 1 << (self.cluster_bits - (4 if self.extended else 3))

    @property
    def l2_units(self) -> int:
        """Units that one L2 table describes."""
        return self.l2_entries * self.units_a_cluster

    @property
    def l2_span(self) -> int:
        """Bytes of the guest's disk that one L2 table describes."""
        return self.l2_entries << self.cluster_bits

    def l1_entries(self, size: int) -> int:
        """L2 tables that a disk of `size` bytes may have."""
        return -(-size // self.l2_span)
