"""A backing chain: the location and the contents of each unit of the disk, over all layers.

Layers may have different cluster sizes; a unit of the chain is the smallest unit of all layers. The number of layers
affects the cost of filling a page of the table, but not of reading data. No function recurses over layers. One thread
(the mapper's). May fail: CorruptImage, OSError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from blkloom.image import cluster_entries

if TYPE_CHECKING:
    from blkloom._engine import File
    from blkloom.image.errors import CorruptImage
    from blkloom.image.layer import Job, Layer
    from blkloom.image.types import Words

_AT_ONCE: Final = 1 << 20
"""Units looked up at once; a unit of the top image may be many units of the chain."""


class Chain:
    """A backing chain. layers: from the top down. files: the engine's file of each layer. unit_bits: of the chain."""

    def __init__(self, layers: list[Layer], files: list[File]) -> None:
        self.layers: Final = layers
        self.files: Final = files
        self.top: Final = layers[0]
        self.unit_bits: Final = min(layer.unit_bits for layer in layers)
        self.largest_cluster: Final = 1 << max(self.unit_bits, *(layer.cluster_bits for layer in layers))

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.top.size

    def entries(self, first: int, count: int) -> Words:
        """Entries of units, one for each; none of them is SHOWS_THROUGH."""
        found = self.top.entries(first, count, self.unit_bits)
        return self._below(found, first, self.layers[1:])

    def contradiction(self, entry: int, unit: int) -> CorruptImage:
        """A description of the inconsistency at unit `unit`, whose `entry` is CORRUPT. Raises OSError."""
        layer = self.layers[entry >> int(cluster_entries.FILE_SHIFT) & int(cluster_entries.FILE_MASK)]
        return layer.contradiction(unit << self.unit_bits >> layer.unit_bits)

    def report(self, error: CorruptImage) -> None:
        """Passes an error that a request found to the image that it concerns."""
        for layer in self.layers:
            if layer.path == error.path:
                layer.report(error)

    def zeros(self, first: int, count: int) -> NDArray[np.bool_]:
        """Which of `count` units of the *top image* from `first` on certainly read as zeros if the top image has
        nothing there.
        """
        shift = self.top.unit_bits - self.unit_bits
        zeros = np.empty(count, np.bool_)
        step = max(_AT_ONCE >> shift, 1)
        for low in range(0, count, step):
            part = zeros[low : low + step]
            found = self._below(np.zeros(part.size << shift, np.uint64), first + low << shift, self.layers[1:])
            np.all((found == cluster_entries.ZERO).reshape(part.size, 1 << shift), axis=1, out=part)
        return zeros

    def unallocated(self, first: int, count: int) -> int:
        """Number of units, of `count` from `first` on, that are certainly in no layer and read as zeros. It uses only
        the L1 tables; 0 if these do not suffice.
        """
        for layer in self.layers:
            if layer.number:
                whole, rest = divmod(layer.size, 1 << self.unit_bits)
                if first >= whole + bool(rest):
                    return count  # past its end it hides the layers below
                if rest:
                    count = min(count, whole - first)  # the unit that contains its end is made in memory
            count = min(count, layer.unallocated(first, count, self.unit_bits)) if count else 0
        return count

    def _below(self, found: Words, first: int, layers: list[Layer]) -> Words:
        """Replaces entries that are SHOWS_THROUGH by those of `layers`, and by zeros after the last layer."""
        for layer in layers:
            through = np.flatnonzero(found == cluster_entries.SHOWS_THROUGH)
            if not through.size:
                return found
            low, high = int(through[0]), int(through[-1]) + 1
            part = found[low:high]
            np.copyto(
                part,
                layer.entries(first + low, high - low, self.unit_bits),
                where=part == cluster_entries.SHOWS_THROUGH,
            )
        found[found == cluster_entries.SHOWS_THROUGH] = cluster_entries.ZERO
        return found

    def read(self, offset: int, length: int, *, start: int = 0) -> bytes:
        """Contents of the disk as seen from layer `start` down; zeros past its end. Raises CorruptImage, OSError."""
        out = bytearray(length)
        pieces = [(offset, offset + length)]
        for layer in self.layers[start:]:
            if not pieces:
                break
            pieces = layer.fill(out, offset, pieces)
        return bytes(out)

    def read_below(self, offset: int, length: int) -> bytes:
        """Contents of the backing chain, which are visible where the top image has nothing."""
        return self.read(offset, length, start=1)

    def making(self, number: int, cluster: int) -> Job:
        """A job that makes a cluster of layer `number` that is IN_MEMORY; it may run on any thread. Raises
        CorruptImage, OSError.
        """
        layer = self.layers[number]
        bits = self.making_bits(number)
        if bits == layer.cluster_bits and (job := layer.compressed(cluster)):
            whole = layer.size - (cluster << bits)
            if number == 0 or whole >= 1 << bits:
                return job
        data = self.read(cluster << bits, 1 << bits, start=number)
        return lambda: data

    def making_bits(self, number: int) -> int:
        """Clusters of a layer are made in pieces of `1 << n` bytes."""
        return max(self.layers[number].cluster_bits, self.unit_bits)
