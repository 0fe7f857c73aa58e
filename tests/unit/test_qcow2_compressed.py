"""Compressed clusters: exactly a cluster comes out, of honest data and of none."""

from __future__ import annotations

import random
import struct
import zlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from blkloom.qcow2.compressed import read_compressed, unpack
from blkloom.qcow2.errors import CorruptImage
from blkloom.qcow2.header import Compression
from blkloom.qcow2.tables import COMPRESSED
from qcow2_by_hand import MemoryFile

BITS = 16
CLUSTER = 1 << BITS


def packed(data: bytes, compression: Compression, level: int = 6) -> bytes:
    if compression is Compression.ZSTD:
        return zstandard.ZstdCompressor(level=level).compress(data)
    packer = zlib.compressobj(level, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


def read(raw: bytes, compression: Compression, *, skip: int = 0) -> bytes:
    sectors = (skip + len(raw) - 1) // 512 - skip // 512
    entry = COMPRESSED | skip | sectors << 62 - (BITS - 8)
    return read_compressed(MemoryFile(bytes(skip) + raw), entry, BITS, compression)  # type: ignore[arg-type] # only reads


@pytest.mark.parametrize("compression", list(Compression))
@given(data=st.binary(max_size=300), times=st.integers(1, 9), skip=st.integers(0, 2000))
def test_a_cluster_comes_out_whatever_its_place_and_what_follows_it(
    compression: Compression, data: bytes, times: int, skip: int
) -> None:
    cluster = (data * (times * 100)).ljust(CLUSTER, b"z")[:CLUSTER]
    assert read(packed(cluster, compression) + b"\xa5" * 700, compression, skip=skip) == cluster


@pytest.mark.parametrize("compression", list(Compression))
def test_incompressible_clusters_come_out_too(compression: Compression) -> None:
    cluster = random.Random(1).randbytes(CLUSTER)
    raw = packed(cluster, compression)
    assert unpack(raw, CLUSTER, compression) == cluster


@pytest.mark.parametrize("compression", list(Compression))
def test_too_little_data_is_corrupt(compression: Compression) -> None:
    with pytest.raises(CorruptImage, match=r"holds 100 bytes instead of 65536|Unknown frame"):
        read(packed(bytes(100), compression), compression)


@pytest.mark.parametrize("compression", list(Compression))
def test_no_more_than_a_cluster_is_ever_made(compression: Compression) -> None:
    bomb = packed(bytes(64 << 20), compression, 9)
    assert read(bomb, compression) == bytes(CLUSTER)


@pytest.mark.parametrize("compression", list(Compression))
def test_noise_is_corrupt(compression: Compression) -> None:
    with pytest.raises(CorruptImage, match=f"compressed cluster at 0x0.*{compression.name.lower()}"):
        read(b"\xff" * 900, compression)


def test_a_frame_that_wants_more_memory_than_decoders_must_have_is_refused() -> None:
    # Magic, a frame header without content size, a window descriptor of 2^31 bytes, one empty last block.
    frame = struct.pack("<IBB", 0xFD2FB528, 0, (31 - 10) << 3) + b"\x01\x00\x00"
    with pytest.raises(CorruptImage, match="zstd"):
        read(frame, Compression.ZSTD)


def test_data_past_the_end_of_the_file_is_corrupt() -> None:
    with pytest.raises(CorruptImage, match="past the end of the file"):
        read_compressed(MemoryFile(bytes(512)), COMPRESSED | 512, BITS, Compression.ZLIB)  # type: ignore[arg-type]
