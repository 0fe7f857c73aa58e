"""Allocation status of an attached image (`base:allocation`): data, or holes that read as zeros.

For units in its cluster table, the engine answers by itself, and asks the file behind them for holes (SEEK_HOLE). This
module answers for all other units in the same way, so that the answer about a range does not depend on earlier reads.
Ranges for which no layer has an L2 table are skipped as a whole. An answer ends early before other requests would wait
too long; the client asks again from there. One thread (the mapper's). May fail: CorruptImage, OSError.

Source: NBD protocol, "base:allocation metadata context".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from blkloom.image import cluster_entries
from blkloom.image.runs import joined
from blkloom.image.types import HostOffset, Words

if TYPE_CHECKING:
    from blkloom.image.chain import Chain
    from blkloom.image.storage import Storage

DATA: Final = 0
HOLE: Final = 3
"""Flags: a hole that reads as zeros."""

_STRETCH: Final = 8192
"""Units looked up together."""
_MOST_LOOKS: Final = 256
"""Maximum number of stretches looked up for one query."""
_A_LOOK: Final = 64
"""Queries to a file that take as long as one lookup."""

_FEW: Final = 64
"""Up to this many pieces are faster to handle one by one."""

_FOR_EVER: Final = 1 << 63
_NONE: Final = np.uint64(0)
_FILE_SHIFT: Final = int(cluster_entries.FILE_SHIFT)
_FILE_MASK: Final = int(cluster_entries.FILE_MASK)
_SECTOR_SHIFT: Final = int(cluster_entries.SECTOR_SHIFT)
_OFFSET: Final = (1 << _FILE_SHIFT) - 1


def allocation(chain: Chain, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """(length, flags) runs of the disk from `offset` on, in bytes; neighbouring runs differ. They may end early."""
    return joined(_Question(chain, offset, offset + length).runs())


class _Question:
    """One query about the bytes `at` to `end`; `at` advances with the answer."""

    def __init__(self, chain: Chain, at: int, end: int) -> None:
        self._chain = chain
        self._bits = chain.unit_bits
        self._at = at
        self._end = end
        self._step = np.uint64(1 << self._bits >> _SECTOR_SHIFT)
        self._files = [_Holes(layer.data) for layer in chain.layers]

    def runs(self) -> Iterator[tuple[int, int]]:
        last, looks = -(-self._end >> self._bits), 0
        while self._at < self._end and looks + sum(file.asked for file in self._files) // _A_LOOK < _MOST_LOOKS:
            looks += 1
            first = self._at >> self._bits
            if empty := self._chain.unallocated(first, last - first):
                yield self._upto(first + empty, HOLE)
                continue
            end = min(last, first // _STRETCH * _STRETCH + _STRETCH)
            yield from self._stretch(first, self._chain.entries(first, end - first))

    def _stretch(self, first: int, found: Words) -> Iterator[tuple[int, int]]:
        """Runs of the units from `first` on, whose entries are `found`."""
        kinds = cluster_entries.kinds(found)
        data = (kinds == 1) | (kinds == 2)
        steps = found[1:] - found[:-1]
        cuts = (np.flatnonzero(steps != np.where(data[1:], self._step, _NONE)) + 1).tolist()
        if len(cuts) > _FEW:
            yield from self._scattered(first, found, data)
            return
        for one, other in zip([0, *cuts], [*cuts, found.size], strict=True):
            if data[one]:
                yield from self._ask(first + one, int(found[one]), first + other)
            else:
                yield self._upto(first + other, HOLE if found[one] == cluster_entries.ZERO else DATA)

    def _scattered(self, first: int, found: Words, data: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
        """`_stretch` for many pieces: it queries each file once for all its pieces."""
        holes = found == cluster_entries.ZERO
        numbers = (found >> cluster_entries.FILE_SHIFT & cluster_entries.FILE_MASK).astype(np.intp)
        hosts = (found & np.uint64(_OFFSET)) << cluster_entries.SECTOR_SHIFT
        mixed = np.zeros(found.size, np.bool_)
        for number in np.unique(numbers[data]).tolist():
            mine = data & (numbers == number)
            low, high = int(hosts[mine].min()), int(hosts[mine].max()) + (1 << self._bits)
            until, hole = self._files[number].at(low)
            if until < high:
                mixed |= mine
            elif hole:
                holes |= mine
        code = holes.view(np.uint8) | mixed.view(np.uint8) << np.uint8(1)
        breaks = (code[1:] != code[:-1]) | mixed[1:] & (found[1:] - found[:-1] != self._step)
        cuts = (np.flatnonzero(breaks) + 1).tolist()
        for one, other in zip([0, *cuts], [*cuts, found.size], strict=True):
            if mixed[one]:
                yield from self._ask(first + one, int(found[one]), first + other)
            else:
                yield self._upto(first + other, HOLE if holes[one] else DATA)

    def _ask(self, unit: int, place: int, end: int) -> Iterator[tuple[int, int]]:
        """Runs of the units up to `end`. `unit` is at `place` in a file, and the others follow it there."""
        file = self._files[place >> _FILE_SHIFT & _FILE_MASK]
        ahead = ((place & _OFFSET) << _SECTOR_SHIFT) - (unit << self._bits)
        while self._at < min(end << self._bits, self._end):
            until, hole = file.at(self._at + ahead)
            yield self._to(min(until - ahead, end << self._bits), HOLE if hole else DATA)

    def _upto(self, unit: int, flags: int) -> tuple[int, int]:
        return self._to(unit << self._bits, flags)

    def _to(self, offset: int, flags: int) -> tuple[int, int]:
        length = min(offset, self._end) - self._at
        self._at += length
        return length, flags


class _Holes:
    """The holes of a file at the time of the query. asked: number of queries to the file."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._size = -1
        self._low = self._data = self._high = 0
        """The last answer: a hole from `_low` to `_data`, and data from there to `_high`."""
        self.asked = 0

    def at(self, offset: int) -> tuple[int, bool]:
        """Whether there is a hole at the offset, and the end of the hole or data. Past the end of the file there is a
        hole.
        """
        if not self._low <= offset < self._high:
            if self._size < 0:
                self._size = self._storage.size()
            self.asked += 1
            self._low = offset
            runs = self._storage.data_runs(HostOffset(offset), self._size - offset)
            self._data, self._high = next(runs, (_FOR_EVER, _FOR_EVER))
        if offset < self._data:
            return self._data, True
        return self._high, False
