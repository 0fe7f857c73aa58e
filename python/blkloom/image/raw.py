"""Raw files: the format of a backing file whose bytes are the disk. May fail: OSError of the file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from typing_extensions import override

from blkloom.image import cluster_entries
from blkloom.image.format import Format, Opened
from blkloom.image.layer import Layer, Piece
from blkloom.image.types import HostOffset

if TYPE_CHECKING:
    from blkloom.image.open_chain import ImageSource
    from blkloom.image.storage import Storage
    from blkloom.image.types import Words


class Raw(Format):
    """The raw format, for the bottom of a chain; the target `loop` serves raw disks."""

    @override
    def open(self, source: ImageSource) -> Opened:
        storage, file = source.data()
        return Opened(RawLayer(source.number, storage), file)

    @override
    def disk_size(self, storage: Storage) -> int:
        return storage.size()


class RawLayer(Layer):
    """A raw file, with the size that it had when it was opened."""

    def __init__(self, number: int, storage: Storage) -> None:
        super().__init__(number, storage, size=storage.size(), unit_bits=21, cluster_bits=9)

    @override
    def entries(self, first: int, count: int, unit_bits: int) -> Words:
        numbers = np.arange(first, first + count, dtype=np.uint64)
        tag = cluster_entries.READ_ONLY | cluster_entries.file_field(self.number)
        return self._with_end(numbers << np.uint64(unit_bits - 9) | tag, first, unit_bits)

    @override
    def fill(self, out: bytearray, origin: int, pieces: list[Piece]) -> list[Piece]:
        for low, high in pieces:
            end = min(high, self.size)
            if low < end:
                out[low - origin : end - origin] = self.data.read(HostOffset(low), end - low)
        return []
