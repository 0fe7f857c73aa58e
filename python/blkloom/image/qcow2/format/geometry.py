"""Geometry of an image: sizes of clusters, units and tables.

Pure. Source: QEMU docs/interop/qcow2, "General", "Cluster mapping" and "Extended L2 Entries".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NewType

L1Index = NewType("L1Index", int)
"""Number of an L2 table: the index of its entry in the L1 table."""

SUBCLUSTERS: Final = 32
"""Subclusters per cluster, if there are any."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of clusters and units. A *unit* is the smallest piece that can be mapped separately: a subcluster of an
    image with extended L2 entries, otherwise a cluster.
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
        """Number of units in a cluster."""
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
