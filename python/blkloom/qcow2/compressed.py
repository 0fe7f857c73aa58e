"""One compressed cluster: raw deflate or zstd, to exactly a cluster of bytes and never more.

Pure but for reading; any thread, several at once (both libraries let the GIL go). May fail: CorruptImage, OSError.
Source: QEMU docs/interop/qcow2, "Compressed Clusters Descriptor"; RFC 1951; RFC 8878.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Final

import zstandard

from blkloom.qcow2.errors import CorruptImage
from blkloom.qcow2.header import Compression
from blkloom.qcow2.tables import compressed_place

if TYPE_CHECKING:
    from blkloom.qcow2.storage import Storage

_WINDOW_BITS: Final = -15
"""Raw deflate. Images are written with a window of 2^12 bytes; the largest reads what anybody wrote."""

_ZSTD_WINDOW: Final = 8 << 20
"""What RFC 8878 asks decoders for; a frame that wants more memory is refused."""


def read_compressed(storage: Storage, entry: int, cluster_bits: int, compression: Compression) -> bytes:
    """The cluster that the L2 entry describes. Raises CorruptImage, OSError."""
    offset, length = compressed_place(entry, cluster_bits)
    if offset >= storage.size():
        raise CorruptImage(f"compressed cluster at {offset:#x}, past the end of the file", path=storage.path)
    packed = storage.read(offset, length)
    try:
        data = unpack(packed, 1 << cluster_bits, compression)
    except (zlib.error, zstandard.ZstdError, MemoryError) as error:
        raise CorruptImage(
            f"compressed cluster at {offset:#x} ({length} bytes, {compression.name.lower()}): {error}",
            path=storage.path,
        ) from error
    if len(data) != 1 << cluster_bits:
        raise CorruptImage(
            f"compressed cluster at {offset:#x} holds {len(data)} bytes instead of {1 << cluster_bits}",
            path=storage.path,
        )
    return data


def unpack(packed: bytes, size: int, compression: Compression) -> bytes:
    """At most `size` bytes; what follows them in `packed` does not matter. Raises zlib.error, ZstdError."""
    if compression is Compression.ZLIB:
        return zlib.decompressobj(_WINDOW_BITS).decompress(packed, size)
    reader = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).stream_reader(packed, read_across_frames=True)
    return reader.read(size)
