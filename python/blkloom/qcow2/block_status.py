"""What an attached image tells of itself beside its bytes: the metadata contexts of QEMU's NBD server.

`qemu:allocation-depth`: which image of the chain says what a piece of the disk is, 1 for the top one; 0 for none, where
it is unallocated everywhere and reads as zeros. An image that ends before the one above it says what is past its
end: zeros. `qemu:dirty-bitmap:NAME`: 1 where a bit of the bitmap of that name is set, in the uppermost image that has
one; where that one may not be believed, there is none. Both are of the moment, with what is only in memory yet. A
question is answered as far as it takes no time in which other requests had better be served; the asker goes on from
there. One thread (the mapper's). May fail: FaultError (EINVAL, no such context), CorruptImage, OSError.

Source: QEMU docs/interop/nbd, "qemu namespace".
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from blkloom.errors import FaultError
from blkloom.qcow2.bitmaps import sound_bitmaps
from blkloom.qcow2.placing import joined, runs_alike

if TYPE_CHECKING:
    from blkloom.qcow2.bitmaps import Bitmap, Bitmaps
    from blkloom.qcow2.chain import Chain
    from blkloom.qcow2.layers import Layer

ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"

_STRETCH: Final = 4096
"""Units looked at together."""
_MOST_LOOKS: Final = 1024
"""Stretches looked at for one question, each image counting by itself."""
_SECTOR_MASK: Final = 511


class BlockStatus:
    """Of `chain`, of which the top image may be at a snapshot: then it shows no state that bitmaps tell of."""

    def __init__(self, chain: Chain, *, snapshot: bool) -> None:
        self._chain = chain
        self._bitmaps: list[Bitmaps] = []
        """From the top down, as far as they make sense."""
        for image in [] if snapshot else chain.images():
            if (bitmaps := sound_bitmaps(image)) is None:
                break
            self._bitmaps.append(bitmaps)

    def follow(self, bitmaps: Bitmaps) -> None:
        """Those of the top image are from now on as whoever writes to it has them."""
        self._bitmaps[:1] = [bitmaps]

    @property
    def contexts(self) -> list[str]:
        """Their names."""
        return [ALLOCATION_DEPTH, *(DIRTY_BITMAP + name for name in self._readable())]

    def runs(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """(length, flags) runs from `offset` on, bytes; unlike their neighbours."""
        if context == ALLOCATION_DEPTH:
            return joined(self._depths(offset, offset + length))
        if context.startswith(DIRTY_BITMAP) and (found := self._readable().get(context.removeprefix(DIRTY_BITMAP))):
            bitmaps, bitmap = found
            return joined(bitmaps.runs(bitmap, offset, length))
        raise FaultError(errno.EINVAL, f"{self._chain.top.path} has no metadata context {context!r}")

    def _readable(self) -> dict[str, tuple[Bitmaps, Bitmap]]:
        """By name, each as the uppermost image has it that has one of that name."""
        uppermost: dict[str, tuple[Bitmaps, Bitmap]] = {}
        for bitmaps in self._bitmaps:
            for bitmap in bitmaps.all:
                uppermost.setdefault(bitmap.name, (bitmaps, bitmap))
        return {name: found for name, found in uppermost.items() if found[1].readable}

    def _depths(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """Where no layer ends in between, the same layers stand above each other: so far at a time."""
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
        """Of byte `at`, if no image has it allocated: which image says so by having ended before; 0 for none."""
        layers = enumerate(self._chain.layers[1:], 2)
        return next((depth for depth, layer in layers if at >= _end(layer)), 0)

    def _depths_of(self, first: int, count: int, at: int) -> tuple[NDArray[np.uint32], int]:
        """Of units from `first` on, as far as the layers go that do at byte `at`; and how many layers it looked at."""
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
    """Where it ends, in bytes: a sector that it begins is its own."""
    return layer.size + _SECTOR_MASK & ~_SECTOR_MASK
