"""Preallocation: a write to a cluster that reads as zeros also allocates its neighbours, so that the engine can serve
writes to them by itself.

Only clusters that read as zeros before and after are preallocated. So only the size of the image differs, and after a
crash there are clusters that contain zeros. At the end of a session, clusters that were never written, which are still
holes of the file, are removed from the tables. One thread (the mapper's). May fail: CorruptImage, OSError.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from blkloom.image.qcow2.format.geometry import L1Index
from blkloom.image.qcow2.format.tables import ALL_ZERO, ALL_ZEROS, COPIED, OFFSET_WORD
from blkloom.image.types import HostOffset, Words

if TYPE_CHECKING:
    from blkloom.image.qcow2.state.image import L2Table
    from blkloom.image.qcow2.write.mapping import Mapping

_GROWN: Final = 64
_FASTER: Final = 4

_OWN = np.uint64(COPIED)


class Preallocation:
    """The preallocated entries of `mapping`. window: bytes around a write within which neighbours are allocated, up to
    `_GROWN` times as many for sequential writes; 0 for none.
    """

    def __init__(self, mapping: Mapping, window: int) -> None:
        geometry = mapping.layout.geometry
        self._mapping = mapping
        self.least: Final = min(max(window >> geometry.cluster_bits, 1), geometry.l2_entries)
        """Number of clusters of the smallest window."""
        self._most = min(self.least * _GROWN, geometry.l2_entries) if self.least > 1 else 1
        self._window = self.least
        self._next = 0
        """The cluster after the last window: a fault there means that all of the window was written."""
        self._given: dict[L1Index, NDArray[np.bool_]] = {}
        self.returned = 0
        """Number of preallocated clusters that were removed again."""

    @property
    def clusters(self) -> int:
        """Number of preallocated clusters that are not known to be in use."""
        return sum(int(given.sum()) for given in self._given.values())

    def around(self, index: L1Index, low: int, high: int) -> tuple[int, int]:
        """Range of entries in which neighbours of [low, high) may be preallocated."""
        geometry = self._mapping.layout.geometry
        first = index * geometry.l2_entries
        end = min(geometry.l2_entries, self._mapping.clusters - first)
        grows = first + low == self._next and not self._mapping.zeroes_by_writing
        self._window = min(self._window * _FASTER, self._most) if grows else self.least
        start, stop = low // self._window * self._window, min(-(-high // self._window) * self._window, end)
        self._next = first + stop
        return start, stop

    def given(self, index: L1Index, low: int, high: int) -> None:
        """Records entries [low, high) as preallocated: allocated, and not used by a write yet."""
        if low < high:
            if index not in self._given:
                self._given[index] = np.zeros(self._mapping.layout.geometry.l2_entries, np.bool_)
            self._given[index][low:high] = True

    def used(self, index: L1Index, low: int, high: int) -> None:
        """Records entries [low, high) as in use."""
        if (given := self._given.get(index)) is not None:
            given[low:high] = False

    def take_out(self) -> None:
        """Removes the clusters that were never written from the tables. The device is drained, and its writes are in
        the file.
        """
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
        numbers = numbers[~self._written(table.entries[numbers] & OFFSET_WORD)]
        layout = self._mapping.layout
        # With a backing file, only a zero flag says for certain that the cluster reads as zeros.
        entry = ALL_ZERO if self._mapping.below and layout.version >= 3 and not layout.geometry.extended else 0
        for part in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
            if part.size:
                low, high = int(part[0]), int(part[-1]) + 1
                self._mapping.replace(table, low, high, entry, ALL_ZEROS if self._mapping.below else np.uint64(0))
                self._mapping.publish(table, low, high)
                self.returned += high - low

    def _written(self, hosts: Words) -> NDArray[np.bool_]:
        """Which of the host clusters contain data, according to the file."""
        bits = self._mapping.layout.geometry.cluster_bits
        written = np.zeros(hosts.size, np.bool_)
        cuts = [0, *(np.flatnonzero(np.diff(hosts) != 1 << bits) + 1).tolist(), hosts.size]
        for low, high in itertools.pairwise(cuts):
            host = int(hosts[low])
            for start, end in self._mapping.data.data_runs(HostOffset(host), (high - low) << bits):
                written[low + (start - host >> bits) : low + (end - host - 1 >> bits) + 1] = True
        return written
