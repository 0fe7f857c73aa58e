"""One layer of a chain: an image of some format, or a raw file at the bottom.

A layer returns its contents as entries of the engine's cluster table (`entries`, see `cluster_entries`) and as bytes
(`fill`), and as jobs that make clusters which the engine cannot read by itself (`compressed`). Where it has nothing,
the layer below is visible; past its own end it reads as zeros. A read-only format needs `entries` and `fill`, and
`compressed` if its entries can be IN_MEMORY; all other methods have a default here. The mapper's thread; jobs may run
on any. May fail: CorruptImage, OSError.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from blkloom.image import cluster_entries
from blkloom.image.errors import CorruptImage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from blkloom.image.storage import Storage
    from blkloom.image.types import Words

_log = logging.getLogger(__name__)

Job: TypeAlias = Callable[[], bytes]
Piece: TypeAlias = tuple[int, int]
"""(guest offset, end), bytes."""
Runs: TypeAlias = Callable[[int, int], Iterator[tuple[int, int]]]
"""Callable for a range (offset, length), bytes: returns (length, flags) runs from `offset` on."""


class Layer(ABC):
    """One layer. number: counted from the top; also the number of its file in the engine's table. data: the storage
    that its entries refer to. size: bytes of its disk. unit_bits: its smallest mapped pieces have `1 << unit_bits`
    bytes. cluster_bits: the size of the pieces that are made in memory.
    """

    def __init__(self, number: int, data: Storage, *, size: int, unit_bits: int, cluster_bits: int) -> None:
        self.number: Final = number
        self.data: Final = data
        self.size: Final = size
        self.unit_bits: Final = unit_bits
        self.cluster_bits: Final = cluster_bits

    @property
    def path(self) -> str:
        """Path of its file, for errors."""
        return self.data.path

    @abstractmethod
    def entries(self, first: int, count: int, unit_bits: int) -> Words:
        """Entries of `count` units of `1 << unit_bits` bytes from unit `first` on."""

    @abstractmethod
    def fill(self, out: bytearray, origin: int, pieces: list[Piece]) -> list[Piece]:
        """Reads the pieces into `out`, which begins at `origin` and contains zeros; returns the pieces that the layer
        below provides. Raises CorruptImage, OSError.
        """

    def compressed(self, cluster: int) -> Job | None:
        """A job that makes the cluster, if it is compressed."""
        return None

    def holds(self, first: int, count: int, unit_bits: int) -> NDArray[np.bool_]:
        """Which units (as in `entries`) are allocated in this layer, also as zeros, so that the layer below is not
        visible.
        """
        return np.ones(count, np.bool_)

    def unallocated(self, first: int, count: int, unit_bits: int) -> int:
        """Number of units, of `count` from `first` on, that are certainly not allocated; 0 if that is not known without
        a lookup.
        """
        return 0

    def dirty_bitmaps(self) -> Mapping[str, Runs | None] | None:
        """Dirty bitmaps by name: runs, with flag 1 where the disk has changed; None for an invalid bitmap. None in
        place of the dictionary: the bitmaps of this layer and of those below say nothing about the contents of this
        layer.
        """
        return {}

    # Errors of the layer

    @property
    def wants_check(self) -> bool:
        """Whether the layer needs a check, by its own flags or after an error."""
        return False

    def contradiction(self, unit: int) -> CorruptImage:
        """A description of the inconsistency of a unit whose entry is CORRUPT. Raises OSError."""
        return CorruptImage(f"unit {unit} of {1 << self.unit_bits} bytes cannot be read", path=self.path)

    def report(self, error: CorruptImage) -> None:
        """Logs an error that a request found in this layer."""
        _log.error("%s", error)

    def on_report(self, told: Callable[[CorruptImage], None]) -> None:
        """Registers `told`, which is called with every later argument of `report`."""
        return

    def _with_end(self, found: Words, first: int, unit_bits: int) -> Words:
        """Entries from unit `first` on, corrected at the end of the layer: units past it are zeros, and a unit that
        contains it is made in memory.
        """
        whole, rest = divmod(self.size, 1 << unit_bits)
        if first + found.size > whole:
            found[max(whole - first, 0) :] = cluster_entries.ZERO
            if rest and whole >= first:
                found[whole - first] = cluster_entries.IN_MEMORY | cluster_entries.file_field(self.number)
        return found
