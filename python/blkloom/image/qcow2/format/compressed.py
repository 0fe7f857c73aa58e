"""Decompresses one compressed cluster: raw deflate or zstd, to exactly one cluster of bytes.

Pure except for reads; any thread, several at once (both libraries release the GIL). May fail: DamagedCluster,
CorruptImage (an offset past the end of the file), OSError. Source: QEMU docs/interop/qcow2, "Compressed Clusters
Descriptor"; RFC 1951; RFC 8878.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Final

import zstandard

from blkloom.image.errors import CorruptImage, DamagedCluster
from blkloom.image.qcow2.format.header import Compression
from blkloom.image.qcow2.format.tables import compressed_place

if TYPE_CHECKING:
    from blkloom.image.storage import Storage

_WINDOW_BITS: Final = -15
"""Raw deflate. QEMU writes a window of 2^12 bytes; the largest window can read all images."""

_ZSTD_WINDOW: Final = 8 << 20
"""The window that decoders must support (RFC 8878). No frame needs more after `_with_small_windows`."""
_ZSTD_MAGIC: Final = 0xFD2FB528
_ZSTD_SKIPPABLE: Final = 0x184D2A50
_ZSTD_BLOCK_BITS: Final = 17
"""A block decompresses to at most the window size, and at most this; no window is made smaller."""
_ZSTD_DICTIONARY_BYTES: Final = (0, 1, 2, 4)
_ZSTD_CONTENT_BYTES: Final = (0, 2, 4, 8)


def read_compressed(storage: Storage, entry: int, cluster_bits: int, compression: Compression) -> bytes:
    """Reads the cluster that the L2 entry describes. Raises DamagedCluster, CorruptImage, OSError."""
    offset, length = compressed_place(entry, cluster_bits)
    if offset >= storage.size():
        raise CorruptImage(
            f"compressed cluster at {offset:#x}, past the end of the file ({storage.size():#x})", path=storage.path
        )
    packed = storage.read(offset, length)
    try:
        data = unpack(packed, 1 << cluster_bits, compression)
    except (zlib.error, zstandard.ZstdError) as error:
        raise DamagedCluster(
            f"compressed cluster at {offset:#x} ({length} bytes, {compression.name.lower()}): {error}",
            path=storage.path,
        ) from error
    if len(data) != 1 << cluster_bits:
        raise DamagedCluster(
            f"compressed cluster at {offset:#x} holds {len(data)} bytes instead of {1 << cluster_bits}",
            path=storage.path,
        )
    return data


def unpack(packed: bytes, size: int, compression: Compression) -> bytes:
    """Decompresses at most `size` bytes; trailing bytes of `packed` are ignored. Raises zlib.error, ZstdError."""
    if compression is Compression.ZLIB:
        return zlib.decompressobj(_WINDOW_BITS).decompress(packed, size)
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    return decompressor.stream_reader(_with_small_windows(packed, size), read_across_frames=True).read(size)


def _with_small_windows(packed: bytes, size: int) -> bytes:
    """The same zstd frames with windows of at most `size` bytes, the size of the output.

    A window is the maximum distance of a back reference, and decoders allocate that much memory: up to 128 MiB in valid
    images, for each thread. No reference can reach beyond the output. Damaged frames are passed to the decoder
    unchanged.
    """
    largest = max((size - 1).bit_length(), _ZSTD_BLOCK_BITS) - 10 << 3
    found, at = bytearray(packed), 0
    while at + 6 <= len(found):
        magic = int.from_bytes(found[at : at + 4], "little")
        if magic & ~0xF == _ZSTD_SKIPPABLE:
            at += 8 + int.from_bytes(found[at + 4 : at + 8], "little")
            continue
        if magic != _ZSTD_MAGIC:
            break
        descriptor = found[at + 4]
        single = bool(descriptor & 0x20)
        if not single:
            found[at + 5] = min(found[at + 5], largest)
        content = _ZSTD_CONTENT_BYTES[descriptor >> 6] or int(single)
        at += 5 + (not single) + _ZSTD_DICTIONARY_BYTES[descriptor & 3] + content
        last = False
        while not last and at + 3 <= len(found):
            block = int.from_bytes(found[at : at + 3], "little")
            last = bool(block & 1)
            at += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)  # a run has one byte, for any length
        at += 4 if descriptor & 4 else 0  # a checksum
    return bytes(found)
