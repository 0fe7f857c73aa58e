"""Read-only image format: a magic of 512 bytes, then the disk's bytes, each XOR 0x55."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from blkloom.image import cluster_entries
from blkloom.image.errors import CorruptImage
from blkloom.image.format import Format, Opened
from blkloom.image.layer import Job, Layer, Piece
from blkloom.image.types import HostOffset

if TYPE_CHECKING:
    from blkloom.image.open_chain import ImageSource
    from blkloom.image.storage import Storage
    from blkloom.image.types import Words

MAGIC = b"xor image".ljust(512, b"\0")
BITS = 16


def image_of(disk: bytes) -> bytes:
    """The image file of a disk."""
    return MAGIC + bytes(byte ^ 0x55 for byte in disk)


class Xor(Format):
    def open(self, source: ImageSource) -> Opened:
        storage, file = source.data()
        return Opened(XorLayer(source.number, storage, self.disk_size(storage)), file)

    def disk_size(self, storage: Storage) -> int:
        if storage.read(HostOffset(0), len(MAGIC)) != MAGIC:
            raise CorruptImage("no xor image", path=storage.path, cure="make one")
        return storage.size() - len(MAGIC)


class XorLayer(Layer):
    def __init__(self, number: int, storage: Storage, size: int) -> None:
        super().__init__(number, storage, size=size, unit_bits=BITS, cluster_bits=BITS)

    def entries(self, first: int, count: int, unit_bits: int) -> Words:
        entry = cluster_entries.IN_MEMORY | cluster_entries.file_field(self.number)
        return self._with_end(np.full(count, entry, np.uint64), first, unit_bits)

    def compressed(self, cluster: int) -> Job | None:
        return lambda: self._bytes(cluster << BITS, 1 << BITS)

    def fill(self, out: bytearray, origin: int, pieces: list[Piece]) -> list[Piece]:
        for low, high in pieces:
            if (end := min(high, self.size)) > low:
                out[low - origin : end - origin] = self._bytes(low, end - low)
        return []

    def _bytes(self, offset: int, length: int) -> bytes:
        return bytes(byte ^ 0x55 for byte in self.data.read(HostOffset(len(MAGIC) + offset), length))
