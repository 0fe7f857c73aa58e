"""Metadata contexts of an attached image besides `base:allocation`: those of QEMU's NBD server.

`qemu:allocation-depth` is the number of the image that provides a range: 1 for the top one, 0 if no image has the range
allocated and it reads as zeros. Past its own end, an image provides zeros to the images above it.
`qemu:dirty-bitmap:NAME` is 1 where the bitmap of that name has a bit set. The uppermost image with a bitmap of the name
counts; if that bitmap is not valid, the context does not exist. Answers include changes that are only in memory. An
answer ends early before other requests would wait too long; the client asks again from there. One thread (the
mapper's). May fail: FaultError (EINVAL, no such context), CorruptImage, OSError.

Source: QEMU docs/interop/nbd, "qemu namespace".
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from blkloom.errors import FaultError
from blkloom.image.runs import joined, runs_alike

if TYPE_CHECKING:
    from blkloom.image.chain import Chain
    from blkloom.image.layer import Layer, Runs

ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"

_STRETCH: Final = 4096
"""Units looked up together."""
_MOST_LOOKS: Final = 1024
"""Maximum number of stretches looked up for one query, counted for each image."""
_SECTOR_MASK: Final = 511


class BlockStatus:
    """The metadata contexts of `chain`, besides `base:allocation`."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._bitmaps()  # report invalid bitmaps before the first query

    @property
    def contexts(self) -> list[str]:
        """The names of the contexts."""
        return [ALLOCATION_DEPTH, *(DIRTY_BITMAP + name for name in self._bitmaps())]

    def runs(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """(length, flags) runs from `offset` on, in bytes; neighbouring runs differ."""
        if context == ALLOCATION_DEPTH:
            return joined(self._depths(offset, offset + length))
        if context.startswith(DIRTY_BITMAP) and (found := self._bitmaps().get(context.removeprefix(DIRTY_BITMAP))):
            return joined(found(offset, length))
        raise FaultError(errno.EINVAL, f"{self._chain.top.path} has no metadata context '{context}'")

    def _bitmaps(self) -> dict[str, Runs]:
        """Valid bitmaps by name. Of several images with a bitmap of the same name, the uppermost one counts. Ends at
        the first image whose bitmaps say nothing about the disk.
        """
        uppermost: dict[str, Runs | None] = {}
        for layer in self._chain.layers:
            if (bitmaps := layer.dirty_bitmaps()) is None:
                break
            for name, runs in bitmaps.items():
                uppermost.setdefault(name, runs)
        return {name: runs for name, runs in uppermost.items() if runs}

    def _depths(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """Runs of depths. Each step covers a range in which no layer ends, so the same layers are above each other
        there.
        """
        bits, looks = self._chain.unit_bits, 0
        ends = sorted({_end(layer) for layer in self._chain.layers[1:]})
        ends = [*(until for until in ends if offset < until < end), end]
        at = offset
        for until in ends:
            while at < until:
                if looks >= _MOST_LOOKS:
                    return
                first = at >> bits
                if empty := self._chain.unallocated(first, -(-until >> bits) - first):
                    looks += 1
                    stop = min(first + empty << bits, until)
                    yield stop - at, self._depth_past_ends(at)
                    at = stop
                    continue
                last = min(-(-until >> bits), first // _STRETCH * _STRETCH + _STRETCH)
                depths, looked = self._depths_of(first, last - first, at)
                looks += looked
                for depth, _, high in runs_alike(depths):
                    stop = min(first + high << bits, until)
                    yield stop - at, depth
                    at = stop

    def _depth_past_ends(self, at: int) -> int:
        """Depth of byte `at` if no image has it allocated: the first layer that has ended before it; 0 for none."""
        layers = enumerate(self._chain.layers[1:], 2)
        return next((depth for depth, layer in layers if at >= _end(layer)), 0)

    def _depths_of(self, first: int, count: int, at: int) -> tuple[NDArray[np.uint32], int]:
        """Depths of units from `first` on, among the layers that reach byte `at`; and the number of layers examined."""
        depths = np.zeros(count, np.uint32)
        looked = 0
        for depth, layer in enumerate(self._chain.layers, 1):
            unknown = np.flatnonzero(depths == 0)
            if not unknown.size:
                break
            if depth > 1 and at >= _end(layer):
                depths[unknown] = depth
                break
            low, high = int(unknown[0]), int(unknown[-1]) + 1
            looked += 1
            held = layer.holds(first + low, high - low, self._chain.unit_bits)
            depths[low:high][held & (depths[low:high] == 0)] = depth
        return depths, looked


def _end(layer: Layer) -> int:
    """End of a layer in bytes, rounded up to a whole sector."""
    return layer.size + _SECTOR_MASK & ~_SECTOR_MASK
