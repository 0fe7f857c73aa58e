"""Clusters given ahead: a write to a place that reads as zeros gets its neighbours a place too, so that writes to
them are the engine's alone.

Given ahead is only what reads as zeros before and after, so nothing but the image's size can tell, and a crash leaves
clusters that hold zeros. At the end of a session those never written, which are still holes of the file, are taken
out of the tables again. One thread (the mapper's). May fail: CorruptImage, OSError.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from blkloom.qcow2.placing import ALL_ZEROS
from blkloom.qcow2.tables import ALL_ZERO, COPIED, OFFSET_MASK
from blkloom.qcow2.types import HostOffset, L1Index, Words

if TYPE_CHECKING:
    from blkloom.qcow2.image import L2Table
    from blkloom.qcow2.mapping import Mapping

_GROWN: Final = 64
_FASTER: Final = 4

_OWN = np.uint64(COPIED)
_OFFSET = np.uint64(OFFSET_MASK)


class Ahead:
    """Which entries of `mapping` were given ahead. window: bytes within which neighbours are given, up to
    `_GROWN` times as many for whoever writes on and on; 0 for none.
    """

    def __init__(self, mapping: Mapping, window: int) -> None:
        geometry = mapping.layout.geometry
        self._mapping = mapping
        self.least: Final = min(max(window >> geometry.cluster_bits, 1), geometry.l2_entries)
        """Clusters of the smallest window."""
        self._most = min(self.least * _GROWN, geometry.l2_entries) if self.least > 1 else 1
        self._window = self.least
        self._next = 0
        """The cluster where the last window ended: who faults there has written all of it."""
        self._given: dict[L1Index, NDArray[np.bool_]] = {}
        self.returned = 0
        """Clusters given ahead and taken out again."""

    @property
    def clusters(self) -> int:
        """Given ahead and not known to be in use."""
        return sum(int(given.sum()) for given in self._given.values())

    def around(self, index: L1Index, low: int, high: int) -> tuple[int, int]:
        """Entries within which neighbours of [low, high) may be given."""
        geometry = self._mapping.layout.geometry
        first = index * geometry.l2_entries
        end = min(geometry.l2_entries, self._mapping.clusters - first)
        grows = first + low == self._next and not self._mapping.zeroes_by_writing
        self._window = min(self._window * _FASTER, self._most) if grows else self.least
        start, stop = low // self._window * self._window, min(-(-high // self._window) * self._window, end)
        self._next = first + stop
        return start, stop

    def given(self, index: L1Index, low: int, high: int) -> None:
        """Entries [low, high) were given a place, and nobody asked for them."""
        if low < high:
            if index not in self._given:
                self._given[index] = np.zeros(self._mapping.layout.geometry.l2_entries, np.bool_)
            self._given[index][low:high] = True

    def used(self, index: L1Index, low: int, high: int) -> None:
        """Entries [low, high) are none of ours any more."""
        if (given := self._given.get(index)) is not None:
            given[low:high] = False

    def take_out(self) -> None:
        """Takes those never written out of the tables. The device is drained, and what it wrote is in the file."""
        for index, given in self._given.items():
            table = self._mapping.image.l2(index)
            if table is not None:
                self._take_out(table, np.flatnonzero(given))
        self._given.clear()

    def _take_out(self, table: L2Table, numbers: NDArray[np.intp]) -> None:
        entries = table.entries[numbers]
        numbers = numbers[(entries & _OWN) != 0]
        if not numbers.size:
            return
        numbers = numbers[~self._written(table.entries[numbers] & _OFFSET)]
        layout = self._mapping.layout
        # Under a backing file only a zero flag says for certain what the cluster reads as.
        entry = ALL_ZERO if self._mapping.below and layout.version >= 3 and not layout.geometry.extended else 0
        for part in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
            if part.size:
                low, high = int(part[0]), int(part[-1]) + 1
                self._mapping.replace(table, low, high, entry, ALL_ZEROS if self._mapping.below else np.uint64(0))
                self._mapping.publish(table, low, high)
                self.returned += high - low

    def _written(self, hosts: Words) -> NDArray[np.bool_]:
        """Which of the host clusters hold anything, as far as the file knows."""
        bits = self._mapping.layout.geometry.cluster_bits
        written = np.zeros(hosts.size, np.bool_)
        cuts = [0, *(np.flatnonzero(np.diff(hosts) != 1 << bits) + 1).tolist(), hosts.size]
        for low, high in itertools.pairwise(cuts):
            host = int(hosts[low])
            for start, end in self._mapping.data.data_runs(HostOffset(host), (high - low) << bits):
                written[low + (start - host >> bits) : low + (end - host - 1 >> bits) + 1] = True
        return written
